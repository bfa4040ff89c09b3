// Convolution by Winograd's F(2, 3) with VNNI on 256 bits. See ../common/pointwise.h for the unnamed namespace.
#pragma once

#include <immintrin.h>

#include "../common/unroll.h"
#include "../common/winograd_conv.h"
#include "conv.h"
#include "dot.h"

namespace bitstrata {
namespace {

// Where results are: pixels `pitch` elements apart.
struct Sums32 {
  Sums32 from(int64_t pixel, int64_t channel) const { return {to + pixel * pitch + channel, pitch}; }
  int32_t* to;
  int64_t pitch;
};
using TileBlock = WinogradBlock<Registers, Sums32>;

inline __m256i halved(__m256i a, __m256i b, __m256i c) {
  return _mm256_srai_epi32(_mm256_add_epi32(_mm256_add_epi32(a, b), c), 1);
}

template <int kP, int kV>
void convolve_tiles(const TileBlock& b) {
  __m256i sums[kPositions][kP][kV];
  const __m256i* w = b.weights;
  for (int64_t position = 0; position < kPositions; ++position) {
    __m256i sum[kP][kV];
    each<kP>([&](auto i) { each<kV>([&](auto j) { sum[i][j] = _mm256_setzero_si256(); }); });
    for (int64_t row = 0; row < b.kernel_h; ++row)
      multiply_run<kP, kV>(b.window, position * b.lanes + row * b.row_step, b.lanes, w, sum);
    each<kP>([&](auto i) { each<kV>([&](auto j) { sums[position][i][j] = sum[i][j]; }); });
  }
  const __m256i last = _mm256_set1_epi32(static_cast<int32_t>(b.channels - (kV - 1) * kLanes));
  const __m256i mask = _mm256_cmpgt_epi32(last, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  for (int j = 0; j < kV; ++j) {
    const __m256i even = load(b.even + j * kLanes), odd = load(b.odd + j * kLanes);
    const __m256i real = j == kV - 1 ? mask : _mm256_set1_epi32(-1);
    for (int i = 0; i < kP; ++i) {
      int32_t* to = b.out.to + b.pixel[i] * b.out.pitch + j * kLanes;
      const __m256i m1 = sums[1][i][j], m2 = sums[2][i][j];
      _mm256_maskstore_epi32(to, real, halved(_mm256_add_epi32(even, sums[0][i][j]), m1, m2));
      if (b.whole[i])
        _mm256_maskstore_epi32(to + b.out.pitch, real, halved(_mm256_sub_epi32(odd, m2), m1, sums[3][i][j]));
    }
  }
}

using TileFn = void (*)(const TileBlock&);
template <int kV>
constexpr TileFn kTileBlocks[kPixels] = {convolve_tiles<1, kV>, convolve_tiles<2, kV>, convolve_tiles<3, kV>,
                                         convolve_tiles<4, kV>, convolve_tiles<5, kV>, convolve_tiles<6, kV>,
                                         convolve_tiles<7, kV>, convolve_tiles<8, kV>};
constexpr const TileFn* kTilesBySet[kVectors] = {kTileBlocks<1>, kTileBlocks<2>};

struct Vnni256Tiles {
  static constexpr int64_t kLanes = bitstrata::kLanes, kVectors = bitstrata::kVectors;
  using Registers = bitstrata::Registers;
  static int64_t tiles_of(int64_t vectors) { return Vnni256Conv::pixels_of(vectors); }
  template <typename>
  static TileFn block(int64_t vectors, int64_t tiles) {
    return kTilesBySet[vectors - 1][tiles - 1];
  }
  static constexpr auto pack_set = pack_winograd_set<Vnni256Tiles>;
  static int64_t chunk(const ConvShape&, const WinogradPacked<Vnni256Tiles>&, const int8_t*) { return 0; }
};

using TileConv = WinogradConv<Vnni256Tiles>;

void run_tiles(const ConvShape& s, const void* packed, const void* staged, int32_t* out, int64_t row_begin,
               int64_t row_end) {
  TileConv::run_to<Sums32>(s, packed, staged, {out, s.out_c}, row_begin, row_end);
}

constexpr ConvKernel kWinograd = {"avx2vnni-winograd",
                                  TileConv::packed_bytes,
                                  TileConv::pack,
                                  TileConv::staged_row_bytes,
                                  TileConv::stage,
                                  run_tiles,
                                  TileConv::pack_parts,
                                  TileConv::pack_part,
                                  nullptr,
                                  nullptr,
                                  winograd_passes};

}  // namespace
}  // namespace bitstrata
