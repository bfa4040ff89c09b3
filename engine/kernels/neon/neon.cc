// The NEON row of the dispatch table, its requantization and its addition. The other kernels are the portable ones,
// which compilers vectorize with NEON, as every AArch64 processor has it.
#include "neon.h"

#include <arm_neon.h>

#include "../common/pointwise.h"
#include "../common/unroll.h"

namespace bitstrata {

extern const Training kGenericTraining;
namespace {

// Pixels requantized together, so that a block of channels' constants are loaded once for all of them.
constexpr int64_t kPixels = 16;

inline void store_eight(int32_t* to, int32x4_t low, int32x4_t high) {
  vst1q_s32(to, low);
  vst1q_s32(to + 4, high);
}
// The results fit the type: bits are dropped.
inline int8x8_t to_bytes(int32x4_t low, int32x4_t high) {
  return vmovn_s16(vuzp1q_s16(vreinterpretq_s16_s32(low), vreinterpretq_s16_s32(high)));
}
inline void store_eight(int8_t* to, int32x4_t low, int32x4_t high) { vst1_s8(to, to_bytes(low, high)); }
inline void store_eight(uint8_t* to, int32x4_t low, int32x4_t high) {
  vst1_u8(to, vreinterpret_u8_s8(to_bytes(low, high)));
}

// Four channels in 64 bits. What saturates to int32 lies beyond lo or hi.
struct Long {
  Long(const RequantArgs& a, int64_t c) : lo(vdupq_n_s32(a.lo)), hi(vdupq_n_s32(a.hi)) {
    multiplier = vcombine_s32(vmovn_s64(vld1q_s64(a.multiplier + c)), vmovn_s64(vld1q_s64(a.multiplier + c + 2)));
    each<2>([&](auto i) {
      bias[i] = vld1q_s64(a.bias + c + 2 * i);
      shift[i] = vnegq_s64(vld1q_s64(a.shift + c + 2 * i));
    });
  }
  int32x4_t operator()(int32x4_t x) const {
    const int64x2_t low = vaddq_s64(vmull_s32(vget_low_s32(x), vget_low_s32(multiplier)), bias[0]);
    const int64x2_t high = vaddq_s64(vmull_high_s32(x, multiplier), bias[1]);
    const int32x4_t y = vqmovn_high_s64(vqmovn_s64(vshlq_s64(low, shift[0])), vshlq_s64(high, shift[1]));
    return vminq_s32(vmaxq_s32(y, lo), hi);
  }
  int32x4_t lo, hi, multiplier;
  int64x2_t bias[2], shift[2];  // shifts to the left, hence negative
};

// Four channels in 32 bits, where that was proved to give the same integers.
struct Short {
  Short(const RequantArgs& a, int64_t c)
      : from(vld1q_s32(a.from + c)),
        to(vld1q_s32(a.to + c)),
        factor(vld1q_s32(a.factor + c)),
        addend(vld1q_s32(a.addend + c)),
        shift(vnegq_s32(vld1q_s32(a.places + c))) {}
  int32x4_t operator()(int32x4_t x) const {
    return vshlq_s32(vmlaq_s32(addend, vminq_s32(vmaxq_s32(x, from), to), factor), shift);
  }
  int32x4_t from, to, factor, addend, shift;
};

template <typename Constants, typename Out>
inline void requant_eight(const RequantArgs& a, int64_t c, const int32_t* x, Out* to, int64_t pixels) {
  const Constants low(a, c), high(a, c + 4);
  for (int64_t p = 0; p < pixels; ++p, x += a.channels, to += a.channels)
    store_eight(to, low(vld1q_s32(x)), high(vld1q_s32(x + 4)));
}

template <typename Out>
void requant_i32(const RequantArgs& a, const void* x, void* out, int64_t pixels) {
  const int32_t* in = static_cast<const int32_t*>(x);
  Out* to = static_cast<Out*>(out);
  for (int64_t first = 0; first < pixels; first += kPixels, in += kPixels * a.channels, to += kPixels * a.channels) {
    const int64_t some = smaller(kPixels, pixels - first);
    int64_t c = 0;
    for (; c + 8 <= a.channels; c += 8) {
      if (a.form_of(c) == RequantForm::low)
        requant_eight<Short>(a, c, in + c, to + c, some);
      else
        requant_eight<Long>(a, c, in + c, to + c, some);
    }
    for (int64_t i = c; i < a.channels; ++i)
      for (int64_t p = 0; p < some; ++p)
        to[p * a.channels + i] = static_cast<Out>(requant_one(a, i, in[p * a.channels + i]));
  }
}

// A rounding shift by any number of places, as the addition defines it, is one instruction; to the left it wraps.
void add_aligned(const int32_t* a, const int32_t* b, int32_t* out, int64_t count, int shift_a, int shift_b) {
  const int32x4_t left_a = vdupq_n_s32(-shift_a), left_b = vdupq_n_s32(-shift_b);
  const auto sum = [&](int64_t i) {
    return vaddq_s32(vrshlq_s32(vld1q_s32(a + i), left_a), vrshlq_s32(vld1q_s32(b + i), left_b));
  };
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const int32x4_t low = sum(i), high = sum(i + 4);
    store_eight(out + i, low, high);
  }
  if (i < count) add(a + i, b + i, out + i, count - i, shift_a, shift_b);
}

const ConvKernel* pick_conv(const ConvShape& s) {
  if (s.groups > 1 && s.group_in() == 1 && s.group_out() == 1)
    return neon_depthwise_narrow_fits(s) ? &kNeonDepthwiseNarrow : &kNeonDepthwise;
  return neon_direct_fits(s) ? &kNeonDirect : &kNeonConv;
}

bool supported() { return true; }

}  // namespace

const Kernels kNeonKernels = {
    "neon",
    supported,
    pick_conv,
    {{requant<uint8_t, uint8_t>, requant<uint8_t, int8_t>, requant<uint8_t, int32_t>},
     {requant<int8_t, uint8_t>, requant<int8_t, int8_t>, requant<int8_t, int32_t>},
     {requant_i32<uint8_t>, requant_i32<int8_t>, requant_i32<int32_t>}},
    add_aligned,
    {clip<uint8_t>, clip<int8_t>, clip<int32_t>},
    {max_pool<uint8_t>, max_pool<int8_t>, max_pool<int32_t>},
    {sum_pool<uint8_t, int32_t>, sum_pool<int8_t, int32_t>, sum_pool<int32_t, int32_t>},
    {sum_pool<uint8_t, uint8_t>, sum_pool<int8_t, int8_t>, nullptr},
    true,
    &kGenericTraining,  // compiled for NEON already
    &kNeonProducts,
};

}  // namespace bitstrata
