// Staged rows of codes cut into digits of a few bits, several codes' digits a word. See pointwise.h for the unnamed
// namespace.
//
// A staged row is made of cells: the channels of one padded column or, where they would leave much of their words
// empty or windows leave out columns, those of all the columns under one output pixel. It is
// [group][digit][cell][word], then [group][cell] int32: the sum over a cell's codes; then [group][output column] int32:
// the sum over the row of a window.
//
// Where bits are counted, columns may also lie without gaps, a whole number of bytes each, so that the windows of
// neighbouring pixels overlap: the words of a window then end with bits beyond it, which meet weights that are 0.
#pragma once

#include <cstdint>
#include <cstring>

#include "bitstrata/kernels.h"

namespace bitstrata {
namespace {

inline int64_t least(int64_t a, int64_t b) { return b < a ? b : a; }
inline int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }

struct Cells {
  static constexpr int64_t kBeyond = 8;  // bytes after overlapping cells that are written or read with the last ones

  // Words of word_bytes that hold word_codes digits each. may_overlap: the windows of digits of one bit.
  Cells(const ConvShape& s, int64_t digits, int64_t word_codes, int64_t word_bytes, bool may_overlap = false)
      : digits(digits),
        word_codes(word_codes),
        word_bytes(word_bytes),
        of_outputs(s.groups == 1 && s.dilation_w == 1 &&
                   (words_of(s.kernel_w * s.in_c) < s.kernel_w * words_of(s.in_c) || s.kernel_w < s.stride_w)),
        overlap(may_overlap && of_outputs && s.in_c % 8 == 0 && s.kernel_w > s.stride_w),
        count(of_outputs && !overlap ? s.out_w : s.padded_w()),
        columns(of_outputs ? s.kernel_w : 1),
        codes(columns * s.group_in()),
        words(words_of(codes)),
        step(of_outputs && !overlap ? s.stride_w : 1),
        per_row(of_outputs ? 1 : s.kernel_w),
        cell_bytes(overlap ? s.in_c / 8 : words * word_bytes),
        digit_bytes(overlap ? (count * cell_bytes + kBeyond + 3) / 4 * 4 : count * cell_bytes),
        sums_at((s.groups * digits * digit_bytes + 3) / 4 * 4),
        window_sums_at(of_outputs && !overlap ? sums_at : sums_at + s.groups * count * 4),
        row_bytes(window_sums_at + s.groups * s.out_w * 4) {}

  int64_t words_of(int64_t n) const { return (n + word_codes - 1) / word_codes; }
  // Whether windows leave out a staged row.
  static bool unread(const ConvShape& s, int64_t row) { return s.dilation_h == 1 && row % s.stride_h >= s.kernel_h; }
  static int64_t read_rows(const ConvShape& s) {
    return s.dilation_h == 1 && s.kernel_h < s.stride_h ? s.out_h * s.kernel_h : s.padded_h();
  }
  int64_t first(const ConvShape& s, int64_t x) const {  // of a window
    return of_outputs && !overlap ? x : x * s.stride_w;
  }
  // Bytes from the start of a row to a cell.
  int64_t offset(int64_t group, int64_t cell) const { return group * digits * digit_bytes + cell * cell_bytes; }

  int64_t digits, word_codes, word_bytes;
  bool of_outputs, overlap;
  int64_t count;        // cells of a row
  int64_t columns;      // of a cell
  int64_t codes;        // of a cell
  int64_t words;        // of a cell and digit
  int64_t step;         // columns from cell to cell
  int64_t per_row;      // cells of a row of the kernel
  int64_t cell_bytes;   // from cell to cell in one digit
  int64_t digit_bytes;  // from digit to digit
  int64_t sums_at;      // of cells, which are those of windows if cells are of outputs
  int64_t window_sums_at, row_bytes;
};

// The words of a window in one digit: `rows` times `per_row` runs of neighbours, `bytes` bytes each.
struct CellRuns {
  CellRuns(const ConvShape& s, const Cells& c)
      : rows(s.kernel_h),
        per_row(s.dilation_w == 1 ? 1 : c.per_row),
        bytes((s.dilation_w == 1 ? c.per_row : 1) * c.words * c.word_bytes),
        row_step(s.dilation_h * c.row_bytes),
        column_step(s.dilation_w * c.cell_bytes) {}
  int64_t rows, per_row, bytes, row_step, column_step;
};

// The weights of one output channel in the order of a window's words: visit(word, moved) for each word, with word_codes
// codes moved by code_lo, 0 where there is none. codes: (channel, tap). Returns the sum of the moved codes.
template <int kWordCodes, typename Visit>
int64_t visit_weights(const ConvShape& s, const Cells& cells, const int8_t* codes, const Visit& visit) {
  const int64_t taps = s.kernel_h * s.kernel_w, in = s.group_in();
  int64_t sum = 0, at = 0;
  for (int64_t first_tap = 0; first_tap < taps; first_tap += cells.columns) {
    int64_t tap = first_tap, channel = 0;
    for (int64_t left = cells.codes; left > 0; left -= kWordCodes) {
      uint8_t moved[kWordCodes] = {};
      for (int64_t i = 0; i < kWordCodes && i < left; ++i) {
        moved[i] = static_cast<uint8_t>(codes[channel * taps + tap] - s.code_lo);
        sum += moved[i];
        if (++channel == in) channel = 0, ++tap;
      }
      visit(at++, moved);
    }
  }
  return sum;
}

// Where the windows of `pixels` output pixels from number `begin` start in the staged rows, and factor * the sum of
// each one's codes, wrapping.
inline void find_windows(const ConvShape& s, const Cells& cells, const uint8_t* staged, int64_t group, int64_t begin,
                         int64_t pixels, uint32_t factor, const uint8_t** window, uint32_t* sums) {
  const int64_t step = cells.first(s, 1) * cells.cell_bytes;
  for (int64_t i = 0; i < pixels;) {
    const int64_t y = (begin + i) / s.out_w, x = (begin + i) % s.out_w;
    const int64_t count = least(s.out_w - x, pixels - i);
    const uint8_t* row = staged + y * s.stride_h * cells.row_bytes;
    const uint8_t* first = row + cells.offset(group, cells.first(s, x));
    for (int64_t j = 0; j < count; ++j) window[i + j] = first + j * step;
    std::memset(sums + i, 0, static_cast<size_t>(count) * 4);
    for (int64_t ky = 0; ky < s.kernel_h; ++ky, row += s.dilation_h * cells.row_bytes) {
      const uint32_t* of_row = reinterpret_cast<const uint32_t*>(row + cells.window_sums_at) + group * s.out_w + x;
      for (int64_t j = 0; j < count; ++j) sums[i + j] += of_row[j];
    }
    for (int64_t j = i; j < i + count; ++j) sums[j] *= factor;
    i += count;
  }
}

}  // namespace
}  // namespace bitstrata
