#include "workspace.h"

namespace bitstrata {
namespace {

std::mutex kept_mutex;
std::vector<std::unique_ptr<Workspace>>& kept() {
  static std::vector<std::unique_ptr<Workspace>> all;
  return all;
}

}  // namespace

uint8_t* Workspace::get(int buffer, int64_t bytes) {
  if (bytes > bytes_[buffer]) {
    bytes_[buffer] = 0;
    data_[buffer] = AlignedBuffer();
    data_[buffer] = AlignedBuffer(bytes);
    bytes_[buffer] = bytes;
  }
  return data_[buffer].data();
}

Workspaces::Workspaces(int count) {
  const std::lock_guard<std::mutex> lock(kept_mutex);
  for (int i = 0; i < count; ++i) {
    if (kept().empty()) {
      all_.push_back(std::make_unique<Workspace>());
    } else {
      all_.push_back(std::move(kept().back()));
      kept().pop_back();
    }
    idle_.push_back(i);
  }
  kept().reserve(kept().size() + all_.size());
}

Workspaces::~Workspaces() {
  const std::lock_guard<std::mutex> lock(kept_mutex);
  for (auto i = all_.rbegin(); i != all_.rend(); ++i) kept().push_back(std::move(*i));
}

int Workspaces::take() {
  const std::lock_guard<std::mutex> lock(mutex_);
  const int i = idle_.back();
  idle_.pop_back();
  return i;
}

void Workspaces::give(int i) {
  const std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(i);
}

}  // namespace bitstrata
