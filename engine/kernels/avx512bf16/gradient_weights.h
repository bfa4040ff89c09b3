// Integer weights as pairs of bfloat16, which hold them exactly.
#pragma once

#include <immintrin.h>

#include "gradient_plan.h"

namespace bitstrata {
namespace {

// Sixteen integers as floats.
__m512i sixteen(const int8_t* high, const int8_t* low, __mmask16 mask) {
  __m512i x = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, high));
  if (low != nullptr)
    x = _mm512_add_epi32(_mm512_slli_epi32(x, 1), _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, low)));
  return _mm512_castps_si512(_mm512_cvtepi32_ps(x));
}

// `count` integers from element `even` on, and from `odd` on, as pairs of bfloat16 in a word. odd < 0: zeros.
void pair_words(const int8_t* high, const int8_t* low, int64_t even, int64_t odd, int64_t count, uint32_t* to) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = static_cast<__mmask16>((1u << smaller(16, count - i)) - 1);
    const auto at = [&](int64_t first) {
      return sixteen(high + first + i, low == nullptr ? low : low + first + i, mask);
    };
    const __m512i lower = _mm512_srli_epi32(at(even), 16);
    _mm512_mask_storeu_epi32(to + i, mask, odd < 0 ? lower : _mm512_or_si512(lower, at(odd)));
  }
}

}  // namespace
}  // namespace bitstrata
