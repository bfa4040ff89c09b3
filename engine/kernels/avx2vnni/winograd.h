// Convolution by Winograd's F(2, 3) with VNNI on 256 bits. See ../common/pointwise.h for the unnamed namespace.
#pragma once

#include <immintrin.h>

#include "../common/unroll.h"
#include "../common/winograd_lanes8.h"
#include "conv.h"
#include "dot.h"

namespace bitstrata {
namespace {

template <int kP, int kV>
void convolve_tiles(const Lanes8Block& b) {
  __m256i sums[kPositions][kP][kV];
  const __m256i* w = b.weights;
  for (int64_t position = 0; position < kPositions; ++position) {
    __m256i sum[kP][kV];
    each<kP>([&](auto i) { each<kV>([&](auto j) { sum[i][j] = _mm256_setzero_si256(); }); });
    for (int64_t row = 0; row < b.kernel_h; ++row)
      multiply_run<kP, kV>(b.window, position * b.lanes + row * b.row_step, b.lanes, w, sum);
    each<kP>([&](auto i) { each<kV>([&](auto j) { sums[position][i][j] = sum[i][j]; }); });
  }
  store_tiles<kP, kV>(b, sums);
}

using TileFn = void (*)(const Lanes8Block&);
template <int kV>
constexpr TileFn kLanes8Blocks[kPixels] = {convolve_tiles<1, kV>, convolve_tiles<2, kV>, convolve_tiles<3, kV>,
                                           convolve_tiles<4, kV>, convolve_tiles<5, kV>, convolve_tiles<6, kV>,
                                           convolve_tiles<7, kV>, convolve_tiles<8, kV>};
constexpr const TileFn* kTilesBySet[kVectors] = {kLanes8Blocks<1>, kLanes8Blocks<2>};

struct Vnni256Tiles {
  static constexpr int64_t kLanes = bitstrata::kLanes, kVectors = bitstrata::kVectors;
  using Registers = Lanes8;
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
