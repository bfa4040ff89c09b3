// Winograd's minimal filtering along rows of the map, in integers and in bytes: neighbouring outputs of three taps take
// fewer products than three each.
//
// A form makes positions of a tile's inputs d and of a row's weights g, one product of sums over channels and rows for
// each, and an output's sum of those: of two outputs F(2, 3) makes four positions, of four outputs F(4, 3) six. With
// the positions' weights whole, the sums are a multiple of the outputs. Nothing is rounded, and dividing by it is
// exact. The more outputs, the wider the positions: bytes hold those of F(2, 3) for inputs of up to seven bits and
// weights of up to six, those of F(4, 3) for four bits of both. See pointwise.h for the unnamed namespace.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "bitstrata/kernels.h"
#include "conv_stage.h"
#include "unroll.h"

namespace bitstrata {
namespace {

constexpr int64_t kWinogradStep = 4;  // input channels of a step
constexpr int kWinogradTaps = 3;

// A form has: kOutputs of a tile and kPositions; kData, the factors of a tile's inputs; kWeight, those of taps;
// kOutput, those of positions; kRoom: how many times an output's bound int32 must hold, so that the multiple of it that
// positions sum to can be divided, modulo 2^32; stage<Count>, which is kData.

// Twice the outputs: (d0 - d2) 2 g0, (d1 + d2)(g0 + g1 + g2), (d2 - d1)(g0 - g1 + g2), (d1 - d3)(-2 g2).
struct TwoOutputs {
  static constexpr int kOutputs = 2, kPositions = 4;
  static constexpr int32_t kData[kPositions][4] = {{1, 0, -1, 0}, {0, 1, 1, 0}, {0, -1, 1, 0}, {0, 1, 0, -1}};
  static constexpr int32_t kWeight[kPositions][kWinogradTaps] = {{2, 0, 0}, {1, 1, 1}, {1, -1, 1}, {0, 0, -2}};
  static constexpr int32_t kOutput[kOutputs][kPositions] = {{1, 1, 1, 0}, {0, 1, -1, 1}};
  static constexpr int64_t kRoom = 2;

  // The positions of `count` channels, whose inputs are at d[0..3]; positions are `lanes` bytes apart.
  template <typename Count>
  static BITSTRATA_INLINE void stage(const uint8_t* const* d, Count count, int64_t lanes, const uint8_t* offset,
                                     uint8_t* __restrict at) {
    const uint8_t *d0 = d[0], *d1 = d[1], *d2 = d[2], *d3 = d[3];
    for (int64_t i = 0; i < count; ++i) at[i] = static_cast<uint8_t>(d0[i] - d2[i] + offset[0]);
    at += lanes;
    for (int64_t i = 0; i < count; ++i) at[i] = static_cast<uint8_t>(d1[i] + d2[i] + offset[1]);
    at += lanes;
    for (int64_t i = 0; i < count; ++i) at[i] = static_cast<uint8_t>(d2[i] - d1[i] + offset[2]);
    at += lanes;
    for (int64_t i = 0; i < count; ++i) at[i] = static_cast<uint8_t>(d1[i] - d3[i] + offset[3]);
  }
};

// F(4, 3), whose weights' fractions are left to the outputs: those are summed to 24, 12, 6 and 6 times themselves.
struct FourOutputs {
  static constexpr int kOutputs = 4, kPositions = 6;
  static constexpr int32_t kData[kPositions][6] = {{4, 0, -5, 0, 1, 0},  {0, -4, -4, 1, 1, 0}, {0, 4, -4, -1, 1, 0},
                                                   {0, -2, -1, 2, 1, 0}, {0, 2, -1, -2, 1, 0}, {0, 4, 0, -5, 0, 1}};
  static constexpr int32_t kWeight[kPositions][kWinogradTaps] = {{1, 0, 0}, {1, 1, 1},  {1, -1, 1},
                                                                 {1, 2, 4}, {1, -2, 4}, {0, 0, 1}};
  static constexpr int32_t kOutput[kOutputs][kPositions] = {
      {6, -4, -4, 1, 1, 0}, {0, -2, 2, 1, -1, 0}, {0, -1, -1, 1, 1, 0}, {0, -1, 1, 2, -2, 6}};
  static constexpr int64_t kRoom = 8;
  // What makes of the sums, modulo 2^32, 8, 4, 2 and 2 times the outputs: division by three.
  static constexpr uint32_t kInverse = 0xAAAAAAAB;
  static_assert(kInverse * 3 == 1);
  static constexpr int kShift[kOutputs] = {3, 2, 1, 1};

