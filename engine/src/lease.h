// What one run has of the resources, for as long as it lasts.
#pragma once

#include <cstdint>
#include <memory>

#include "aligned.h"
#include "bitstrata/resources.h"
#include "thread_pool.h"

namespace bitstrata {

// Memory that grows, and is counted.
class Resources::Block {
 public:
  explicit Block(std::atomic<int64_t>* held) : held_(held) {}
  ~Block() { free(); }
  Block(Block&& other) noexcept : held_(other.held_), bytes_(other.bytes_), memory_(std::move(other.memory_)) {
    other.bytes_ = 0;
  }
  Block& operator=(Block&& other) noexcept {
    std::swap(held_, other.held_);
    std::swap(bytes_, other.bytes_);
    std::swap(memory_, other.memory_);
    return *this;
  }

  uint8_t* data() const { return memory_.data(); }
  int64_t bytes() const { return bytes_; }
  void grow(int64_t bytes);
  void free();

 private:
  std::atomic<int64_t>* held_;
  int64_t bytes_ = 0;
  AlignedBuffer memory_;
};

// Threads that one run at a time has, and the memory of all of them but the caller.
struct Resources::Team {
  Team(int threads, std::atomic<int64_t>* held);
  ThreadPool pool;
  std::vector<Block> blocks;
  bool busy = false;  // with the resources' mutex
};

class Lease {
 public:
  // Waits while as many runs as are allowed are under way. bytes: what each thread needs. Throws std::bad_alloc.
  Lease(Resources& resources, int64_t bytes);
  // The caller's thread alone, in its own memory.
  explicit Lease(uint8_t* memory) : block_(nullptr), own_(memory) {}
  ~Lease();
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

  int threads() const { return team_ == nullptr ? 1 : static_cast<int>(team_->blocks.size()) + 1; }
  uint8_t* memory(int thread) const {
    return thread == 0 ? own_ : team_->blocks[static_cast<size_t>(thread - 1)].data();
  }

  // Calls body(thread) once on every thread and returns when all are done.
  template <typename Body>
  void run(const Body& body) const {
    if (team_ == nullptr)
      body(0);
    else
      team_->pool.run(body);
  }

 private:
  void give_back();

  Resources* resources_ = nullptr;
  Resources::Block block_;
  std::shared_ptr<Resources::Team> team_;
  uint8_t* own_ = nullptr;
};

}  // namespace bitstrata
