// Requantization of eight channels in each of its forms, see RequantForm. See ../common/pointwise.h for the unnamed
// namespace.
#pragma once

#include <immintrin.h>

#include "../common/pointwise.h"

namespace bitstrata {
namespace {

inline __m256i load(const int32_t* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }
inline __m256i load(const int64_t* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }

// Eight channels, from channel c on, in each of the forms of requantization.
struct EightWide {
  EightWide(const RequantArgs& a, int64_t c) : a(a), c(c), lo(_mm256_set1_epi64x(a.lo)), hi(_mm256_set1_epi64x(a.hi)) {}
  __m256i operator()(__m256i x) const {
    const __m256i even = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
    const __m256i low = _mm256_permutevar8x32_epi32(four(_mm256_castsi256_si128(x), c), even);
    const __m256i high = _mm256_permutevar8x32_epi32(four(_mm256_extracti128_si256(x, 1), c + 4), even);
    return _mm256_blend_epi32(low, high, 0xF0);
  }
  // AVX2 has no arithmetic right shift of 64 bits: with 2^63 added, the logical shift gives the quotient plus
  // 2^(63 - s), exactly.
  __m256i four(__m128i x, int64_t channel) const {
    const __m256i sign = _mm256_set1_epi64x(INT64_MIN);
    const __m256i product = _mm256_mul_epi32(_mm256_cvtepi32_epi64(x), load(a.multiplier + channel));
    const __m256i biased = _mm256_add_epi64(_mm256_add_epi64(product, load(a.bias + channel)), sign);
    const __m256i shift = load(a.shift + channel);
    __m256i y = _mm256_sub_epi64(_mm256_srlv_epi64(biased, shift), _mm256_srlv_epi64(sign, shift));
    y = _mm256_blendv_epi8(y, hi, _mm256_cmpgt_epi64(y, hi));
    return _mm256_blendv_epi8(y, lo, _mm256_cmpgt_epi64(lo, y));
  }
  const RequantArgs& a;
  int64_t c;
  __m256i lo, hi;
};

struct EightLow {
  EightLow(const RequantArgs& a, int64_t c)
      : from(load(a.from + c)),
        to(load(a.to + c)),
        factor(load(a.factor + c)),
        addend(load(a.addend + c)),
        places(load(a.places + c)) {}
  __m256i operator()(__m256i x) const {
    const __m256i inside = _mm256_min_epi32(_mm256_max_epi32(x, from), to);
    return _mm256_srav_epi32(_mm256_add_epi32(_mm256_mullo_epi32(inside, factor), addend), places);
  }
  __m256i from, to, factor, addend, places;
};

// Eight channels' int64, of lanes 0, 2, 4, 6 and of lanes 1, 3, 5, 7.
struct Parities {
  explicit Parities(const int64_t* from) {
    const __m256i low = load(from), high = load(from + 4);
    even = _mm256_permute4x64_epi64(_mm256_unpacklo_epi64(low, high), 0xD8);
    odd = _mm256_permute4x64_epi64(_mm256_unpackhi_epi64(low, high), 0xD8);
  }
  __m256i even, odd;
};

// x * factor + bias of eight channels in 64 bits.
struct Products {
  Products(const RequantArgs& a, int64_t c)
      : even(load(a.factor + c)), odd(_mm256_srli_epi64(even, 32)), bias(a.bias + c) {}
  __m256i of_even(__m256i x) const { return _mm256_add_epi64(_mm256_mul_epi32(x, even), bias.even); }
  __m256i of_odd(__m256i x) const {
    return _mm256_add_epi64(_mm256_mul_epi32(_mm256_srli_epi64(x, 32), odd), bias.odd);
  }
  __m256i even, odd;
  Parities bias;
};

struct EightHigh {
  EightHigh(const RequantArgs& a, int64_t c)
      : products(a, c), places(load(a.places + c)), lo(_mm256_set1_epi32(a.lo)), hi(_mm256_set1_epi32(a.hi)) {}
  __m256i operator()(__m256i x) const {
    const __m256i upper = _mm256_blend_epi32(_mm256_shuffle_epi32(products.of_even(x), 0xF5), products.of_odd(x), 0xAA);
    return _mm256_min_epi32(_mm256_max_epi32(_mm256_srav_epi32(upper, places), lo), hi);
  }
  Products products;
  __m256i places, lo, hi;
};

struct EightNarrow {
  EightNarrow(const RequantArgs& a, int64_t c)
      : products(a, c),
        shift(a.shift + c),
        odd_up(_mm256_sub_epi64(_mm256_set1_epi64x(32), shift.odd)),
        lo(_mm256_set1_epi32(a.lo)),
        hi(_mm256_set1_epi32(a.hi)) {}
  __m256i operator()(__m256i x) const {
    const __m256i y = _mm256_blend_epi32(_mm256_srlv_epi64(products.of_even(x), shift.even),
                                         _mm256_sllv_epi64(products.of_odd(x), odd_up), 0xAA);
    return _mm256_min_epi32(_mm256_max_epi32(y, lo), hi);
  }
  Products products;
  Parities shift;
  __m256i odd_up, lo, hi;  // odd_up: what brings an odd lane's result to the upper 32 bits
};

inline void store_eight(int32_t* to, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v); }

inline __m128i to_int16(__m256i v) {
  return _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
}
inline void store_eight(uint8_t* to, __m256i v) {
  const __m128i narrow = to_int16(v);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(narrow, narrow));
}
inline void store_eight(int8_t* to, __m256i v) {
  const __m128i narrow = to_int16(v);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(narrow, narrow));
}

}  // namespace
}  // namespace bitstrata
