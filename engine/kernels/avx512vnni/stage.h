// Staging by a kernel's own copy of pixels; see ../common/conv_stage.h for what is staged.
#pragma once

#include <cstring>

#include "../common/conv_stage.h"

namespace bitstrata {
namespace {

// Rows of one group without sums. copy(from, pixels, to) stages successive pixels of the map.
template <typename Copy>
void stage_rows_by(const ConvShape& s, const Staging<uint8_t>& g, const uint8_t* padding, const void* image,
                   void* staged, int64_t row_begin, int64_t row_end, const Copy& copy) {
  for (int64_t r = row_begin; r < row_end; ++r) {
    const int64_t y = r - s.pad_top;
    uint8_t* row = static_cast<uint8_t*>(staged) + r * g.row_bytes;
    int64_t left = g.columns, right = g.columns;  // columns [left, right) lie in the map
    if (y >= 0 && y < s.in_h && s.pad_left < g.columns) {
      left = s.pad_left;
      right = left + s.in_w < g.columns ? left + s.in_w : g.columns;
    }
    for (int64_t x = 0; x < left; ++x) std::memcpy(row + x * g.lanes, padding, static_cast<size_t>(g.lanes));
    for (int64_t x = right; x < g.columns; ++x) std::memcpy(row + x * g.lanes, padding, static_cast<size_t>(g.lanes));
    if (left < right)
      copy(static_cast<const uint8_t*>(image) + y * s.in_w * s.in_c, right - left, row + left * g.lanes);
  }
}

}  // namespace
}  // namespace bitstrata
