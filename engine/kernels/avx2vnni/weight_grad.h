// The weight gradient by products of u8 and s8 in fours on 256 bits. Signed codes get an offset of 128 that makes them
// unsigned. See ../common/pointwise.h for the unnamed namespace.
#pragma once

#include <immintrin.h>

#include "../common/weight_grad_lanes.h"
#include "../common/weight_grad_plain.h"
#include "../common/weight_grad_winograd.h"
#include "dot.h"

namespace bitstrata {
namespace {

// Four outputs and three vectors: their sums, the vectors and one broadcast are 16 registers.
struct Vnni256 {
  using Vector = __m256i;
  static constexpr int kLanes = 8, kStep = 4, kOuts = 4, kVectors = 3, kOffset = 128;
  static constexpr DType kOffsetOf = DType::s8;

  static Vector zero() { return _mm256_setzero_si256(); }
  static Vector load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store(int32_t* p, Vector v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static Vector load_packed(const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); }
  static Vector broadcast(const void* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
  }
  static Vector multiply(Vector sum, Vector codes, Vector gradient) { return dot(sum, codes, gradient); }

  static __m128i load8(const uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }
  static __m128i load4(const uint8_t* p) {
    int32_t bytes;
    std::memcpy(&bytes, p, 4);
    return _mm_cvtsi32_si128(bytes);
  }

  // Eight channels at positions a and b, c and d: each channel's four, with `offset` added to all.
  static void store_fours(__m128i ab, __m128i cd, int8_t offset, uint8_t* to) {
    const __m128i by = _mm_set1_epi8(offset);
    __m128i* out = reinterpret_cast<__m128i*>(to);
    _mm_store_si128(out, _mm_xor_si128(_mm_unpacklo_epi16(ab, cd), by));
    _mm_store_si128(out + 1, _mm_xor_si128(_mm_unpackhi_epi16(ab, cd), by));
  }
  static void pack_codes(const uint8_t* from, int64_t pitch, bool is_signed, uint8_t* to) {
    store_fours(_mm_unpacklo_epi8(load8(from), load8(from + pitch)),
                _mm_unpacklo_epi8(load8(from + 2 * pitch), load8(from + 3 * pitch)), is_signed ? -128 : 0, to);
  }
  static void pack_winograd(const uint8_t* from, int64_t pitch, bool, uint8_t* to, int64_t apart) {
    __m128i d[10];  // columns
    each<10>([&](auto i) { d[i] = load8(from + i * pitch); });
    __m128i even[4], odd[4];  // of two tiles one column each, successive ones
    each<4>([&](auto i) {
      even[i] = _mm_unpacklo_epi8(d[2 * i], d[2 * i + 2]);
      odd[i] = _mm_unpacklo_epi8(d[2 * i + 1], d[2 * i + 3]);
    });
    const __m128i d0[2] = {even[0], even[2]}, d1[2] = {odd[0], odd[2]}, d2[2] = {even[1], even[3]},
                  d3[2] = {odd[1], odd[3]};
    store_fours(_mm_sub_epi8(d0[0], d2[0]), _mm_sub_epi8(d0[1], d2[1]), -128, to);
    store_fours(_mm_add_epi8(d1[0], d2[0]), _mm_add_epi8(d1[1], d2[1]), -128, to + apart);
    store_fours(_mm_sub_epi8(d2[0], d1[0]), _mm_sub_epi8(d2[1], d1[1]), -128, to + 2 * apart);
    store_fours(_mm_sub_epi8(d3[0], d1[0]), _mm_sub_epi8(d3[1], d1[1]), -128, to + 3 * apart);
  }
  static void store_gradient(__m128i a, __m128i b, __m128i c, __m128i d, uint8_t* to) {
    const __m128i ab = _mm_unpacklo_epi8(a, b), cd = _mm_unpacklo_epi8(c, d);
    _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi16(ab, cd));
  }
  static void pack_gradient(const uint8_t* from, int64_t pitch, uint8_t* to) {
    store_gradient(load4(from), load4(from + pitch), load4(from + 2 * pitch), load4(from + 3 * pitch), to);
  }
  static void pack_gradient_winograd(const uint8_t* from, int64_t pitch, uint8_t* to, int64_t apart) {
    pack_winograd_bytes(load4, store_gradient, from, pitch, to, apart);
  }
  // Two packed gradients at a time, whose sums are added in the end.
  static void add_outs(const uint8_t* packed, int64_t count, int32_t* sums) {
    const __m256i ones = _mm256_set1_epi8(1);
    __m256i sum = _mm256_setzero_si256();
    int64_t i = 0;
    for (; i + 2 <= count; i += 2)
      sum = dot(sum, ones, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed + i * 16)));
    if (i < count) {
      const __m128i last = _mm_load_si128(reinterpret_cast<const __m128i*>(packed + i * 16));
      sum = dot(sum, ones, _mm256_inserti128_si256(_mm256_setzero_si256(), last, 0));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(sums),
                     _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1)));
  }
};

constexpr WeightGradKernel kWeightGrad = LanesWeightGrad<Vnni256>::kernel("avx2vnni");
constexpr WeightGradKernel kWinogradWeightGrad =
    LanesWeightGrad<Vnni256, int8_t, int32_t, true>::kernel("avx2vnni-winograd");
constexpr WeightGradKernel kDepthwiseWeightGrad = PlainWeightGrad::kernel("avx2vnni-depthwise");

bool winograd_weight_grad_pays(const ConvShape& s) { return weight_grad_winograd_pays<Vnni256>(s, 63); }

}  // namespace
}  // namespace bitstrata
