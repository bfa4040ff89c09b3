// Memory that calls reuse: what a product needs beside its operands, one set of buffers a thread. Kept when a call
// ends, because memory that is fresh from the operating system costs as much as the arithmetic on it.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "aligned.h"

namespace bitstrata {

class Workspace {
 public:
  static constexpr int kBuffers = 6;
  // At least `bytes` bytes, aligned to 64, whose content is unspecified; the same memory until a call asks for more.
  uint8_t* get(int buffer, int64_t bytes);

 private:
  AlignedBuffer data_[kBuffers];
  int64_t bytes_[kBuffers] = {};
};

// `count` workspaces of this call's own.
class Workspaces {
 public:
  explicit Workspaces(int count);
  ~Workspaces();
  Workspaces(const Workspaces&) = delete;
  Workspaces& operator=(const Workspaces&) = delete;

  int count() const { return static_cast<int>(all_.size()); }
  Workspace& operator[](int i) { return *all_[static_cast<size_t>(i)]; }
  int take();  // one that no other thread has; there is one if at most `count` threads take
  void give(int i);

 private:
  std::vector<std::unique_ptr<Workspace>> all_;
  std::mutex mutex_;
  std::vector<int> idle_;
};

}  // namespace bitstrata