  template <typename Count>
  static BITSTRATA_INLINE void stage(const uint8_t* const* d, Count count, int64_t lanes, const uint8_t* offset,
                                     uint8_t* __restrict to) {
    const uint8_t *d0 = d[0], *d1 = d[1], *d2 = d[2], *d3 = d[3], *d4 = d[4], *d5 = d[5];
    uint8_t* at = to;  // a position after the other, or compilers make no vectors of them
    const auto put = [&](uint8_t added, const auto& value) {
      for (int64_t i = 0; i < count; ++i) at[i] = static_cast<uint8_t>(value(i) + added);
      at += lanes;
    };
    const auto byte = [](int32_t x) { return static_cast<uint8_t>(x); };
    const auto twice = [](uint8_t x) { return static_cast<uint8_t>(x + x); };
    const auto four = [&](int32_t x) { return twice(twice(byte(x))); };
    put(offset[0], [&](int64_t i) { return byte(four(d0[i] - d2[i]) + d4[i] - d2[i]); });
    put(offset[1], [&](int64_t i) { return byte(d4[i] + d3[i] - four(d2[i] + d1[i])); });
    put(offset[2], [&](int64_t i) { return byte(d4[i] - d3[i] - four(d2[i] - d1[i])); });
    put(offset[3], [&](int64_t i) { return byte(d4[i] - d2[i] + twice(byte(d3[i] - d1[i]))); });
    put(offset[4], [&](int64_t i) { return byte(d4[i] - d2[i] - twice(byte(d3[i] - d1[i]))); });
    put(offset[5], [&](int64_t i) { return byte(d5[i] - d3[i] - four(d3[i] - d1[i])); });
  }
};

// The largest sum of magnitudes of a row of factors.
template <int kRows, int kColumns>
constexpr int32_t largest_row(const int32_t (&factors)[kRows][kColumns]) {
  int32_t most = 0;
  for (const auto& row : factors) {
    int32_t sum = 0;
    for (int32_t f : row) sum += f < 0 ? -f : f;
    most = sum > most ? sum : most;
  }
  return most;
}

template <typename Form>
constexpr int kWinogradColumns = Form::kOutputs + kWinogradTaps - 1;  // of the input, for a tile

// What is added to a staged position, so that it is not negative.
template <typename Form>
struct WinogradOffsets {
  explicit WinogradOffsets(const ConvShape& s) : at() {
    for (int p = 0; p < Form::kPositions; ++p)
      for (int32_t f : Form::kData[p]) at[p] -= f > 0 ? f * s.input_lo : f * s.input_hi;
  }
  static int64_t largest(const ConvShape& s) {  // of staged bytes
    return int64_t{largest_row(Form::kData)} * (int64_t{s.input_hi} - s.input_lo);
  }
  int32_t at[Form::kPositions];
};

// Staged rows: [tile][position][lanes] bytes; a tile is neighbouring output columns.
template <typename Form>
struct WinogradRows {
  explicit WinogradRows(const ConvShape& s)
      : lanes(round_up(s.in_c, kWinogradStep)),
        tiles((s.out_w + Form::kOutputs - 1) / Form::kOutputs),
        bytes(tiles * Form::kPositions * lanes) {}
  int64_t lanes, tiles, bytes;
};

// Of packed weights, the largest magnitude that can be.
template <typename Form>
int64_t winograd_largest_weight(const ConvShape& s) {
  const int64_t p = s.mul * s.code_lo + s.add, q = s.mul * s.code_hi + s.add;
  const int64_t of_p = p < 0 ? -p : p, of_q = q < 0 ? -q : q;
  return largest_row(Form::kWeight) * (of_p > of_q ? of_p : of_q);
}

// Whether weights and inputs stay bytes, and what int32 holds of the results is enough to divide them.
template <typename Form>
bool winograd_fits(const ConvShape& s) {
  if (s.kernel_w != kWinogradTaps || s.stride_w != 1 || s.dilation_w != 1 || s.groups != 1) return false;
  const int64_t weight = winograd_largest_weight<Form>(s), input = s.input_hi > -s.input_lo ? s.input_hi : -s.input_lo;
  return weight <= INT8_MAX && WinogradOffsets<Form>::largest(s) <= UINT8_MAX &&
         Form::kRoom * (weight / largest_row(Form::kWeight)) * kWinogradTaps * input * s.in_c * s.kernel_h <= INT32_MAX;
}

// As of ConvKernel.
template <typename Form>
double winograd_passes(const ConvShape& s) {
  return static_cast<double>(Form::kPositions * WinogradRows<Form>(s).tiles) /
         static_cast<double>(kWinogradTaps * s.out_w);
}

template <typename Form>
void winograd_tile(const uint8_t* const* d, int64_t channels, int64_t lanes, const uint8_t* offset, uint8_t* to) {
  int64_t c = 0;
  const auto stage = [&](auto count) {
    const uint8_t* at[kWinogradColumns<Form>];
    for (int k = 0; k < kWinogradColumns<Form>; ++k) at[k] = d[k] + c;
    Form::stage(at, count, lanes, offset, to + c);
  };
  const auto all_of = [&](auto count) {  // so many at a time, which compilers make whole vectors of
    for (; c + count <= channels; c += count) stage(count);
  };
  all_of(std::integral_constant<int64_t, 64>{});
  all_of(std::integral_constant<int64_t, 16>{});
  stage(channels - c);
  for (c = channels; c < lanes; ++c)
    for (int p = 0; p < Form::kPositions; ++p) to[p * lanes + c] = 0;
}

// padding: (lanes,), the pad codes.
template <typename Form>
void winograd_stage(const ConvShape& s, const uint8_t* padding, const void* image, void* staged, int64_t row_begin,
                    int64_t row_end) {
  const WinogradRows<Form> rows(s);
  const WinogradOffsets<Form> offsets(s);
  uint8_t offset[Form::kPositions];
  for (int p = 0; p < Form::kPositions; ++p) offset[p] = static_cast<uint8_t>(offsets.at[p]);
  for (int64_t r = row_begin; r < row_end; ++r) {
    const int64_t y = r - s.pad_top;
    const bool inside = y >= 0 && y < s.in_h;
    const uint8_t* from = static_cast<const uint8_t*>(image) + y * s.in_w * s.in_c;
    uint8_t* to = static_cast<uint8_t*>(staged) + r * rows.bytes;
    for (int64_t t = 0; t < rows.tiles; ++t, to += Form::kPositions * rows.lanes) {
      const uint8_t* d[kWinogradColumns<Form>];
      for (int64_t k = 0; k < kWinogradColumns<Form>; ++k) {
        const int64_t x = Form::kOutputs * t + k - s.pad_left;
        d[k] = inside && x >= 0 && x < s.in_w ? from + x * s.in_c : padding;
      }
      winograd_tile<Form>(d, s.in_c, rows.lanes, offset, to);
    }
  }
}

// What an output's sum begins with for each of a position's weights, modulo 2^32.
template <typename Form>
struct WinogradCorrections {
  explicit WinogradCorrections(const ConvShape& s) {
    const WinogradOffsets<Form> offset(s);
    for (int y = 0; y < Form::kOutputs; ++y)
      for (int p = 0; p < Form::kPositions; ++p) factor[y][p] = -Form::kOutput[y][p] * offset.at[p];
  }
  int32_t factor[Form::kOutputs][Form::kPositions];
};

// One output channel's weights, four input channels at a time. put(position, row of the kernel, i, four) takes those of
// input channels i to i + 3.
template <typename Form>
struct WinogradWeights {
  const ConvShape& s;
  const WeightCodes& codes;
  const uint8_t* factor;  // of input channels, modulo 2^8; or null

