// Staging of the rows that cells.h describes. See pointwise.h for the unnamed namespace.
#pragma once

#include <cstdint>
#include <cstring>

#include "cells.h"

namespace bitstrata {
namespace {

constexpr int64_t kPart = 64;  // codes that are packed at once

// The cells of one group in one input row; image_row: null for a row that lies in the padding.
// PackPart(from, count, to, digit_bytes) writes the words of up to kPart codes, all digits, and returns the sum of the
// codes, moved to begin at 0.
template <typename PackPart>
class CellPacker {
 public:
  CellPacker(const ConvShape& s, const Cells& cells, const PackPart& pack_part, const uint8_t* pad,
             const uint8_t* image_row, int64_t group, uint8_t* staged_row)
      : s_(s),
        cells_(cells),
        pack_part_(pack_part),
        pad_(pad + group * s.group_in()),
        row_(image_row == nullptr ? nullptr : image_row + group * s.group_in()),
        words_(staged_row + cells.offset(group, 0)),
        part_bytes_(kPart / cells.word_codes * cells.word_bytes),
        sums_(reinterpret_cast<int32_t*>(staged_row + cells.sums_at) + group * cells.count) {}

  void pack() const {
    int64_t left = cells_.count, right = cells_.count;  // the codes of cells [left, right) are neighbours in the map
    if (row_ != nullptr) {
      left = least(cells_.count, (s_.pad_left + cells_.step - 1) / cells_.step);
      const int64_t last = s_.in_w + s_.pad_left - cells_.columns;  // the first column of a cell, at most
      right = last < 0 ? left : most(left, least(cells_.count, last / cells_.step + 1));
    }
    pack_border(0, left);
    pack_neighbours(left, right);
    pack_border(right, cells_.count);
  }

 private:
  void pack_neighbours(int64_t left, int64_t right) const {
    if (left == right) return;
    const uint8_t* from = row_ + (left * cells_.step - s_.pad_left) * s_.in_c;
    uint8_t* to = words_ + left * cells_.cell_bytes;
    for (int64_t cell = left; cell < right; ++cell, from += cells_.step * s_.in_c, to += cells_.cell_bytes) {
      int64_t sum = 0;
      uint8_t* at = to;
      for (int64_t begin = 0; begin < cells_.codes; begin += kPart, at += part_bytes_)
        sum += pack_part_(from + begin, least(kPart, cells_.codes - begin), at, cells_.digit_bytes);
      sums_[cell] = static_cast<int32_t>(sum);
    }
  }

  // Cells whose codes do not all lie in the map.
  void pack_border(int64_t begin, int64_t end) const {
    if (begin == end) return;
    pack_gathered(begin);
    if (row_ != nullptr && cells_.columns > 1) {
      for (int64_t cell = begin + 1; cell < end; ++cell) pack_gathered(cell);
      return;
    }
    const int64_t bytes = cells_.cell_bytes;  // pad codes alone: all the cells are the same
    for (int64_t digit = 0; digit < cells_.digits; ++digit) {
      uint8_t* first = words_ + digit * cells_.digit_bytes;
      for (int64_t cell = begin + 1; cell < end; ++cell)
        std::memcpy(first + cell * bytes, first + begin * bytes, static_cast<size_t>(bytes));
    }
    for (int64_t cell = begin + 1; cell < end; ++cell) sums_[cell] = sums_[begin];
  }

  void pack_gathered(int64_t cell) const {
    uint8_t* to = words_ + cell * cells_.cell_bytes;
    int64_t sum = 0;
    for (int64_t begin = 0; begin < cells_.codes; begin += kPart, to += part_bytes_) {
      uint8_t codes[kPart];
      const int64_t count = least(kPart, cells_.codes - begin);
      gather(cell * cells_.step - s_.pad_left, begin, count, codes);
      sum += pack_part_(codes, count, to, cells_.digit_bytes);
    }
    sums_[cell] = static_cast<int32_t>(sum);
  }

