// Sums, bounds and counts of the codes of one row. Rows are short, so that what is done once a row counts.
//
// Like everything in this folder this is compiled once for each instruction set, in an unnamed namespace.
#pragma once

#include <cstdint>

#ifdef __AVX512BW__
#include <immintrin.h>
#endif

namespace bitstrata {
namespace {

// Sums of value(j) for j below count. |value| <= kLargest: int32 over pieces in which it cannot overflow.
template <int64_t kLargest, typename Value>
inline int64_t layer_total(int64_t count, const Value& value) {
  constexpr int64_t kPiece = 0x7FFFFFFF / kLargest;
  int64_t total = 0;
  for (int64_t at = 0; at < count; at += kPiece) {
    const int64_t end = count < at + kPiece ? count : at + kPiece;
    int32_t part = 0;
    for (int64_t j = at; j < end; ++j) part += value(j);
    total += part;
  }
  return total;
}

struct RowBounds {
  int8_t least, most;
  int64_t sum;
};

struct RowSides {
  int64_t below, above, sum_above;
};

#ifdef __AVX512BW__

// Calls body(mask, codes) for 64 codes at a time, 0 where the mask is.
template <typename Body>
inline void each_bytes(const int8_t* x, int64_t count, const Body& body) {
  int64_t j = 0;
  for (; j + 64 <= count; j += 64) body(~__mmask64{0}, _mm512_loadu_si512(x + j));
  if (j < count) {
    const __mmask64 mask = (~__mmask64{0}) >> (64 - (count - j));
    body(mask, _mm512_maskz_loadu_epi8(mask, x + j));
  }
}

inline int64_t count_of(__mmask64 mask) { return __builtin_popcountll(mask); }

// The least of unsigned bytes.
inline int least_byte(__m512i v) {
  const __m256i four = _mm256_min_epu8(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
  const __m128i two = _mm_min_epu8(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
  const __m128i one = _mm_min_epu8(two, _mm_srli_epi16(two, 8));
  return _mm_extract_epi8(_mm_minpos_epu16(one), 0);
}

inline RowBounds row_bounds(const int8_t* x, int64_t count) {
  const __m512i flip = _mm512_set1_epi8(-128), all = _mm512_set1_epi8(-1);  // codes + 128 are unsigned
  __m512i sum = _mm512_setzero_si512(), low = all, high = all;              // high: of the complements
  each_bytes(x, count, [&](__mmask64 mask, __m512i codes) {
    const __m512i moved = _mm512_xor_si512(codes, flip);
    sum = _mm512_add_epi64(sum, _mm512_sad_epu8(_mm512_maskz_mov_epi8(mask, moved), _mm512_setzero_si512()));
    low = _mm512_mask_min_epu8(low, mask, low, moved);
    high = _mm512_mask_min_epu8(high, mask, high, _mm512_xor_si512(moved, all));
  });
  return {static_cast<int8_t>(least_byte(low) - 128), static_cast<int8_t>(127 - least_byte(high)),
          _mm512_reduce_add_epi64(sum) - 128 * count};
}

inline RowSides row_sides(const int8_t* x, int64_t count, int8_t below, int8_t up_to) {
  const __m512i flip = _mm512_set1_epi8(-128), under = _mm512_set1_epi8(below), over = _mm512_set1_epi8(up_to);
  __m512i sum = _mm512_setzero_si512();
  RowSides sides{0, 0, 0};
  each_bytes(x, count, [&](__mmask64 mask, __m512i codes) {
    const __mmask64 above = _mm512_mask_cmpgt_epi8_mask(mask, codes, over);
    sides.below += count_of(_mm512_mask_cmple_epi8_mask(mask, codes, under));
    sides.above += count_of(above);
    const __m512i moved = _mm512_maskz_mov_epi8(above, _mm512_xor_si512(codes, flip));
    sum = _mm512_add_epi64(sum, _mm512_sad_epu8(moved, _mm512_setzero_si512()));
  });
  sides.sum_above = _mm512_reduce_add_epi64(sum) - 128 * sides.above;
  return sides;
}

inline int64_t row_signs(const int8_t* x, int64_t count) {
  int64_t sum = 0;
  each_bytes(x, count, [&](__mmask64, __m512i codes) {
    sum += count_of(_mm512_cmpgt_epi8_mask(codes, _mm512_setzero_si512())) - count_of(_mm512_movepi8_mask(codes));
  });
  return sum;
}

#else

inline RowBounds row_bounds(const int8_t* x, int64_t count) {
  int8_t low = 127, high = -128;
  for (int64_t j = 0; j < count; ++j) low = x[j] < low ? x[j] : low;
  for (int64_t j = 0; j < count; ++j) high = x[j] > high ? x[j] : high;
  return {low, high, layer_total<128>(count, [=](int64_t j) { return x[j]; })};
}

inline RowSides row_sides(const int8_t* x, int64_t count, int8_t below, int8_t up_to) {
  return {layer_total<1>(count, [=](int64_t j) { return static_cast<int8_t>(x[j] <= below); }),
          layer_total<1>(count, [=](int64_t j) { return static_cast<int8_t>(x[j] > up_to); }),
          layer_total<128>(count, [=](int64_t j) { return static_cast<int8_t>(x[j] > up_to ? x[j] : int8_t{0}); })};
}

inline int64_t row_signs(const int8_t* x, int64_t count) {
  return layer_total<1>(count, [=](int64_t j) { return static_cast<int8_t>((x[j] > 0) - (x[j] < 0)); });
}

#endif

struct RowProducts {
  int64_t p, ph;
};

// Sums of p = g * weight and of p * h.
inline RowProducts row_products(const int8_t* g, const int8_t* h, const int8_t* weight, int64_t count) {
  constexpr int64_t kPiece = 1024;  // so many products of three codes fit
  RowProducts total{0, 0};
  for (int64_t at = 0; at < count; at += kPiece) {
    const int64_t end = count < at + kPiece ? count : at + kPiece;
    int32_t sum_p = 0, sum_ph = 0;
    for (int64_t j = at; j < end; ++j) {
      const int16_t p = static_cast<int16_t>(g[j] * weight[j]), with = h[j];
      sum_p += p;
      sum_ph += p * with;
    }
    total.p += sum_p;
    total.ph += sum_ph;
  }
  return total;
}

}  // namespace
}  // namespace bitstrata
