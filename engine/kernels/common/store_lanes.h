// Eight lanes to memory, where not all of them may be results. See pointwise.h for the unnamed namespace.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace bitstrata {
namespace {

// Stores the first `real` lanes, at least one. Whole vectors by a plain store: AMD's processors take a dozen cycles for
// one under a mask.
inline void store_lanes(int32_t* to, int64_t real, __m256i x) {
  if (real >= 8) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x);
  const __m256i count = _mm256_set1_epi32(static_cast<int32_t>(real));
  _mm256_maskstore_epi32(to, _mm256_cmpgt_epi32(count, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)), x);
}

}  // namespace
}  // namespace bitstrata
