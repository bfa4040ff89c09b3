// Winograd's minimal filtering with eight output channels a vector: what becomes of the sums of products. See
// pointwise.h for the unnamed namespace.
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

struct Ops8 {
  using Vector = __m256i;
  static __m256i add(__m256i a, __m256i b) { return _mm256_add_epi32(a, b); }
  static __m256i sub(__m256i a, __m256i b) { return _mm256_sub_epi32(a, b); }
  static __m256i mul(__m256i a, uint32_t b) { return _mm256_mullo_epi32(a, _mm256_set1_epi32(static_cast<int>(b))); }
  static __m256i left(__m256i a, int places) { return _mm256_slli_epi32(a, places); }
  static __m256i right(__m256i a, int places) { return _mm256_srai_epi32(a, places); }
};

// Stores the outputs of a block of `tiles` by `vectors`. sums: [position][tile][vector]. It is not made for each size.
template <typename Form>
void store_tiles(const Lanes8Block& b, int64_t tiles, int64_t vectors, const __m256i* sums) {
  constexpr int kLanes = 8;
  for (int64_t j = 0; j < vectors; ++j) {
    __m256i correction[Form::kOutputs];
    each<Form::kOutputs>([&](auto k) {
      const int32_t* from = b.correction + k * b.pitch + j * kLanes;
      correction[k] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    });
    const int64_t real = j == vectors - 1 ? b.channels - j * kLanes : kLanes;
    for (int64_t i = 0; i < tiles; ++i) {
      __m256i m[Form::kPositions], y[Form::kOutputs];
      each<Form::kPositions>([&](auto position) { m[position] = sums[(position * tiles + i) * vectors + j]; });
      winograd_outputs(Ops8(), m, correction, y);
      int32_t* to = b.out.to + b.pixel[i] * b.out.pitch + j * kLanes;
      each<Form::kOutputs>([&](auto k) {
        if (k < b.outputs[i]) store_lanes(to + k * b.out.pitch, real, y[k]);
      });
    }
  }
}

}  // namespace
}  // namespace bitstrata
