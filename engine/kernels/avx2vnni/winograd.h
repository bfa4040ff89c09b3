// Convolution by Winograd's F(2, 3) and F(4, 3) with VNNI on 256 bits. See ../common/pointwise.h for the unnamed
// namespace.
#pragma once

#include <immintrin.h>

#include "../common/unroll.h"
#include "../common/winograd_lanes8.h"
#include "conv.h"
#include "dot.h"

namespace bitstrata {
namespace {

// The products of a block's positions, of both forms: sums [position][tile][vector].
template <int kP, int kV>
void multiply_positions(const WinogradProducts<Lanes8>& b, int64_t positions, __m256i* sums) {
  const __m256i* w = b.weights;
  for (int64_t position = 0; position < positions; ++position, sums += kP * kV) {
    __m256i sum[kP][kV];
    each<kP>([&](auto i) { each<kV>([&](auto j) { sum[i][j] = _mm256_setzero_si256(); }); });
    for (int64_t row = 0; row < b.kernel_h; ++row)
      multiply_run<kP, kV>(b.window, position * b.lanes + row * b.row_step, b.lanes, w, sum);
    each<kP>([&](auto i) { each<kV>([&](auto j) { _mm256_store_si256(sums + i * kV + j, sum[i][j]); }); });
  }
}

using MultiplyFn = void (*)(const WinogradProducts<Lanes8>&, int64_t, __m256i*);
template <int kV>
constexpr MultiplyFn kByTiles[kPixels] = {
    multiply_positions<1, kV>, multiply_positions<2, kV>, multiply_positions<3, kV>, multiply_positions<4, kV>,
    multiply_positions<5, kV>, multiply_positions<6, kV>, multiply_positions<7, kV>, multiply_positions<8, kV>};
constexpr const MultiplyFn* kTilesBySet[kVectors] = {kByTiles<1>, kByTiles<2>};

template <typename Form>
struct TilesOf {
  int64_t vectors, tiles;

  void operator()(const Lanes8Block& b) const {
    __m256i sums[Form::kPositions * kPixels * kVectors];
    kTilesBySet[vectors - 1][tiles - 1](b, Form::kPositions, sums);
    store_tiles<Form>(b, tiles, vectors, sums);
  }
};

template <typename F>
struct Vnni256Tiles {
  using Form = F;
  static constexpr int64_t kLanes = bitstrata::kLanes, kVectors = bitstrata::kVectors;
  using Registers = Lanes8;
  static int64_t tiles_of(int64_t vectors) { return Vnni256Conv::pixels_of(vectors); }
  template <typename>
  static TilesOf<Form> block(int64_t vectors, int64_t tiles) {
    return {vectors, tiles};
  }
  static constexpr auto pack_set = pack_winograd_set<Vnni256Tiles>;
  static int64_t chunk(const ConvShape&, const WinogradPacked<Vnni256Tiles>&, const int8_t*) { return 0; }
};

template <typename Form>
using TileConv = WinogradConv<Vnni256Tiles<Form>>;

template <typename Form>
void run_tiles(const ConvShape& s, const void* packed, const void* staged, int32_t* out, int64_t row_begin,
               int64_t row_end) {
  TileConv<Form>::template run_to<Sums32>(s, packed, staged, {out, s.out_c}, row_begin, row_end);
}

template <typename Form>
constexpr ConvKernel winograd_kernel(const char* name) {
  using Conv = TileConv<Form>;
  ConvKernel made{name, Conv::packed_bytes, Conv::pack, Conv::staged_row_bytes, Conv::stage, run_tiles<Form>};
  made.pack_parts = Conv::pack_parts;
  made.pack_part = Conv::pack_part;
  made.passes = winograd_passes<Form>;
  return made;
}

constexpr ConvKernel kWinograd = winograd_kernel<TwoOutputs>("avx2vnni-winograd");
constexpr ConvKernel kWinogradFour = winograd_kernel<FourOutputs>("avx2vnni-winograd-four");

}  // namespace
}  // namespace bitstrata