  // Codes [begin, begin + count) of the cell whose first column is `first`.
  void gather(int64_t first, int64_t begin, int64_t count, uint8_t* to) const {
    const int64_t in = s_.group_in();
    int64_t column = begin / in, channel = begin % in;
    for (int64_t done = 0; done < count; ++column, channel = 0) {
      const int64_t x = first + column, part = least(in - channel, count - done);
      const uint8_t* from = row_ != nullptr && x >= 0 && x < s_.in_w ? row_ + x * s_.in_c : pad_;
      std::memcpy(to + done, from + channel, static_cast<size_t>(part));
      done += part;
    }
  }

  const ConvShape& s_;
  const Cells& cells_;
  const PackPart& pack_part_;
  const uint8_t *pad_, *row_;
  uint8_t* words_;  // of the first cell in the first digit
  int64_t part_bytes_;
  int32_t* sums_;
};

// Overlapping cells of an input row: bits of neighbours without gaps, from left to right, since what is written beyond
// some codes is the next ones' place.
template <typename PackPart>
void pack_overlapping(const ConvShape& s, const Cells& cells, const PackPart& pack_part, const uint8_t* pad,
                      const uint8_t* image_row, uint8_t* staged_row) {
  const int64_t left = image_row == nullptr ? cells.count : least(s.pad_left, cells.count);
  const int64_t inside = image_row == nullptr ? 0 : least(s.in_w, cells.count - left) * s.in_c;
  const auto pack = [&](const uint8_t* codes, int64_t count, int64_t cell) {
    uint8_t* to = staged_row + cell * cells.cell_bytes;
    for (int64_t i = 0; i < count; i += kPart, to += kPart / 8)
      pack_part(codes + i, least(kPart, count - i), to, cells.digit_bytes);
  };
  for (int64_t x = 0; x < left; ++x) pack(pad, s.in_c, x);
  pack(image_row, inside, left);
  for (int64_t x = left + inside / s.in_c; x < cells.count; ++x) pack(pad, s.in_c, x);
  int32_t* sums = reinterpret_cast<int32_t*>(staged_row + cells.sums_at);
  std::memset(sums, 0, static_cast<size_t>(cells.count) * 4);
  for (int64_t digit = 0; digit < cells.digits; ++digit)
    for (int64_t b = 0; b < cells.cell_bytes; b += 8) {  // eight bytes at a time, which may reach beyond a cell
      const uint64_t own = ~uint64_t{0} >> (64 - 8 * least(8, cells.cell_bytes - b));
      const uint8_t* from = staged_row + digit * cells.digit_bytes + b;
      for (int64_t x = 0; x < cells.count; ++x, from += cells.cell_bytes) {
        uint64_t bits;
        std::memcpy(&bits, from, 8);
        sums[x] += static_cast<int32_t>(__builtin_popcountll(bits & own)) << digit;
      }
    }
}

// sums: of cells, columns; to: of the rows of windows.
inline void add_columns(const ConvShape& s, const uint32_t* sums, uint32_t* to) {
  for (int64_t x = 0; x < s.out_w; ++x) to[x] = sums[x * s.stride_w];
  for (int64_t kx = 1; kx < s.kernel_w; ++kx)
    for (int64_t x = 0; x < s.out_w; ++x) to[x] += sums[x * s.stride_w + kx * s.dilation_w];
}

// pad: (in_c,) codes as bytes.
template <typename PackPart>
void stage_cells(const ConvShape& s, const Cells& cells, const PackPart& pack_part, const uint8_t* pad,
                 const uint8_t* image, uint8_t* staged, int64_t row_begin, int64_t row_end) {
  for (int64_t r = row_begin; r < row_end; ++r) {
    if (Cells::unread(s, r)) continue;
    const int64_t y = r - s.pad_top;
    const uint8_t* from = y >= 0 && y < s.in_h ? image + y * s.in_w * s.in_c : nullptr;
    uint8_t* to = staged + r * cells.row_bytes;
    for (int64_t group = 0; group < s.groups; ++group) {
      if (cells.overlap)
        pack_overlapping(s, cells, pack_part, pad, from, to);
      else
        CellPacker<PackPart>(s, cells, pack_part, pad, from, group, to).pack();
      if (!cells.of_outputs || cells.overlap)
        add_columns(s, reinterpret_cast<const uint32_t*>(to + cells.sums_at) + group * cells.count,
                    reinterpret_cast<uint32_t*>(to + cells.window_sums_at) + group * s.out_w);
    }
  }
}

}  // namespace
}  // namespace bitstrata
