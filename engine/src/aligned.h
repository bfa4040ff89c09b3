// Memory aligned to a cache line.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace bitstrata {

constexpr int64_t kAlign = 64;
inline int64_t align_up(int64_t n) { return (n + kAlign - 1) / kAlign * kAlign; }

class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(int64_t bytes)
      : data_(static_cast<uint8_t*>(::operator new(static_cast<size_t>(align_up(bytes)), std::align_val_t{kAlign}))) {}
  uint8_t* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(uint8_t* p) const { ::operator delete(p, std::align_val_t{kAlign}); }
  };
  std::unique_ptr<uint8_t, Free> data_;
};

}  // namespace bitstrata
