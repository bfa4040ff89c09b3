// Winograd's F(2, 3) along rows of the map, in integers: two neighbouring outputs of three taps take four products.
//
// With inputs d0..d3 and weights g0..g2 of a row, twice the outputs are m1 + m2 + m0 and m1 - m2 + m3, where
//   m0 = (d0 - d2) * 2 g0             m1 = (d1 + d2) * (g0 + g1 + g2)
//   m2 = (d2 - d1) * (g0 - g1 + g2)   m3 = (d1 - d3) * -2 g2.
// Nothing is rounded, and the sums over channels and rows, being twice an integer, are halved exactly. Inputs of up to
// seven bits and weights of up to six stay bytes; eight bits do not, so that this is what few bits are faster by.
// See pointwise.h for the unnamed namespace.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "bitstrata/kernels.h"
#include "conv_stage.h"
#include "unroll.h"

namespace bitstrata {
namespace {

constexpr int kPositions = 4;         // of a tile: the products m0..m3
constexpr int64_t kWinogradStep = 4;  // input channels of a step

// What is added to a staged position, so that it is not negative.
struct WinogradOffsets {
  explicit WinogradOffsets(const ConvShape& s) : difference(s.input_hi - s.input_lo), sum(-2 * s.input_lo) {}
  int32_t largest() const { return 2 * difference; }  // of staged bytes
  int32_t difference, sum;                            // of d0 - d2, d2 - d1, d1 - d3; of d1 + d2
};

// Staged rows: [tile][position][lanes] bytes; a tile is two neighbouring output columns.
struct WinogradRows {
  explicit WinogradRows(const ConvShape& s)
      : lanes(round_up(s.in_c, kWinogradStep)), tiles((s.out_w + 1) / 2), bytes(tiles * kPositions * lanes) {}
  int64_t lanes, tiles, bytes;
};

// Of packed weights, the largest magnitude that can be.
inline int64_t winograd_largest_weight(const ConvShape& s) {
  const int64_t p = s.mul * s.code_lo + s.add, q = s.mul * s.code_hi + s.add;
  const int64_t of_p = p < 0 ? -p : p, of_q = q < 0 ? -q : q;
  return 3 * (of_p > of_q ? of_p : of_q);
}

// Whether weights and inputs stay bytes, and twice the results int32: halving a sum that has wrapped would not be
// exact.
inline bool winograd_fits(const ConvShape& s) {
  if (s.kernel_w != 3 || s.stride_w != 1 || s.dilation_w != 1 || s.groups != 1) return false;
  const int64_t weight = winograd_largest_weight(s), input = s.input_hi > -s.input_lo ? s.input_hi : -s.input_lo;
  return weight <= INT8_MAX && WinogradOffsets(s).largest() <= UINT8_MAX &&
         2 * weight * input * s.in_c * s.kernel_h <= INT32_MAX;
}

// As of ConvKernel.
inline double winograd_passes(const ConvShape& s) {
  return static_cast<double>(kPositions * ((s.out_w + 1) / 2)) / static_cast<double>(3 * s.out_w);
}

// The positions of `count` channels, whose inputs are at d[0..3]; positions are `lanes` bytes apart.
template <typename Count>
BITSTRATA_INLINE void winograd_channels(const uint8_t* const* d, int64_t c, Count count, int64_t lanes,
                                        uint8_t difference, uint8_t sum, uint8_t* __restrict to) {
  const uint8_t *d0 = d[0] + c, *d1 = d[1] + c, *d2 = d[2] + c, *d3 = d[3] + c;
  uint8_t* at = to + c;
  for (int64_t i = 0; i < count; ++i) at[i] = static_cast<uint8_t>(d0[i] - d2[i] + difference);
  at += lanes;
  for (int64_t i = 0; i < count; ++i) at[i] = static_cast<uint8_t>(d1[i] + d2[i] + sum);
  at += lanes;
  for (int64_t i = 0; i < count; ++i) at[i] = static_cast<uint8_t>(d2[i] - d1[i] + difference);
  at += lanes;
  for (int64_t i = 0; i < count; ++i) at[i] = static_cast<uint8_t>(d1[i] - d3[i] + difference);
}

inline void winograd_tile(const uint8_t* const* d, int64_t channels, int64_t lanes, WinogradOffsets offsets,
                          uint8_t* to) {
  const uint8_t difference = static_cast<uint8_t>(offsets.difference), sum = static_cast<uint8_t>(offsets.sum);
  int64_t c = 0;
  const auto all_of = [&](auto count) {  // so many at a time, which compilers make whole vectors of
    for (; c + count <= channels; c += count) winograd_channels(d, c, count, lanes, difference, sum, to);
  };
  all_of(std::integral_constant<int64_t, 64>{});
  all_of(std::integral_constant<int64_t, 16>{});
  winograd_channels(d, c, channels - c, lanes, difference, sum, to);
  for (c = channels; c < lanes; ++c) to[c] = to[lanes + c] = to[2 * lanes + c] = to[3 * lanes + c] = 0;
}

// padding: (lanes,), the pad codes.
inline void winograd_stage(const ConvShape& s, const uint8_t* padding, const void* image, void* staged,
                           int64_t row_begin, int64_t row_end) {
  const WinogradRows rows(s);
  const WinogradOffsets offsets(s);
  for (int64_t r = row_begin; r < row_end; ++r) {
    const int64_t y = r - s.pad_top;
    const bool inside = y >= 0 && y < s.in_h;
    const uint8_t* from = static_cast<const uint8_t*>(image) + y * s.in_w * s.in_c;
    uint8_t* to = static_cast<uint8_t*>(staged) + r * rows.bytes;
    for (int64_t t = 0; t < rows.tiles; ++t, to += kPositions * rows.lanes) {
      const uint8_t* d[4];
      for (int64_t k = 0; k < 4; ++k) {
        const int64_t x = 2 * t + k - s.pad_left;
        d[k] = inside && x >= 0 && x < s.in_w ? from + x * s.in_c : padding;
      }
      winograd_tile(d, s.in_c, rows.lanes, offsets, to);
    }
  }
}

// One output channel's weights, four input channels at a time. put(position, row of the kernel, i, four) takes those of
// input channels i to i + 3. `even` and `odd` get what the sums of a tile's two outputs begin with.
struct WinogradWeights {
  const ConvShape& s;
  const WeightCodes& codes;
  const uint8_t* factor;  // of input channels, modulo 2^8; or null

