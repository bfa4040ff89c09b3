// Sixty-four codes, a byte each, and the four vectors of numbers that they come from or become.
//
// Training kernels of this folder walk a tensor in blocks of 64 elements. A block's place in the period stays the same
// while rows of a period pass, so that what belongs to channels stays in registers.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace bitstrata {
namespace {

constexpr int64_t kBlock = 64;

// Elements [0, valid) of a block, valid <= 64.
inline __mmask64 first_of(int64_t valid) { return valid >= kBlock ? ~uint64_t{0} : (uint64_t{1} << valid) - 1; }
inline __mmask16 quarter(__mmask64 mask, int q) { return static_cast<__mmask16>(mask >> (16 * q)); }

struct Floats {
  __m512 v[4];
};
struct Ints {
  __m512i v[4];
};

inline Floats all(float x) {
  const __m512 v = _mm512_set1_ps(x);
  return {{v, v, v, v}};
}

inline Floats load_floats(const float* from, __mmask64 mask) {
  Floats f;
  for (int q = 0; q < 4; ++q) f.v[q] = _mm512_maskz_loadu_ps(quarter(mask, q), from + 16 * q);
  return f;
}
inline Floats load_floats(const int32_t* from, __mmask64 mask) {
  Floats f;
  for (int q = 0; q < 4; ++q) f.v[q] = _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(quarter(mask, q), from + 16 * q));
  return f;
}
inline __m512i load_bytes(const void* from, __mmask64 mask) { return _mm512_maskz_loadu_epi8(mask, from); }
inline void store_bytes(void* to, __mmask64 mask, __m512i v) { _mm512_mask_storeu_epi8(to, mask, v); }

inline Floats load_floats(const int8_t* from, __mmask64 mask) {
  Floats f;
  for (int q = 0; q < 4; ++q)
    f.v[q] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(quarter(mask, q), from + 16 * q)));
  return f;
}

// Packing instructions work in each 128 bits; this puts their results into order.
inline __m512i in_order(__m512i packed) {
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), packed);
}
// Saturated to -128..127.
inline __m512i to_bytes(const Ints& x) {
  return in_order(_mm512_packs_epi16(_mm512_packs_epi32(x.v[0], x.v[1]), _mm512_packs_epi32(x.v[2], x.v[3])));
}

// To nearest, ties to even, saturated to -128..127; |x| < 2^31.
inline __m512i rounded(const Floats& x) {
  return to_bytes({{_mm512_cvtps_epi32(x.v[0]), _mm512_cvtps_epi32(x.v[1]), _mm512_cvtps_epi32(x.v[2]),
                    _mm512_cvtps_epi32(x.v[3])}});
}

constexpr float kOne = 65536.0f, kLargestFactor = 0x1p100f;  // so that their product is finite

// Rounded up where the random bits, of 64 elements, say so: see Noise. x: in units of 1 / kOne, to which numbers scale
// without loss. The fixed-point numbers have the code, plus 128, in their upper halves.
inline __m512i rounded(const Floats& x, const uint16_t* bits) {
  const __m512 offset = _mm512_set1_ps(128.0f * kOne);
  Ints fixed;
  for (int q = 0; q < 4; ++q) {
    const __m512i random = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bits + 16 * q)));
    const __m512i z = _mm512_cvttps_epi32(_mm512_add_ps(x.v[q], offset));
    fixed.v[q] = _mm512_srai_epi32(_mm512_add_epi32(z, random), 16);
  }
  const __m512i packed =
      _mm512_packus_epi16(_mm512_packs_epi32(fixed.v[0], fixed.v[1]), _mm512_packs_epi32(fixed.v[2], fixed.v[3]));
  return _mm512_xor_si512(in_order(packed), _mm512_set1_epi8(-128));
}

inline __m512i clamped(__m512i codes, __m512i lo, __m512i hi) {
  return _mm512_max_epi8(_mm512_min_epi8(codes, hi), lo);
}

// Sums of a block's bytes over rows: 16-bit numbers, which 256 rows cannot overflow.
struct ByteSums {
  __m512i low = _mm512_setzero_si512(), high = _mm512_setzero_si512();
  void add(__m512i codes) {
    low = _mm512_add_epi16(low, _mm512_cvtepi8_epi16(_mm512_castsi512_si256(codes)));
    high = _mm512_add_epi16(high, _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(codes, 1)));
  }
  void flush(int64_t* to, int64_t valid) const {
    int16_t part[kBlock];
    _mm512_storeu_si512(part, low);
    _mm512_storeu_si512(part + 32, high);
    for (int64_t j = 0; j < valid; ++j) to[j] += part[j];
  }
};

// Numbers of rows in which a block's elements satisfy a condition: 8 bits, which 255 rows cannot overflow.
struct Counts {
  __m512i v = _mm512_setzero_si512();
  void add(__mmask64 mask) { v = _mm512_mask_add_epi8(v, mask, v, _mm512_set1_epi8(1)); }
  void flush(int64_t* to, int64_t valid) const {
    uint8_t part[kBlock];
    _mm512_storeu_si512(part, v);
    for (int64_t j = 0; j < valid; ++j) to[j] += part[j];
  }
};

// Calls stage(from, to) for stretches of whole periods, so many elements at most or else one period.
template <typename Stage>
inline void each_part(int64_t count, int64_t period, int64_t elements, const Stage& stage) {
  constexpr int64_t kMostRows = 128;  // whose sums the small integers above hold
  const int64_t fit = elements / period, rows = fit < 1 ? 1 : fit < kMostRows ? fit : kMostRows;
  for (int64_t from = 0; from < count; from += rows * period)
    stage(from, from + rows * period < count ? from + rows * period : count);
}

// Calls body(channel, valid, first, end): columns [channel, channel + valid) of a period, valid <= 64, at elements
// first, first + period, ... before end. The last period may be a part of one.
template <typename Body>
inline void each_column(int64_t from, int64_t to, int64_t period, const Body& body) {
  for (int64_t c = 0; c < period && from + c < to; c += kBlock) {
    const int64_t wide = period - c < kBlock ? period - c : kBlock, first = from + c;
    const int64_t rows = to - first < wide ? 0 : (to - first - wide) / period + 1, next = first + rows * period;
    if (rows > 0) body(c, wide, first, next);
    if (next < to) body(c, to - next < wide ? to - next : wide, next, next + 1);
  }
}

}  // namespace
}  // namespace bitstrata