  // correction: of a tile's outputs, `pitch` elements apart.
  template <typename Put>
  void channel(int64_t o, int32_t* correction, int64_t pitch, const Put& put) const {
    int32_t total[kWinogradTaps] = {};
    for (int64_t i = 0; i < s.in_c; i += kWinogradStep) {
      const int64_t count = s.in_c - i < kWinogradStep ? s.in_c - i : kWinogradStep;
      for (int64_t ky = 0; ky < s.kernel_h; ++ky) {
        int8_t four[Form::kPositions][kWinogradStep] = {};
        const int8_t* at = codes.data + o * codes.out_step + i * codes.in_step + codes.first_tap + ky * codes.tap_y;
        for (int64_t k = 0; k < count; ++k, at += codes.in_step) {
          const int32_t by = factor != nullptr ? factor[i + k] : 1;
          int32_t g[kWinogradTaps];
          each<kWinogradTaps>([&](auto kx) {
            g[kx] = s.mul * static_cast<int8_t>(at[kx * codes.tap_x] * by) + s.add;
            total[kx] += g[kx];
          });
          each<Form::kPositions>([&](auto p) { four[p][k] = static_cast<int8_t>(of_position<p>(g)); });
        }
        for (int p = 0; p < Form::kPositions; ++p) put(p, ky, i, four[p]);
      }
    }
    const WinogradCorrections<Form> corrections(s);
    for (int y = 0; y < Form::kOutputs; ++y) {
      uint32_t sum = 0;
      each<Form::kPositions>([&](auto p) {
        sum += static_cast<uint32_t>(corrections.factor[y][p]) * static_cast<uint32_t>(of_position<p>(total));
      });
      correction[y * pitch] = static_cast<int32_t>(sum);
    }
  }

  template <int kPosition>
  static int32_t of_position(const int32_t (&g)[kWinogradTaps]) {
    int32_t sum = 0;
    each<kWinogradTaps>([&](auto k) { sum += Form::kWeight[kPosition][k] * g[k]; });
    return sum;
  }
};

}  // namespace
}  // namespace bitstrata
