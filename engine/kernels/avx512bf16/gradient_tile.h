// Tiles of pixels whose sums stay in registers: for each pair of channels of g that a pixel holds, one broadcast, times
// the weights of vectors of input channels.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "../common/unroll.h"

// Bodies of unrolled loops, too: inlined late, they leave arrays of vectors in memory.
#if defined(__GNUC__)
#define BITSTRATA_BODY __attribute__((always_inline))
#else
#define BITSTRATA_BODY
#endif

namespace bitstrata {
namespace {

// Vectors of sums of kLanes input channels. Fewer than sixteen leave room for several pairs of g's channels at once,
// whose sums are added up at the end.
template <int kLanes>
struct Lanes;

template <>
struct Lanes<16> {
  static BITSTRATA_INLINE __m512i spread(const uint8_t* pairs) {
    int32_t one;
    std::memcpy(&one, pairs, 4);
    return _mm512_set1_epi32(one);
  }
  static BITSTRATA_INLINE __m512 total(__m512 sums) { return sums; }
};
template <>
struct Lanes<8> {
  static BITSTRATA_INLINE __m512i spread(const uint8_t* pairs) {
    int64_t two;
    std::memcpy(&two, pairs, 8);
    return _mm512_set1_epi64(two);
  }
  static BITSTRATA_INLINE __m512 total(__m512 sums) {  // lane 2 c + i: pair i
    const __m512i order = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    const __m512 apart = _mm512_permutexvar_ps(order, sums);
    return _mm512_add_ps(apart, _mm512_shuffle_f32x4(apart, apart, 0xEE));
  }
};
template <>
struct Lanes<4> {
  static BITSTRATA_INLINE __m512i spread(const uint8_t* pairs) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(pairs)));
  }
  static BITSTRATA_INLINE __m512 total(__m512 sums) {  // lane 4 c + i: pair i
    const __m512 halves = _mm512_add_ps(sums, _mm512_permute_ps(sums, 0xB1));
    const __m512 all = _mm512_add_ps(halves, _mm512_permute_ps(halves, 0x4E));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
    return _mm512_permutexvar_ps(order, all);
  }
};

// Where a tap finds the first pixel's first block, and its weights.
struct Tap {
  const uint8_t *g, *weights;
};

struct Tile {
  const Tap* taps;
  int64_t tap_count, blocks, block_bytes;
  int64_t skip;       // bytes that all taps' g begins later
  uint16_t* out;      // of the first pixel
  int64_t out_pitch;  // elements from one pixel to the next
  uint32_t mask;      // of the last vector's lanes
};

template <int kPixels, int kVectors>
BITSTRATA_INLINE void clear(__m512 (&sums)[kPixels][kVectors]) {
  each<kPixels>(
      [&](auto p) BITSTRATA_BODY { each<kVectors>([&](auto v) BITSTRATA_BODY { sums[p][v] = _mm512_setzero_ps(); }); });
}

// One block of channels of g: kPairs pairs of each pixel.
template <int kLanes, int kPairs, int kPixels, int kVectors>
BITSTRATA_INLINE void add_block(const uint8_t* g, const uint8_t* w, __m512 (&sums)[kPixels][kVectors]) {
  constexpr int kTogether = 16 / kLanes;
  each<kPairs / kTogether>([&](auto step) BITSTRATA_BODY {
    __m512bh weights[kVectors];
    each<kVectors>([&](auto v) BITSTRATA_BODY {
      weights[v] = reinterpret_cast<__m512bh>(_mm512_load_si512(w + (step * kVectors + v) * 64));
    });
    each<kPixels>([&](auto p) BITSTRATA_BODY {
      const __m512bh x = reinterpret_cast<__m512bh>(Lanes<kLanes>::spread(g + (p * kPairs + step * kTogether) * 4));
      each<kVectors>([&](auto v) BITSTRATA_BODY { sums[p][v] = _mm512_dpbf16_ps(sums[p][v], weights[v], x); });
    });
  });
}

// The first lanes of a vector, one to four.
BITSTRATA_INLINE void store_few(uint16_t* to, __m128i x, uint32_t mask) {
  const int64_t lanes = _mm_cvtsi128_si64(x), third = lanes >> 32;
  if (mask == 0xF) {
    std::memcpy(to, &lanes, 8);
    return;
  }
  std::memcpy(to, &lanes, mask == 1 ? 2 : 4);
  if (mask == 7) std::memcpy(to + 2, &third, 2);
}

// The sums of one pixel. Stores with a mask take longest, and are left to what is neither a whole vector nor a short
// one.
template <int kLanes>
BITSTRATA_INLINE void store_lanes(uint16_t* to, __m512 sums, uint32_t mask) {
  const __m256i x = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(Lanes<kLanes>::total(sums)));
  if (kLanes == 4)
    store_few(to, _mm256_castsi256_si128(x), mask);
  else if (kLanes == 8 && mask == 0xFF)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(x));
  else if (kLanes == 16 && mask == 0xFFFF)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x);
  else
    _mm256_mask_storeu_epi16(to, static_cast<__mmask16>(mask), x);
}

template <int kLanes, int kPixels, int kVectors>
BITSTRATA_INLINE void store(const Tile& t, const __m512 (&sums)[kPixels][kVectors]) {
  each<kVectors>([&](auto v) BITSTRATA_BODY {
    const uint32_t mask = v + 1 < kVectors ? 0xFFFF : t.mask;
    each<kPixels>([&](auto p)
                      BITSTRATA_BODY { store_lanes<kLanes>(t.out + v * 16 + p * t.out_pitch, sums[p][v], mask); });
  });
}

template <int kLanes, int kPairs, int kPixels, int kVectors>
BITSTRATA_INLINE void sum_tile(const Tile& t, __m512 (&sums)[kPixels][kVectors]) {
  clear(sums);
  for (int64_t tap = 0; tap < t.tap_count; ++tap) {
    const uint8_t *g = t.taps[tap].g + t.skip, *w = t.taps[tap].weights;
    for (int64_t block = 0; block < t.blocks; ++block, g += t.block_bytes, w += kPairs * kLanes * kVectors * 4)
      add_block<kLanes, kPairs>(g, w, sums);
  }
}

template <int kLanes, int kPixels, int kVectors, int kPairs>
void run_tile(const Tile& t) {
  __m512 sums[kPixels][kVectors];
  sum_tile<kLanes, kPairs>(t, sums);
  store<kLanes>(t, sums);
}

}  // namespace
}  // namespace bitstrata
