// The weight gradient by plain loops, for any shape; sums are in the order of the weights. The inner loop runs over
// channels where each group has one input and one output channel, else over the input channels of a group. See
// pointwise.h for the unnamed namespace.
#pragma once

#include <cstdint>
#include <cstring>

#include "bitstrata/kernels.h"
#include "weight_sums.h"

namespace bitstrata {
namespace {

struct PlainWeightGrad {
  static bool depthwise(const ConvShape& s) { return s.group_in() == 1 && s.group_out() == 1; }
  static int64_t taps(const ConvShape& s) { return s.kernel_h * s.kernel_w; }
  static int64_t sums(const ConvShape& s) { return s.out_c * s.group_in() * taps(s); }
  static int64_t scratch_bytes(const ConvShape&, int64_t, int64_t) { return 0; }

  // Sums are [out_c][tap][in_c / groups], or depthwise [tap][channel].
  template <typename In>
  static void pixel(const ConvShape& s, const In* x, const int8_t* g, int64_t tap, int32_t* sums) {
    uint32_t* to = reinterpret_cast<uint32_t*>(sums);
    if (depthwise(s)) {
      to += tap * s.out_c;
      for (int64_t c = 0; c < s.out_c; ++c) to[c] += static_cast<uint32_t>(int32_t{x[c]} * g[c]);
      return;
    }
    const int64_t ins = s.group_in(), outs = s.group_out();
    to += tap * ins;
    for (int64_t o = 0; o < s.out_c; ++o, to += taps(s) * ins) {
      const In* from = x + o / outs * ins;
      const int32_t factor = g[o];
      for (int64_t i = 0; i < ins; ++i) to[i] += static_cast<uint32_t>(int32_t{from[i]} * factor);
    }
  }

  template <typename In>
  static void image(const ConvShape& s, const In* x, const int8_t* g, int64_t row_begin, int64_t row_end,
                    int32_t* sums) {
    for (int64_t y = row_begin; y < row_end; ++y)
      for (int64_t ky = 0; ky < s.kernel_h; ++ky) {
        const int64_t in_y = y * s.stride_h - s.pad_top + ky * s.dilation_h;
        if (in_y < 0 || in_y >= s.in_h) continue;
        for (int64_t kx = 0; kx < s.kernel_w; ++kx)
          for (int64_t i = 0; i < s.out_w; ++i) {
            const int64_t in_x = i * s.stride_w - s.pad_left + kx * s.dilation_w;
            if (in_x < 0 || in_x >= s.in_w) continue;
            pixel(s, x + (in_y * s.in_w + in_x) * s.in_c, g + (y * s.out_w + i) * s.out_c, ky * s.kernel_w + kx, sums);
          }
      }
  }

  static void add(const ConvShape& s, const void* x, const int8_t* g, int64_t images, int64_t row_begin,
                  int64_t row_end, void*, int32_t* sums, bool fresh) {
    if (fresh) std::memset(sums, 0, static_cast<size_t>(PlainWeightGrad::sums(s)) * 4);
    const int64_t in_size = s.in_h * s.in_w * s.in_c, out_size = s.out_h * s.out_w * s.out_c;
    for (int64_t i = 0; i < images; ++i) {
      if (s.input_dtype == DType::u8)
        image(s, static_cast<const uint8_t*>(x) + i * in_size, g + i * out_size, row_begin, row_end, sums);
      else
        image(s, static_cast<const int8_t*>(x) + i * in_size, g + i * out_size, row_begin, row_end, sums);
    }
  }

  template <typename Sum>
  static void read(const ConvShape& s, const int32_t* sums, const WeightBlock& b, Sum* rows, int64_t pitch,
                   bool fresh) {
    const int64_t ins = s.group_in();
    for (int64_t o = b.out_begin; o < b.out_end; ++o, rows += pitch)
      for (int64_t tap = 0; tap < taps(s); ++tap)
        for (int64_t i = b.in_begin; i < b.in_end; ++i) {
          Sum& to = rows[(i - b.in_begin) * taps(s) + tap];
          const int32_t sum = depthwise(s) ? sums[tap * s.out_c + o] : sums[(o * taps(s) + tap) * ins + i];
          to = fresh ? sum : added(to, sum);
        }
  }

  static constexpr WeightGradKernel kernel(const char* name) {
    return {name, sums, scratch_bytes, add, read<int64_t>, read<int32_t>};
  }
};

}  // namespace
}  // namespace bitstrata
