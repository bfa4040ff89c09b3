// The AVX2 row of the dispatch table, and its requantization. The other kernels are the portable ones, vectorized by
// the compiler with this file's flags.
#include "avx2.h"

#include <immintrin.h>

#include "../common/pointwise.h"

namespace bitstrata {

extern const Training kAvx2Training;
extern const ProductKernels kAvx2Products;
extern const Limits kAvx2Limits;
namespace {

inline __m256i load(const int32_t* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }
inline __m256i load(const int64_t* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }

// Four channels c.. of x, in int64. AVX2 has no arithmetic right shift of 64 bits: with 2^63 added, the logical shift
// gives the quotient plus 2^(63 - s), exactly.
inline __m256i requant_four(const RequantArgs& a, int64_t c, const int32_t* x, __m256i lo, __m256i hi) {
  const __m256i sign = _mm256_set1_epi64x(INT64_MIN);
  const __m256i wide = _mm256_cvtepi32_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  const __m256i product = _mm256_mul_epi32(wide, load(a.multiplier + c));
  const __m256i biased = _mm256_add_epi64(_mm256_add_epi64(product, load(a.bias + c)), sign);
  const __m256i shift = load(a.shift + c);
  __m256i y = _mm256_sub_epi64(_mm256_srlv_epi64(biased, shift), _mm256_srlv_epi64(sign, shift));
  y = _mm256_blendv_epi8(y, hi, _mm256_cmpgt_epi64(y, hi));
  return _mm256_blendv_epi8(y, lo, _mm256_cmpgt_epi64(lo, y));
}

// Eight channels c.. of x in 32 bits, where that was proved to give the same integers.
inline __m256i requant_eight_short(const RequantArgs& a, int64_t c, const int32_t* x) {
  const __m256i inside = _mm256_min_epi32(_mm256_max_epi32(load(x), load(a.from + c)), load(a.to + c));
  const __m256i y = _mm256_add_epi32(_mm256_mullo_epi32(inside, load(a.factor + c)), load(a.addend + c));
  return _mm256_srav_epi32(y, load(a.places + c));
}

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

// From i32. Eight channels at a time; the clamped results fit the output's type, so that packing keeps them.
template <typename Out>
void requant_i32(const RequantArgs& a, const void* x, void* out, int64_t pixels) {
  const __m256i lo = _mm256_set1_epi64x(a.lo), hi = _mm256_set1_epi64x(a.hi);
  const __m256i even = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
  const int32_t* in = static_cast<const int32_t*>(x);
  Out* to = static_cast<Out*>(out);
  for (int64_t p = 0; p < pixels; ++p, in += a.channels, to += a.channels) {
    int64_t c = 0;
    for (; c + 8 <= a.channels; c += 8) {
      if (a.in_short != nullptr && a.in_short[c / 16] != 0) {
        store_eight(to + c, requant_eight_short(a, c, in + c));
        continue;
      }
      const __m256i low = _mm256_permutevar8x32_epi32(requant_four(a, c, in + c, lo, hi), even);
      const __m256i high = _mm256_permutevar8x32_epi32(requant_four(a, c + 4, in + c + 4, lo, hi), even);
      store_eight(to + c, _mm256_blend_epi32(low, high, 0xF0));
    }
    for (; c < a.channels; ++c) to[c] = static_cast<Out>(requant_one(a, c, in[c]));
  }
}

const ConvKernel* pick_conv(const ConvShape& s) {
  if (s.groups > 1 && s.group_in() == 1 && s.group_out() == 1) return &kAvx2Depthwise;
  const bool narrow = avx2_narrow_fits(s);
  if (avx2_table_pays(s, narrow ? 0.65 : 1.3, 6)) return &kAvx2Table;
  return narrow ? &kAvx2Narrow : &kAvx2Wide;
}

const char* lacks() {
  if (!__builtin_cpu_supports("avx2")) return "processor flag avx2";
  return __builtin_cpu_supports("bmi2") ? nullptr : "processor flag bmi2";
}

bool supported() { return lacks() == nullptr; }

}  // namespace

extern const Kernels kAvx2Kernels;
const Kernels kAvx2Kernels = {
    "avx2",
    supported,
    pick_conv,
    {{requant<uint8_t, uint8_t>, requant<uint8_t, int8_t>, requant<uint8_t, int32_t>},
     {requant<int8_t, uint8_t>, requant<int8_t, int8_t>, requant<int8_t, int32_t>},
     {requant_i32<uint8_t>, requant_i32<int8_t>, requant_i32<int32_t>}},
    add,
    {clip<uint8_t>, clip<int8_t>, clip<int32_t>},
    {max_pool<uint8_t>, max_pool<int8_t>, max_pool<int32_t>},
    {sum_pool<uint8_t, int32_t>, sum_pool<int8_t, int32_t>, sum_pool<int32_t, int32_t>},
    {sum_pool<uint8_t, uint8_t>, sum_pool<int8_t, int8_t>, nullptr},
    true,
    &kAvx2Training,
    &kAvx2Products,
    lacks,
    [] { return &kAvx2Limits; },
};

}  // namespace bitstrata
