// The end of a residual block in one pass. See ../common/pointwise.h for the unnamed namespace.
#pragma once

#include <immintrin.h>

#include "results.h"

namespace bitstrata {
namespace {

// The 64-bit results of lanes 0, 2, 4... or, of x moved down, 1, 3, 5...: eight channels of a vector of sixteen.
struct Half {
  __m512i multiplier, bias, shift;
};

inline __m512i requant_half(const Half& h, __m512i x, __m512i lo, __m512i hi) {
  const __m512i y = _mm512_srav_epi64(_mm512_add_epi64(_mm512_mul_epi32(x, h.multiplier), h.bias), h.shift);
  return _mm512_min_epi64(_mm512_max_epi64(y, lo), hi);
}

// The constants of sixteen channels.
struct Sixteen {
  Sixteen(const RequantArgs& a, int64_t c, __mmask16 mask) {
    split(a.multiplier + c, mask, &Half::multiplier);
    split(a.bias + c, mask, &Half::bias);
    split(a.shift + c, mask, &Half::shift);
    lo = _mm512_set1_epi64(a.lo);
    hi = _mm512_set1_epi64(a.hi);
  }
  __m512i operator()(__m512i x) const {
    const __m512i even = requant_half(half[0], x, lo, hi);
    const __m512i odd = requant_half(half[1], _mm512_srli_epi64(x, 32), lo, hi);
    return _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
  }
  void split(const int64_t* from, __mmask16 mask, __m512i Half::* member) {
    const __m512i low = _mm512_maskz_loadu_epi64(static_cast<__mmask8>(mask), from);
    const __m512i high = _mm512_maskz_loadu_epi64(static_cast<__mmask8>(mask >> 8), from + 8);
    const __m512i even = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14),
                  odd = _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15);
    half[0].*member = _mm512_permutex2var_epi64(low, even, high);
    half[1].*member = _mm512_permutex2var_epi64(low, odd, high);
  }
  Half half[2];
  __m512i lo, hi;
};

// The alignment of an addition: see Align in ../common/pointwise.h.
struct AlignSixteen {
  explicit AlignSixteen(int shift)
      : left(_mm_cvtsi32_si128(shift < 0 ? -shift : 0)),
        right(_mm_cvtsi32_si128(shift > 31 ? 31 : shift > 0 ? shift : 0)),
        half(_mm_cvtsi32_si128(shift > 31 ? 30 : shift > 1 ? shift - 1 : 0)),
        round(_mm512_set1_epi32(shift > 0 ? 1 : 0)),
        keep(_mm512_set1_epi32(shift > 31 ? 0 : -1)) {}
  BITSTRATA_INLINE __m512i operator()(__m512i v) const {
    const __m512i bit = _mm512_and_si512(_mm512_sra_epi32(v, half), round);
    return _mm512_and_si512(_mm512_sll_epi32(_mm512_add_epi32(_mm512_sra_epi32(v, right), bit), left), keep);
  }
  __m128i left, right, half;
  __m512i round, keep;
};
struct AsItIs {
  BITSTRATA_INLINE __m512i operator()(__m512i v) const { return v; }
};

// Sixteen channels, from c on, of all pixels.
template <typename AlignA, typename AlignB>
void block_end_sixteen(const BlockEnd& e, const AlignA& align_a, const AlignB& align_b, int64_t c, const int32_t* x,
                       const int32_t* other, int32_t* sum, uint8_t* codes, int64_t pixels) {
  const int64_t channels = e.rescale->channels;
  const __mmask16 mask = channels - c < 16 ? static_cast<__mmask16>((1u << (channels - c)) - 1) : 0xFFFF;
  const Sixteen rescale(*e.rescale, c, mask);
  const SixteenShort requant(*e.codes, c, mask);
  const __m512i lo = _mm512_set1_epi32(e.lo), hi = _mm512_set1_epi32(e.hi);
  for (int64_t i = c; i < pixels * channels; i += channels) {
    const __m512i a = align_a(rescale(_mm512_maskz_loadu_epi32(mask, x + i)));
    const __m512i b = align_b(_mm512_maskz_loadu_epi32(mask, other + i));
    const __m512i y = _mm512_min_epi32(_mm512_max_epi32(_mm512_add_epi32(a, b), lo), hi);
    _mm512_mask_storeu_epi32(sum + i, mask, y);
    _mm_mask_storeu_epi8(codes + i, mask, _mm512_cvtepi32_epi8(requant(y)));
  }
}

void block_end(const BlockEnd& e, const int32_t* x, const int32_t* other, int32_t* sum, uint8_t* codes,
               int64_t pixels) {
  const AlignSixteen a(e.shift_x), b(e.shift_other);
  constexpr AsItIs same;
  constexpr int64_t kTogether = 64;  // pixels that stay in the cache
  const int64_t channels = e.rescale->channels;
  for (int64_t p = 0; p < pixels; p += kTogether) {
    const int64_t count = pixels - p < kTogether ? pixels - p : kTogether, at = p * channels;
    const auto with = [&](const auto& align_a, const auto& align_b) {
      for (int64_t c = 0; c < channels; c += 16)
        block_end_sixteen(e, align_a, align_b, c, x + at, other + at, sum + at, codes + at, count);
    };
    if (e.shift_x == 0 && e.shift_other == 0)
      with(same, same);
    else if (e.shift_x == 0)
      with(same, b);
    else if (e.shift_other == 0)
      with(a, same);
    else
      with(a, b);
  }
}

}  // namespace
}  // namespace bitstrata
