// How the gradient of a convolution's input is computed: which taps reach which positions, and what lies where.
//
// Positions first, first + stride, ... of an axis are a phase: among them a tap moves by one position of the output's
// gradient g at a time, so that a phase is a convolution with stride 1. Rows of g are staged with zeros around them,
// in blocks of channels, so that every address within a tile of pixels is a constant.
#pragma once

#include "bitstrata/kernels.h"

namespace bitstrata {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return b < a ? b : a; }

// Of the positions first + stride * j, j < count: tap `first_tap + i * tap_step` multiplies g at j + offset - i * step.
struct AxisPhase {
  AxisPhase(int64_t first, int64_t in, int64_t kernel, int64_t stride, int64_t dilation, int64_t pad)
      : count(in > first ? (in - first + stride - 1) / stride : 0) {
    while (first_tap < kernel && (first + pad - first_tap * dilation) % stride != 0) ++first_tap;
    if (first_tap == kernel) return;
    for (tap_step = 1; tap_step * dilation % stride != 0;) ++tap_step;
    taps = (kernel - first_tap + tap_step - 1) / tap_step;
    offset = (first + pad - first_tap * dilation) / stride;
    step = tap_step * dilation / stride;
  }
  int64_t least() const { return offset - (taps - 1) * step; }

  int64_t count, taps = 0, first_tap = 0, tap_step = 1, offset = 0, step = 1;
};

struct GradientPlan {
  explicit GradientPlan(const ConvShape& shape)
      : s(shape),
        lanes(s.in_c <= 4   ? 4
              : s.in_c <= 8 ? 8
                            : 16),
        vectors((s.in_c + lanes - 1) / lanes),
        pairs((s.out_c - 1) % 16 < 8 ? 4 : 8),
        blocks((s.out_c + 2 * pairs - 1) / (2 * pairs)) {
    int64_t first = 0, last = -1;  // columns of g that a tile may read
    for (int64_t x = 0; x < smaller(s.stride_w, s.in_w); ++x) {
      const AxisPhase p = columns(x);
      if (p.taps == 0) continue;
      first = smaller(first, p.least());
      last = last > p.count - 1 + p.offset ? last : p.count - 1 + p.offset;
    }
    left = -first;
    width = last - first + 1;
  }

  AxisPhase rows(int64_t y) const { return {y, s.in_h, s.kernel_h, s.stride_h, s.dilation_h, s.pad_top}; }
  AxisPhase columns(int64_t x) const { return {x, s.in_w, s.kernel_w, s.stride_w, s.dilation_w, s.pad_left}; }
  // Rows of g that rows [begin, end) of the input's gradient need: from the first on, so many.
  int64_t first_row(int64_t begin) const {
    const int64_t at = begin + s.pad_top - (s.kernel_h - 1) * s.dilation_h;
    return at >= 0 ? at / s.stride_h : -((-at + s.stride_h - 1) / s.stride_h);
  }
  int64_t row_count(int64_t begin, int64_t end) const {
    return (end - 1 + s.pad_top) / s.stride_h - first_row(begin) + 1;
  }

  // Bytes of: a pixel of a block; a block of a row; a row.
  int64_t pixel_bytes() const { return pairs * 4; }
  int64_t block_bytes() const { return width * pixel_bytes(); }
  int64_t row_bytes() const { return blocks * block_bytes(); }
  // Bytes of the weights of one block of g's channels, and of one tap, for so many vectors of the input's channels.
  int64_t weight_block(int64_t count) const { return pairs * count * lanes * 4; }
  int64_t weight_tap(int64_t count) const { return blocks * weight_block(count); }
  int64_t vector_bytes() const { return s.kernel_h * s.kernel_w * weight_tap(1); }

  const ConvShape& s;
  int64_t lanes;    // input channels of a vector
  int64_t vectors;  // of the input's channels
  int64_t pairs;    // of g's channels in a block
  int64_t blocks;
  int64_t left, width;  // columns of a staged row: zeros before the first of g, and in all
};

constexpr int kVectors = 2;          // that a tile computes together
constexpr int kWidest[] = {16, 14};  // pixels of a tile, by vectors: what registers hold

// The width, of some in ascending order, of the tiles that cover so many pixels in the fewest steps, the last one set
// back to end with them: a tile costs its sums, at least as many as hide their latency, and its start.
template <typename Widths>
int width_of(const Widths& widths, int64_t pixels, int64_t count) {
  int best = 1;
  int64_t least = INT64_MAX;
  for (int width : widths) {
    if (width > pixels || width > kWidest[count - 1]) break;
    const int64_t sums = width * count;
    const int64_t cost = (pixels + width - 1) / width * ((sums > 8 ? sums : 8) + 1);
    if (cost <= least) best = width, least = cost;
  }
  return best;
}

}  // namespace
}  // namespace bitstrata
