// Staging shared by the convolution kernels: a copy of the input in padded rows, each channel group apart, channels
// filled up to a multiple of the kernel's lanes. See pointwise.h for the unnamed namespace.
//
// A staged row is [group][column][lanes] of T, then, if `sums`, [group][column] int32: the sum over a pixel's lanes.
#pragma once

#include <cstdint>
#include <cstring>

#include "bitstrata/kernels.h"

namespace bitstrata {
namespace {

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <typename T>
struct Staging {
  Staging(const ConvShape& s, int64_t lanes, int32_t offset, bool sums)
      : lanes(lanes),
        columns(s.padded_w()),
        offset(offset),
        sums(sums),
        sums_at(round_up(s.groups * columns * lanes * static_cast<int64_t>(sizeof(T)), 4)),
        row_bytes(sums_at + (sums ? s.groups * columns * 4 : 0)) {}
  int64_t lanes, columns;
  int32_t offset;  // added to every code
  bool sums;
  int64_t sums_at, row_bytes;
};

// Whether pixels are staged without filling their channels up, where a kernel's steps take `step` values: where a row
// of the kernel as a whole then takes fewer of them. Staging and runs are those of `dense_staging` and `dense_runs`.
inline bool dense_rows(const ConvShape& s, int64_t step) {
  return s.groups == 1 && s.dilation_w == 1 &&
         round_up(s.kernel_w * s.in_c, step) < s.kernel_w * round_up(s.in_c, step);
}

template <typename T>
Staging<T> dense_staging(const ConvShape& s, int64_t step, int32_t offset, bool sums) {
  Staging<T> stage(s, s.in_c, offset, sums);
  stage.row_bytes += step * static_cast<int64_t>(sizeof(T));  // a row's last window is read beyond it, for weights 0
  return stage;
}

// Pixels of one to three channels, bytes, filled up to four with zeros. A pixel is read as four bytes, the last ones
// alone, so that nothing is read behind them.
template <typename In, typename T>
void stage_fours(const In* from, int64_t pixels, int64_t channels, int32_t offset, T* to) {
  const uint32_t real = 0xFFFFFFFFu >> (8 * (4 - channels)), high = 0x80808080u;
  const uint32_t added = 0x01010101u * static_cast<uint8_t>(offset);
  for (; pixels * channels >= 4; --pixels, from += channels, to += 4) {
    uint32_t x;
    std::memcpy(&x, from, 4);
    x = ((x & ~high) + (added & ~high)) ^ ((x ^ added) & high);  // byte by byte
    x &= real;
    std::memcpy(to, &x, 4);
  }
  for (; pixels > 0; --pixels, from += channels, to += 4) {
    for (int64_t c = 0; c < channels; ++c) to[c] = static_cast<T>(from[c] + offset);
    for (int64_t c = channels; c < 4; ++c) to[c] = 0;
  }
}

// pad: (in_c,) -> padding: (groups, lanes).
template <typename T>
void stage_padding(const ConvShape& s, const Staging<T>& g, const int32_t* pad, T* padding) {
  std::memset(padding, 0, static_cast<size_t>(s.groups * g.lanes) * sizeof(T));
  for (int64_t c = 0; c < s.in_c; ++c)
    padding[c / s.group_in() * g.lanes + c % s.group_in()] = static_cast<T>(pad[c] + g.offset);
}

template <typename In, typename T>
void stage_row(const ConvShape& s, const Staging<T>& g, const T* padding, const In* image, int64_t r, uint8_t* to) {
  const int64_t y = r - s.pad_top, lanes = g.lanes, group_in = s.group_in();
  int64_t left = g.columns, right = g.columns;  // columns [left, right) lie in the map
  if (y >= 0 && y < s.in_h && s.pad_left < g.columns) {
    left = s.pad_left;
    right = left + s.in_w < g.columns ? left + s.in_w : g.columns;
  }
  for (int64_t group = 0; group < s.groups; ++group) {
    T* row = reinterpret_cast<T*>(to) + group * g.columns * lanes;
    const T* pad = padding + group * lanes;
    for (int64_t x = 0; x < left; ++x) std::memcpy(row + x * lanes, pad, static_cast<size_t>(lanes) * sizeof(T));
    for (int64_t x = right; x < g.columns; ++x)
      std::memcpy(row + x * lanes, pad, static_cast<size_t>(lanes) * sizeof(T));
    if (left < right) {
      const In* from = image + y * s.in_w * s.in_c + group * group_in;
      T* inside = row + left * lanes;
      if (sizeof(T) == 1 && s.groups == 1 && lanes == 4 && s.in_c < 4) {
        stage_fours(from, right - left, s.in_c, g.offset, inside);
      } else if (s.groups == 1 && lanes == s.in_c) {
        for (int64_t i = 0; i < (right - left) * lanes; ++i) inside[i] = static_cast<T>(from[i] + g.offset);
      } else {
        for (int64_t x = left; x < right; ++x, from += s.in_c, inside += lanes) {
          int64_t c = 0;
          for (; c < group_in; ++c) inside[c] = static_cast<T>(from[c] + g.offset);
          for (; c < lanes; ++c) inside[c] = 0;
        }
      }
    }
    if (g.sums) {
      int32_t* sums = reinterpret_cast<int32_t*>(to + g.sums_at) + group * g.columns;
      for (int64_t x = 0; x < g.columns; ++x) {
        uint32_t sum = 0;
        for (int64_t c = 0; c < lanes; ++c) sum += static_cast<uint32_t>(row[x * lanes + c]);
        sums[x] = static_cast<int32_t>(sum);
      }
    }
  }
}

template <typename T>
void stage_rows(const ConvShape& s, const Staging<T>& g, const T* padding, const void* image, void* staged,
                int64_t row_begin, int64_t row_end) {
  uint8_t* to = static_cast<uint8_t*>(staged);
  for (int64_t r = row_begin; r < row_end; ++r) {
    if (s.input_dtype == DType::u8)
      stage_row(s, g, padding, static_cast<const uint8_t*>(image), r, to + r * g.row_bytes);
    else
      stage_row(s, g, padding, static_cast<const int8_t*>(image), r, to + r * g.row_bytes);
  }
}

// A window, seen from its first element in the staged rows, is `count` runs of `elements` neighbours: whole kernel
// rows where the columns are adjacent, else single pixels. Weights are laid out in the same order.
template <typename T>
struct Runs {
  Runs(const ConvShape& s, const Staging<T>& g)
      : count(s.dilation_w == 1 ? s.kernel_h : s.kernel_h * s.kernel_w),
        elements(s.dilation_w == 1 ? s.kernel_w * g.lanes : g.lanes),
        per_row(s.dilation_w == 1 ? 1 : s.kernel_w),
        row_step(s.dilation_h * g.row_bytes),
        column_step(s.dilation_w * g.lanes * static_cast<int64_t>(sizeof(T))) {}
  int64_t offset(int64_t run) const { return run / per_row * row_step + run % per_row * column_step; }  // in bytes

  int64_t count, elements, per_row, row_step, column_step;
};

template <typename T>
Runs<T> dense_runs(const ConvShape& s, const Staging<T>& stage, int64_t step) {
  Runs<T> runs(s, stage);
  runs.elements = round_up(runs.elements, step);
  return runs;
}

// The weight mul * code + add at (o, i, ky, kx).
inline int32_t weight_at(const ConvShape& s, const int8_t* codes, int64_t o, int64_t i, int64_t ky, int64_t kx) {
  return s.mul * codes[((o * s.group_in() + i) * s.kernel_h + ky) * s.kernel_w + kx] + s.add;
}

}  // namespace
}  // namespace bitstrata
