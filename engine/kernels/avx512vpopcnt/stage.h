// Input rows as bit-planes. See ../common/pointwise.h for the unnamed namespace.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "cells.h"

namespace bitstrata {
namespace {

inline int64_t min64(int64_t a, int64_t b) { return b < a ? b : a; }
inline int64_t max64(int64_t a, int64_t b) { return a < b ? b : a; }

// The cells of one group in one input row; image_row: null for a row that lies in the padding.
class CellPacker {
 public:
  CellPacker(const ConvShape& s, const Cells& cells, const uint8_t* pad, const uint8_t* image_row, int64_t group,
             uint8_t* staged_row)
      : s_(s),
        cells_(cells),
        pad_(pad + group * s.group_in()),
        row_(image_row == nullptr ? nullptr : image_row + group * s.group_in()),
        words_(staged_row + cells.offset(group, 0, 0)),
        plane_bytes_(cells.count * cells.words * 4),
        sums_(reinterpret_cast<int32_t*>(staged_row + cells.sums_at) + group * cells.count),
        lo_(_mm512_set1_epi8(static_cast<char>(s.input_lo))) {}

  void pack() const {
    int64_t left = cells_.count, right = cells_.count;  // the codes of cells [left, right) are neighbours in the map
    if (row_ != nullptr) {
      left = min64(cells_.count, (s_.pad_left + cells_.step - 1) / cells_.step);
      const int64_t last = s_.in_w + s_.pad_left - cells_.columns;  // the first column of a cell, at most
      right = last < 0 ? left : max64(left, min64(cells_.count, last / cells_.step + 1));
    }
    for (int64_t cell = 0; cell < left; ++cell) pack_gathered(cell);
    pack_neighbours(left, right);
    for (int64_t cell = right; cell < cells_.count; ++cell) pack_gathered(cell);
  }

 private:
  // Codes [begin, begin + 64) of a cell, as far as there are so many. Returns their sum.
  int64_t pack_part(const uint8_t* from, int64_t begin, uint8_t* to) const {
    const int64_t left = cells_.codes - begin;
    const __mmask64 mask = left >= 64 ? ~uint64_t{0} : ~uint64_t{0} >> (64 - left);
    __m512i codes = _mm512_maskz_sub_epi8(mask, _mm512_maskz_loadu_epi8(mask, from), lo_);
    int64_t sum = 0;
    for (int64_t plane = 0; plane < cells_.planes; ++plane, to += plane_bytes_) {
      const uint64_t bits = _mm512_test_epi8_mask(codes, _mm512_set1_epi8(1));
      codes = _mm512_srli_epi16(codes, 1);
      sum += _mm_popcnt_u64(bits) << plane;
      if (left > 32) {
        std::memcpy(to, &bits, 8);
      } else {
        const uint32_t low = static_cast<uint32_t>(bits);
        std::memcpy(to, &low, 4);
      }
    }
    return sum;
  }

  void pack_neighbours(int64_t left, int64_t right) const {
    const uint8_t* from = row_ + (left * cells_.step - s_.pad_left) * s_.in_c;
    uint8_t* to = words_ + left * cells_.words * 4;
    for (int64_t cell = left; cell < right; ++cell, from += cells_.step * s_.in_c, to += cells_.words * 4) {
      int64_t sum = 0;
      for (int64_t begin = 0; begin < cells_.codes; begin += 64) sum += pack_part(from + begin, begin, to + begin / 8);
      sums_[cell] = static_cast<int32_t>(sum);
    }
  }

  // A cell whose codes do not all lie in the map.
  void pack_gathered(int64_t cell) const {
    uint8_t* to = words_ + cell * cells_.words * 4;
    int64_t sum = 0;
    for (int64_t begin = 0; begin < cells_.codes; begin += 64) {
      uint8_t codes[64];
      gather(cell * cells_.step - s_.pad_left, begin, min64(64, cells_.codes - begin), codes);
      sum += pack_part(codes, begin, to + begin / 8);
    }
    sums_[cell] = static_cast<int32_t>(sum);
  }

  // Codes [begin, begin + count) of the cell whose first column is `first`.
  void gather(int64_t first, int64_t begin, int64_t count, uint8_t* to) const {
    const int64_t in = s_.group_in();
    int64_t column = begin / in, channel = begin % in;
    for (int64_t done = 0; done < count; ++column, channel = 0) {
      const int64_t x = first + column, part = min64(in - channel, count - done);
      const uint8_t* from = row_ != nullptr && x >= 0 && x < s_.in_w ? row_ + x * s_.in_c : pad_;
      std::memcpy(to + done, from + channel, static_cast<size_t>(part));
      done += part;
    }
  }

  const ConvShape& s_;
  const Cells& cells_;
  const uint8_t *pad_, *row_;
  uint8_t* words_;  // of the first cell in the first plane
  int64_t plane_bytes_;
  int32_t* sums_;
  __m512i lo_;
};

// sums: of cells, columns; to: of the rows of windows.
inline void add_columns(const ConvShape& s, const int32_t* sums, int32_t* to) {
  for (int64_t x = 0; x < s.out_w; ++x) to[x] = sums[x * s.stride_w];
  for (int64_t kx = 1; kx < s.kernel_w; ++kx)
    for (int64_t x = 0; x < s.out_w; ++x) to[x] += sums[x * s.stride_w + kx * s.dilation_w];
}

// pad: (in_c,) codes as bytes.
inline void stage_planes(const ConvShape& s, const Cells& cells, const uint8_t* pad, const uint8_t* image,
                         uint8_t* staged, int64_t row_begin, int64_t row_end) {
  for (int64_t r = row_begin; r < row_end; ++r) {
    const int64_t y = r - s.pad_top;
    const uint8_t* from = y >= 0 && y < s.in_h ? image + y * s.in_w * s.in_c : nullptr;
    uint8_t* to = staged + r * cells.row_bytes;
    for (int64_t group = 0; group < s.groups; ++group) {
      CellPacker(s, cells, pad, from, group, to).pack();
      if (!cells.of_outputs)
        add_columns(s, reinterpret_cast<const int32_t*>(to + cells.sums_at) + group * cells.count,
                    reinterpret_cast<int32_t*>(to + cells.window_sums_at) + group * s.out_w);
    }
  }
}

// Of output pixels (y, x) to (y, x + count - 1), factor * the sum over their windows, wrapping.
inline void sum_windows(const ConvShape& s, const Cells& cells, const uint8_t* staged, int64_t group, int64_t y,
                        int64_t x, int64_t count, int32_t factor, int32_t* to) {
  std::memset(to, 0, static_cast<size_t>(count) * 4);
  if (factor == 0) return;
  for (int64_t ky = 0; ky < s.kernel_h; ++ky) {
    const uint8_t* row = staged + (y * s.stride_h + ky * s.dilation_h) * cells.row_bytes + cells.window_sums_at;
    const int32_t* sums = reinterpret_cast<const int32_t*>(row) + group * s.out_w + x;
    for (int64_t i = 0; i < count; ++i) to[i] += sums[i];
  }
  for (int64_t i = 0; i < count; ++i)
    to[i] = static_cast<int32_t>(static_cast<uint32_t>(to[i]) * static_cast<uint32_t>(factor));
}

}  // namespace
}  // namespace bitstrata