  template <typename Put>
  void channel(int64_t o, int32_t* even, int32_t* odd, const Put& put) const {
    int32_t total[3] = {};
    for (int64_t i = 0; i < s.in_c; i += kWinogradStep) {
      const int64_t count = s.in_c - i < kWinogradStep ? s.in_c - i : kWinogradStep;
      for (int64_t ky = 0; ky < s.kernel_h; ++ky) {
        int8_t four[kPositions][kWinogradStep] = {};
        const int8_t* at = codes.data + o * codes.out_step + i * codes.in_step + codes.first_tap + ky * codes.tap_y;
        for (int64_t k = 0; k < count; ++k, at += codes.in_step) {
          const int32_t by = factor != nullptr ? factor[i + k] : 1;
          const auto weight = [&](int64_t kx) {
            return s.mul * static_cast<int8_t>(at[kx * codes.tap_x] * by) + s.add;
          };
          const int32_t g0 = weight(0), g1 = weight(1), g2 = weight(2);
          four[0][k] = static_cast<int8_t>(2 * g0);
          four[1][k] = static_cast<int8_t>(g0 + g1 + g2);
          four[2][k] = static_cast<int8_t>(g0 - g1 + g2);
          four[3][k] = static_cast<int8_t>(-2 * g2);
          total[0] += g0, total[1] += g1, total[2] += g2;
        }
        for (int p = 0; p < kPositions; ++p) put(p, ky, i, four[p]);
      }
    }
    const WinogradOffsets offset(s);
    const int32_t both = total[0] + total[2];
    const int32_t m1 = offset.sum * (both + total[1]), m2 = offset.difference * (both - total[1]);
    *even = -(m1 + m2 + offset.difference * 2 * total[0]);
    *odd = -(m1 - m2 - offset.difference * 2 * total[2]);
  }
};

}  // namespace
}  // namespace bitstrata
