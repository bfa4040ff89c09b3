// Portable kernels without weights. Each instruction set compiles its own copy with its own flags, hence the unnamed
// namespace: a copy must never be linked into another instruction set's table row.
#pragma once

#include <cstdint>
#include <limits>

#include "bitstrata/kernels.h"

namespace bitstrata {
namespace {

template <typename T>
inline T smaller(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
inline T larger(T a, T b) {
  return a < b ? b : a;
}

inline int64_t requant_one(const RequantArgs& a, int64_t c, int64_t x) {
  const uint64_t y =
      static_cast<uint64_t>(x) * static_cast<uint64_t>(a.multiplier[c]) + static_cast<uint64_t>(a.bias[c]);
  return smaller<int64_t>(larger<int64_t>(static_cast<int64_t>(y) >> a.shift[c], a.lo), a.hi);
}

template <typename In, typename Out>
void requant(const RequantArgs& a, const void* x, void* out, int64_t pixels) {
  const In* in = static_cast<const In*>(x);
  Out* to = static_cast<Out*>(out);
  for (int64_t p = 0; p < pixels; ++p, in += a.channels, to += a.channels)
    for (int64_t c = 0; c < a.channels; ++c) to[c] = static_cast<Out>(requant_one(a, c, in[c]));
}

// The alignment of an addition in 32-bit arithmetic. Right: (v + 2^(s-1)) >> s = (v >> s) + bit s-1 of v, and for s >
// 31 it is 0. Left shifts and the sum wrap.
struct Align {
  explicit Align(int shift)
      : left(shift < 0 ? -shift : 0),
        right(smaller(larger(shift, 0), 31)),
        half(larger(right - 1, 0)),
        round(shift > 0 ? 1 : 0),
        keep(shift > 31 ? 0 : ~uint32_t{0}) {}
  uint32_t operator()(int32_t v) const {
    const uint32_t bit = static_cast<uint32_t>(v >> half) & round;
    return ((static_cast<uint32_t>(v >> right) + bit) << left) & keep;
  }
  int left, right, half;
  uint32_t round, keep;
};

inline void add(const int32_t* a, const int32_t* b, int32_t* out, int64_t count, int shift_a, int shift_b) {
  const Align align_a(shift_a), align_b(shift_b);
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<int32_t>(align_a(a[i]) + align_b(b[i]));
}

template <typename T>
void clip(const void* x, void* out, int64_t count, int32_t lo, int32_t hi) {
  const T* in = static_cast<const T*>(x);
  T* to = static_cast<T*>(out);
  const T low = static_cast<T>(lo), high = static_cast<T>(hi);
  for (int64_t i = 0; i < count; ++i) to[i] = smaller(larger(in[i], low), high);
}

// The part of a pooling window inside the map, on one axis.
struct Window {
  Window(int64_t start, int64_t kernel, int64_t size)
      : begin(larger<int64_t>(start, 0)), end(smaller(start + kernel, size)) {}
  int64_t begin, end;
};

constexpr int64_t kPoolBytes = 256;  // of channels together, at most: half of the registers

// Of `count` channels: the largest of rows x columns pixels. Where the count is a constant, in registers.
template <typename T>
inline void largest_of(const T* from, int64_t rows, int64_t row_step, int64_t columns, int64_t step, int64_t count,
                       T* to) {
  T most[kPoolBytes / sizeof(T)];
  for (int64_t c = 0; c < count; ++c) most[c] = std::numeric_limits<T>::lowest();
  for (int64_t v = 0; v < rows; ++v, from += row_step)
    for (int64_t u = 0; u < columns; ++u)
      for (int64_t c = 0; c < count; ++c) most[c] = larger(most[c], from[u * step + c]);
  for (int64_t c = 0; c < count; ++c) to[c] = most[c];
}

template <typename T>
void max_pool(const PoolShape& s, const void* x, void* out, int64_t row_begin, int64_t row_end) {
  constexpr int64_t kBlock = kPoolBytes / sizeof(T), kPart = kBlock / 4;  // channels together
  const T* in = static_cast<const T*>(x);
  const int64_t row_step = s.in_w * s.channels;
  for (int64_t y = row_begin; y < row_end; ++y) {
    const Window h(y * s.stride_h - s.pad_top, s.kernel_h, s.in_h);
    T* to = static_cast<T*>(out) + y * s.out_w * s.channels;
    for (int64_t i = 0; i < s.out_w; ++i, to += s.channels) {
      const Window w(i * s.stride_w - s.pad_left, s.kernel_w, s.in_w);
      const T* from = in + (h.begin * s.in_w + w.begin) * s.channels;
      const int64_t rows = h.end - h.begin, columns = w.end - w.begin;
      int64_t c = 0;
      for (; c + kBlock <= s.channels; c += kBlock)
        largest_of(from + c, rows, row_step, columns, s.channels, kBlock, to + c);
      for (; c + kPart <= s.channels; c += kPart)
        largest_of(from + c, rows, row_step, columns, s.channels, kPart, to + c);
      if (c < s.channels) largest_of(from + c, rows, row_step, columns, s.channels, s.channels - c, to + c);
    }
  }
}

// The shifted sum is truncated to Out.
template <typename T, typename Out>
void sum_pool(const PoolShape& s, const void* x, void* out, int64_t row_begin, int64_t row_end) {
  constexpr int64_t kBlock = 64;  // channels summed together
  const T* in = static_cast<const T*>(x);
  const int64_t half = s.shift > 0 ? int64_t{1} << (s.shift - 1) : 0;
  for (int64_t y = row_begin; y < row_end; ++y) {
    const Window h(y * s.stride_h - s.pad_top, s.kernel_h, s.in_h);
    for (int64_t i = 0; i < s.out_w; ++i) {
      const Window w(i * s.stride_w - s.pad_left, s.kernel_w, s.in_w);
      Out* to = static_cast<Out*>(out) + (y * s.out_w + i) * s.channels;
      for (int64_t c0 = 0; c0 < s.channels; c0 += kBlock) {
        const int64_t count = smaller(kBlock, s.channels - c0);
        int64_t sum[kBlock] = {};
        for (int64_t v = h.begin; v < h.end; ++v)
          for (int64_t u = w.begin; u < w.end; ++u) {
            const T* from = in + (v * s.in_w + u) * s.channels + c0;
            for (int64_t c = 0; c < count; ++c) sum[c] += from[c];
          }
        for (int64_t c = 0; c < count; ++c) to[c0 + c] = static_cast<Out>((sum[c] + half) >> s.shift);
      }
    }
  }
}

}  // namespace
}  // namespace bitstrata
