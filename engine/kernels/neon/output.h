// What convolutions on 128 bits do with their sums. See ../common/pointwise.h for the unnamed namespace.
#pragma once

#include <arm_neon.h>

#include <cstring>

#include "../common/step_conv.h"
#include "../common/unroll.h"

namespace bitstrata {
namespace {

// Stores kSums vectors of a pixel's sums, of which `channels` are real.
template <int kSums>
inline void store_sums(const int32x4_t (&sum)[kSums], int64_t channels, int32_t* to) {
  if (channels == 4 * kSums) {
    each<kSums>([&](auto j) { vst1q_s32(to + 4 * j, sum[j]); });
    return;
  }
  int32_t row[4 * kSums];
  each<kSums>([&](auto j) { vst1q_s32(row + 4 * j, sum[j]); });
  std::memcpy(to, row, static_cast<size_t>(channels) * 4);
}

// Where a block's sums begin: what takes off the offset of staged activations, or 0 where that comes last.
template <int kP, int kSums, typename Block>
inline void begin_sums(const Block& b, int32x4_t (&sum)[kP][kSums]) {
  each<kSums>([&](auto j) {
    const int32x4_t first = b.p.form.whole ? vld1q_s32(b.correction + 4 * j) : vdupq_n_s32(0);
    each<kP>([&](auto i) { sum[i][j] = first; });
  });
}

// Applies what the packed weights leave out, and stores the block's sums.
template <int kP, int kSums, typename Block>
inline void finish_sums(const Block& b, int32x4_t (&sum)[kP][kSums]) {
  if (!b.p.form.whole)
    each<kSums>([&](auto j) {
      const int32x4_t correction = vld1q_s32(b.correction + 4 * j);
      each<kP>([&](auto i) {
        sum[i][j] = vmlaq_n_s32(vaddq_s32(correction, vdupq_n_s32(b.window_sum[i])), sum[i][j], b.p.form.mul);
      });
    });
  each<kP>([&](auto i) { store_sums(sum[i], b.channels, b.out + i * b.out_pitch); });
}

}  // namespace
}  // namespace bitstrata
