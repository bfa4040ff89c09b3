// Winograd's F(2, 3) with eight output channels a vector: what becomes of the sums of products. See pointwise.h for the
// unnamed namespace.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "store_lanes.h"
#include "winograd_conv.h"

namespace bitstrata {
namespace {

// Where results are: pixels `pitch` elements apart.
struct Sums32 {
  Sums32 from(int64_t pixel, int64_t channel) const { return {to + pixel * pitch + channel, pitch}; }
  int32_t* to;
  int64_t pitch;
};

struct Lanes8 {
  using Vector = __m256i;
};
using Lanes8Block = WinogradBlock<Lanes8, Sums32>;

inline __m256i halved(__m256i a, __m256i b, __m256i c) {
  return _mm256_srai_epi32(_mm256_add_epi32(_mm256_add_epi32(a, b), c), 1);
}

// Stores a block's outputs. sums: of each position, tile and vector.
template <int kP, int kV>
inline void store_tiles(const Lanes8Block& b, const __m256i (&sums)[kPositions][kP][kV]) {
  constexpr int kLanes = 8;
  const auto load = [](const int32_t* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); };
  for (int j = 0; j < kV; ++j) {
    const __m256i even = load(b.even + j * kLanes), odd = load(b.odd + j * kLanes);
    const int64_t real = j == kV - 1 ? b.channels - j * kLanes : kLanes;
    for (int i = 0; i < kP; ++i) {
      int32_t* to = b.out.to + b.pixel[i] * b.out.pitch + j * kLanes;
      const __m256i m1 = sums[1][i][j], m2 = sums[2][i][j];
      store_lanes(to, real, halved(_mm256_add_epi32(even, sums[0][i][j]), m1, m2));
      if (b.whole[i]) store_lanes(to + b.out.pitch, real, halved(_mm256_sub_epi32(odd, m2), m1, sums[3][i][j]));
    }
  }
}

}  // namespace
}  // namespace bitstrata
