// Memory aligned to a cache line.
#pragma once

#include <cstdint>

#include "bitstrata/guard.h"

namespace bitstrata {

constexpr int64_t kAlign = 64;
inline int64_t align_up(int64_t n) { return (n + kAlign - 1) / kAlign * kAlign; }

class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(int64_t bytes) : data_(allocate(align_up(bytes), kAlign)) {}
  uint8_t* data() const { return data_.get(); }

 private:
  Memory data_;
};

}  // namespace bitstrata
