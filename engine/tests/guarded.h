// Test buffers that touch an unmapped page: reading or writing one byte too far ends the process.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace bitstrata::test {

enum class Edge { end, begin };  // the side that touches the page

class Guarded {
 public:
  // At Edge::end the buffer ends within `align` bytes of the page.
  Guarded(int64_t bytes, Edge edge, int64_t align = 1) {
    const int64_t page = sysconf(_SC_PAGESIZE), body = (bytes + page - 1) / page * page;
    mapped_ = body + 2 * page;
    void* p = mmap(nullptr, static_cast<size_t>(mapped_), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) std::abort();
    base_ = static_cast<uint8_t*>(p);
    if (body > 0 && mprotect(base_ + page, static_cast<size_t>(body), PROT_READ | PROT_WRITE) != 0) std::abort();
    data_ = base_ + page + (edge == Edge::end ? (body - bytes) / align * align : 0);
    std::memset(data_, 0xA5, static_cast<size_t>(bytes));
  }
  ~Guarded() { munmap(base_, static_cast<size_t>(mapped_)); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  template <typename T = void>
  T* get() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  int64_t mapped_;
  uint8_t* base_;
  uint8_t* data_;
};

// Numbers that repeat from run to run.
class Random {
 public:
  // saturate: every number is the upper end point.
  explicit Random(uint64_t seed, bool saturate = false) : state_(seed * 2654435761u + 1), saturate_(saturate) {}
  uint64_t bits() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_ * 0x2545F4914F6CDD1Dull;
  }
  // In lo..hi; an end point every third time, where kernels overflow and saturate.
  int64_t in(int64_t lo, int64_t hi) {
    if (saturate_) return hi;
    const uint64_t r = bits() >> 8;
    if (r % 3 == 0) return r & 16 ? lo : hi;
    return lo + static_cast<int64_t>((bits() >> 8) % (static_cast<uint64_t>(hi - lo) + 1));
  }

 private:
  uint64_t state_;
  bool saturate_;
};

inline int failures = 0;

inline void expect_equal(const char* isa, const char* what, const char* where, int64_t index, int64_t got,
                         int64_t want) {
  if (got == want) return;
  if (++failures <= 20)
    std::fprintf(stderr, "%s %s %s: element %lld is %lld, expected %lld\n", isa, what, where,
                 static_cast<long long>(index), static_cast<long long>(got), static_cast<long long>(want));
}

}  // namespace bitstrata::test
