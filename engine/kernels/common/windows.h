// What convolutions by steps of four bytes ask of windows, whatever their vectors. See pointwise.h for the unnamed
// namespace.
#pragma once

#include <cstdint>

#include "weight_form.h"

namespace bitstrata {
namespace {

// add * the sum of the activations of the window at (y, x), wrapping.
template <typename Weights>
int32_t window_sum(const ConvShape& s, const Weights& p, const uint8_t* staged, int64_t group, int64_t y, int64_t x) {
  uint32_t sum = 0;
  for (int64_t ky = 0; ky < s.kernel_h; ++ky) {
    const uint8_t* row = staged + (y * s.stride_h + ky * s.dilation_h) * p.row_bytes + p.stage.sums_at;
    const int32_t* sums = reinterpret_cast<const int32_t*>(row) + group * p.stage.columns + x * s.stride_w;
    for (int64_t kx = 0; kx < s.kernel_w; ++kx) sum += static_cast<uint32_t>(sums[kx * s.dilation_w]);
  }
  return static_cast<int32_t>(sum * static_cast<uint32_t>(p.form.add));
}

// The same of `count` neighbouring windows, from (y, x) on.
template <typename Weights>
void window_sums(const ConvShape& s, const Weights& p, const uint8_t* staged, int64_t group, int64_t y, int64_t x,
                 int64_t count, int32_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = 0;
  for (int64_t ky = 0; ky < s.kernel_h; ++ky) {
    const uint8_t* row = staged + (y * s.stride_h + ky * s.dilation_h) * p.row_bytes + p.stage.sums_at;
    const int32_t* sums = reinterpret_cast<const int32_t*>(row) + group * p.stage.columns + x * s.stride_w;
    for (int64_t kx = 0; kx < s.kernel_w; ++kx, sums += s.dilation_w)
      for (int64_t i = 0; i < count; ++i) out[i] += sums[i * s.stride_w];
  }
  for (int64_t i = 0; i < count; ++i)
    out[i] = static_cast<int32_t>(static_cast<uint32_t>(out[i]) * static_cast<uint32_t>(p.form.add));
}

// Whether windows are pixels of the image itself: unpadded, of one tap and whole steps, taken as they are.
inline bool reads_image(const ConvShape& s, const WeightForm& form) {
  return s.groups == 1 && s.kernel_h == 1 && s.kernel_w == 1 && s.pad_top == 0 && s.pad_left == 0 &&
         s.padded_h() <= s.in_h && s.padded_w() <= s.in_w && s.in_c % 4 == 0 && form.offset == 0;
}

}  // namespace
}  // namespace bitstrata
