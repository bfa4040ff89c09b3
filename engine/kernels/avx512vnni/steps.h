// The products of blocks: some output pixels by some vectors of sixteen output channels, four bytes of each at a step.
// See ../common/pointwise.h for the unnamed namespace.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "../common/unroll.h"

namespace bitstrata {
namespace {

inline __m512i broadcast(const uint8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}

// Hides from the compiler where an address comes from. It would else keep parts of the sum that outlive the inner loop
// in vector registers, and move one to a general register for every load.
inline const uint8_t* in_register(const uint8_t* address) {
  __asm__("" : "+r"(address));
  return address;
}

// Adds the products of kP runs of `bytes` bytes, which start at x[i] + offset, and kV vectors of weights to the sums;
// moves to the weights after them. On the way it has a vector a step of what lies `ahead` fetched into the second-level
// cache.
template <int kP, int kV>
BITSTRATA_INLINE void multiply_run(const uint8_t* const* x, int64_t offset, int64_t bytes, const __m512i*& w,
                                   const __m512i*& ahead, __m512i (&sum)[kP][kV]) {
  const uint8_t* at[kP];
  each<kP>([&](auto i) { at[i] = in_register(x[i] + offset); });
  for (int64_t b = 0; b < bytes; b += 4) {
    __m512i weights[kV];
    _mm_prefetch(reinterpret_cast<const char*>(ahead++), _MM_HINT_T1);
    each<kV>([&](auto j) { weights[j] = _mm512_load_si512(w + j); });
    each<kP>([&](auto i) {
      const __m512i a = broadcast(at[i] + b);
      each<kV>([&](auto j) { sum[i][j] = _mm512_dpbusd_epi32(sum[i][j], a, weights[j]); });
    });
    w += kV;
  }
}

}  // namespace
}  // namespace bitstrata
