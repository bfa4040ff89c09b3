// The products of blocks: some output pixels by some vectors of eight output channels, four bytes of each at a step.
// See
// ../common/pointwise.h for the unnamed namespace.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace bitstrata {
namespace {

inline __m256i broadcast(const uint8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

// Weights that are used after those at hand: fetched into the second-level cache little by little, as they would else
// be waited for where there are many.
struct Ahead {
  const char* next;
  int64_t blocks;  // that share the work
  // After so many steps.
  void fetch(int64_t steps) {
    for (; steps > 0; steps -= blocks, next += 64) _mm_prefetch(next, _MM_HINT_T1);
  }
};

// `count` steps: sum[i][j] += the products of pixel i and vector j, in int16 pairs (narrow) or int32 (wide).
template <bool kWide, int kP, int kVectors>
inline void multiply(const uint8_t* const* x, const __m256i* w, int64_t count, __m256i (&sum)[kP][kVectors]) {
  for (int64_t s = 0; s < count; ++s, w += kVectors) {
    for (int i = 0; i < kP; ++i) {
      const __m256i a = broadcast(x[i] + 4 * s);
      for (int j = 0; j < kVectors; ++j) {
        const __m256i b = _mm256_load_si256(w + j);
        sum[i][j] = kWide ? _mm256_add_epi32(sum[i][j], _mm256_madd_epi16(a, b))
                          : _mm256_add_epi16(sum[i][j], _mm256_maddubs_epi16(a, b));
      }
    }
  }
}

}  // namespace
}  // namespace bitstrata
