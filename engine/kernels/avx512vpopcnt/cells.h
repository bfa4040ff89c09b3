// How input rows are staged as bit-planes. See ../common/pointwise.h for the unnamed namespace.
//
// A staged row is made of cells: the channels of one padded column or, where they would leave much of their words
// empty, those of all the columns under one output pixel. It is [group][plane][cell][word] uint32, then [group][cell]
// int32: the sum over a cell's codes; then [group][output column] int32: the sum over the row of a window.
#pragma once

#include <cstdint>

#include "../common/code_planes.h"

namespace bitstrata {
namespace {

inline int64_t words_of(int64_t bits) { return (bits + 31) / 32; }

struct Cells {
  Cells(const ConvShape& s, const CodePlanes& form)
      : planes(form.input_bits),
        of_outputs(s.groups == 1 && s.dilation_w == 1 && words_of(s.kernel_w * s.in_c) < s.kernel_w * words_of(s.in_c)),
        count(of_outputs ? s.out_w : s.padded_w()),
        columns(of_outputs ? s.kernel_w : 1),
        codes(columns * s.group_in()),
        words(words_of(codes)),
        step(of_outputs ? s.stride_w : 1),
        per_row(of_outputs ? 1 : s.kernel_w),
        sums_at(s.groups * planes * count * words * 4),
        window_sums_at(of_outputs ? sums_at : sums_at + s.groups * count * 4),
        row_bytes(window_sums_at + s.groups * s.out_w * 4) {}
  int64_t first(const ConvShape& s, int64_t x) const { return of_outputs ? x : x * s.stride_w; }
  // Bytes from the first word of a plane of a row to that of a cell.
  int64_t offset(int64_t group, int64_t plane, int64_t cell) const {
    return (((group * planes + plane) * count) + cell) * words * 4;
  }

  int64_t planes;
  bool of_outputs;
  int64_t count;    // cells of a row
  int64_t columns;  // of a cell
  int64_t codes;    // of a cell
  int64_t words;    // of a cell and plane
  int64_t step;     // columns from cell to cell
  int64_t per_row;  // cells of a row of the kernel
  int64_t sums_at;  // of cells, which are those of windows if cells are of outputs
  int64_t window_sums_at, row_bytes;
};

}  // namespace
}  // namespace bitstrata
