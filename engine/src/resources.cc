#include "bitstrata/resources.h"

#include <algorithm>

#include "checks.h"
#include "lease.h"

namespace bitstrata {
namespace {

constexpr int kMaxThreads = 256, kMaxCallers = 4096, kLeastCallers = 4;

int check_threads(int threads) { return static_cast<int>(check_range("graph", "threads", threads, 1, kMaxThreads)); }

int choose_callers(int callers) {
  if (callers == 0) return std::max(kLeastCallers, static_cast<int>(std::thread::hardware_concurrency()));
  return static_cast<int>(check_range("graph", "callers", callers, 1, kMaxCallers));
}

}  // namespace

void Resources::Block::grow(int64_t bytes) {
  if (bytes <= bytes_) return;
  free();
  memory_ = AlignedBuffer(bytes);
  bytes_ = bytes;
  *held_ += bytes;
}

void Resources::Block::free() {
  memory_ = AlignedBuffer();
  if (bytes_ > 0) *held_ -= bytes_;
  bytes_ = 0;
}

Resources::Team::Team(int threads, std::atomic<int64_t>* held) : pool(threads) {
  for (int i = 1; i < threads; ++i) blocks.emplace_back(held);
}

Resources::Resources(int threads, int callers) : callers_(choose_callers(callers)), threads_(check_threads(threads)) {
  idle_.reserve(static_cast<size_t>(callers_));  // so that giving back does not allocate
  team_ = make_team(threads);
}

Resources::~Resources() = default;

std::shared_ptr<Resources::Team> Resources::make_team(int threads) {
  return threads > 1 ? std::make_shared<Team>(threads, &held_) : nullptr;
}

void Resources::set_threads(int threads) {
  check_threads(threads);
  std::shared_ptr<Team> team = make_team(threads);  // the old one at the end: its threads end without the mutex
  const std::lock_guard<std::mutex> lock(mutex_);
  if (team != nullptr)
    for (Block& block : team->blocks) block.grow(reserved_);
  std::swap(team_, team);
  threads_ = threads;
}

int Resources::threads() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return threads_;
}

void Resources::reserve(int64_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  reserve_locked(bytes);
}

void Resources::reserve_locked(int64_t bytes) {
  reserved_ = std::max(reserved_, bytes);
  if (idle_.empty() && leased_ < callers_) idle_.emplace_back(&held_);
  if (!idle_.empty()) idle_.back().grow(reserved_);  // the next caller's
  if (team_ != nullptr && !team_->busy)
    for (Block& block : team_->blocks) block.grow(reserved_);
}

void Resources::trim(int64_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  idle_.clear();
  if (team_ != nullptr && !team_->busy)
    for (Block& block : team_->blocks) block.free();
  reserved_ = 0;
  reserve_locked(bytes);
}

Lease::Lease(Resources& resources, int64_t bytes) : resources_(&resources), block_(&resources.held_) {
  {
    std::unique_lock<std::mutex> lock(resources.mutex_);
    resources.returned_.wait(lock, [&] { return resources.leased_ < resources.callers_; });
    ++resources.leased_;
    if (!resources.idle_.empty()) {
      block_ = std::move(resources.idle_.back());
      resources.idle_.pop_back();
    }
    if (resources.team_ != nullptr && !resources.team_->busy) {
      team_ = resources.team_;
      team_->busy = true;
    }
  }
  try {
    block_.grow(bytes);
    if (team_ != nullptr)
      for (auto& block : team_->blocks) block.grow(bytes);
  } catch (...) {
    give_back();
    throw;
  }
  own_ = block_.data();
}

Lease::~Lease() {
  if (resources_ != nullptr) give_back();
}

void Lease::give_back() {
  {
    const std::lock_guard<std::mutex> lock(resources_->mutex_);
    // A block that has outgrown what is reserved now was trimmed away while it was in use.
    if (block_.bytes() > resources_->reserved_) block_.free();
    resources_->idle_.push_back(std::move(block_));
    --resources_->leased_;
    if (team_ != nullptr) {
      team_->busy = false;
      for (auto& block : team_->blocks)
        if (block.bytes() > resources_->reserved_) block.free();
    }
  }
  resources_->returned_.notify_one();
}

}  // namespace bitstrata
