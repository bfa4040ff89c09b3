// Depthwise convolution on NEON: one vector of channels a block, each tap's weights times its activations, lane by
// lane.
//   narrow: sixteen channels, products of s8 summed in int16 over the whole window, then widened;
//   wide: eight channels, products of int16 summed in int32.
#include <arm_neon.h>

#include <cstring>

#include "../common/conv_stage.h"
#include "../common/unroll.h"
#include "neon.h"
#include "signed_form.h"

namespace bitstrata {
namespace {

constexpr int kPixels = 4;  // of a block

template <bool kNarrow>
struct Types {
  using Staged = int16_t;
  using Vector = int16x8_t;
  using Sum = int32x4_t;
};
template <>
struct Types<true> {
  using Staged = int8_t;
  using Vector = int8x16_t;
  using Sum = int16x8_t;
};

// To the staging, the channels are one group, filled up to whole blocks.
ConvShape merged(ConvShape s) {
  s.groups = 1;
  return s;
}

// Packed: int32 correction[lanes]; int64 offsets[taps], in bytes; weights [block][tap][kLanes]; padding[lanes].
template <bool kNarrow>
struct Packed {
  using Staged = typename Types<kNarrow>::Staged;
  static constexpr int64_t kLanes = 16 / sizeof(Staged);

  explicit Packed(const ConvShape& s)
      : offset(kNarrow ? signed_form(s).offset : 0),
        stage(merged(s), round_up(s.in_c, kLanes), offset, false),
        taps(s.kernel_h * s.kernel_w),
        offsets_at(round_up(stage.lanes * 4, 64)),
        weights_at(round_up(offsets_at + taps * 8, 64)),
        padding_at(weights_at + stage.lanes * taps * static_cast<int64_t>(sizeof(Staged))),
        bytes(padding_at + stage.lanes * static_cast<int64_t>(sizeof(Staged))) {}
  int32_t offset;
  Staging<Staged> stage;
  int64_t taps;
  int64_t offsets_at, weights_at, padding_at, bytes;
};

template <bool kNarrow>
int64_t packed_bytes(const ConvShape& s) {
  return Packed<kNarrow>(s).bytes;
}

template <bool kNarrow>
int64_t staged_row_bytes(const ConvShape& s) {
  return Packed<kNarrow>(s).stage.row_bytes;
}

template <bool kNarrow>
void pack(const ConvShape& s, const int8_t* codes, const int32_t* pad, void* packed) {
  using P = Packed<kNarrow>;
  using Staged = typename P::Staged;
  const P p(s);
  uint8_t* base = static_cast<uint8_t*>(packed);
  std::memset(packed, 0, static_cast<size_t>(p.bytes));
  stage_padding(merged(s), p.stage, pad, reinterpret_cast<Staged*>(base + p.padding_at));
  int32_t* correction = reinterpret_cast<int32_t*>(base);
  int64_t* offsets = reinterpret_cast<int64_t*>(base + p.offsets_at);
  Staged* weights = reinterpret_cast<Staged*>(base + p.weights_at);
  for (int64_t t = 0; t < p.taps; ++t) {
    const int64_t ky = t / s.kernel_w, kx = t % s.kernel_w;
    offsets[t] = ky * s.dilation_h * p.stage.row_bytes +
                 kx * s.dilation_w * p.stage.lanes * static_cast<int64_t>(sizeof(Staged));
    for (int64_t c = 0; c < s.in_c; ++c) {
      const int32_t weight = weight_at(s, codes, c, 0, ky, kx);
      weights[(c / P::kLanes * p.taps + t) * P::kLanes + c % P::kLanes] = static_cast<Staged>(weight);
      correction[c] = static_cast<int32_t>(static_cast<uint32_t>(correction[c]) -
                                           static_cast<uint32_t>(weight) * static_cast<uint32_t>(p.offset));
    }
  }
}

template <bool kNarrow>
void stage(const ConvShape& s, const void* packed, const void* image, void* staged, int64_t row_begin,
           int64_t row_end) {
  const Packed<kNarrow> p(s);
  const uint8_t* padding = static_cast<const uint8_t*>(packed) + p.padding_at;
  stage_rows(merged(s), p.stage, reinterpret_cast<const typename Packed<kNarrow>::Staged*>(padding), image, staged,
             row_begin, row_end);
}

inline int8x16_t load(const uint8_t* x, int8x16_t) { return vreinterpretq_s8_u8(vld1q_u8(x)); }
inline int16x8_t load(const uint8_t* x, int16x8_t) { return vreinterpretq_s16_u8(vld1q_u8(x)); }
inline int16x8_t low_products(int16x8_t sum, int8x16_t a, int8x16_t b) {
  return vmlal_s8(sum, vget_low_s8(a), vget_low_s8(b));
}
inline int16x8_t high_products(int16x8_t sum, int8x16_t a, int8x16_t b) { return vmlal_high_s8(sum, a, b); }
inline int32x4_t low_products(int32x4_t sum, int16x8_t a, int16x8_t b) {
  return vmlal_s16(sum, vget_low_s16(a), vget_low_s16(b));
}
inline int32x4_t high_products(int32x4_t sum, int16x8_t a, int16x8_t b) { return vmlal_high_s16(sum, a, b); }

inline void store(int32_t* to, int16x8_t v, const int32_t* correction) {
  vst1q_s32(to, vaddw_s16(vld1q_s32(correction), vget_low_s16(v)));
  vst1q_s32(to + 4, vaddw_high_s16(vld1q_s32(correction + 4), v));
}
inline void store(int32_t* to, int32x4_t v, const int32_t*) { vst1q_s32(to, v); }

// A vector of channels of kP pixels whose windows start `pitch` bytes apart.
template <bool kNarrow, int kP>
inline void block(const Packed<kNarrow>& p, const int64_t* offsets, const uint8_t* x, int64_t pitch,
                  const typename Types<kNarrow>::Vector* w, typename Types<kNarrow>::Sum (&sum)[kP][2]) {
  for (int64_t t = 0; t < p.taps; ++t) {
    const auto weights = w[t];
    const uint8_t* at = x + offsets[t];
    each<kP>([&](auto i) {
      const auto a = load(at + i * pitch, weights);
      sum[i][0] = low_products(sum[i][0], weights, a);
      sum[i][1] = high_products(sum[i][1], weights, a);
    });
  }
}

// kP pixels of a row, from x on.
template <bool kNarrow, int kP>
void convolve(const ConvShape& s, const Packed<kNarrow>& p, const uint8_t* base, const uint8_t* window, int64_t c,
              int32_t* out) {
  using T = Types<kNarrow>;
  constexpr int64_t kLanes = Packed<kNarrow>::kLanes;
  typename T::Sum sum[kP][2] = {};
  block<kNarrow, kP>(p, reinterpret_cast<const int64_t*>(base + p.offsets_at), window,
                     s.stride_w * p.stage.lanes * static_cast<int64_t>(sizeof(typename T::Staged)),
                     reinterpret_cast<const typename T::Vector*>(base + p.weights_at) + c / kLanes * p.taps, sum);
  const int32_t* correction = reinterpret_cast<const int32_t*>(base) + c;
  const int64_t channels = s.out_c - c < kLanes ? s.out_c - c : kLanes;
  each<kP>([&](auto i) {
    int32_t all[kLanes];
    int32_t* to = out + i * s.out_c;
    int32_t* at = channels == kLanes ? to : all;
    store(at, sum[i][0], correction);
    store(at + kLanes / 2, sum[i][1], correction + kLanes / 2);
    if (channels < kLanes) std::memcpy(to, all, static_cast<size_t>(channels) * 4);
  });
}

template <bool kNarrow>
void run(const ConvShape& s, const void* packed, const void* staged, int32_t* out, int64_t row_begin, int64_t row_end) {
  constexpr int64_t kBytes = sizeof(typename Packed<kNarrow>::Staged);
  const Packed<kNarrow> p(s);
  const uint8_t* base = static_cast<const uint8_t*>(packed);
  const int64_t step = s.stride_w * p.stage.lanes * kBytes;
  for (int64_t y = row_begin; y < row_end; ++y)
    for (int64_t c = 0; c < s.out_c; c += Packed<kNarrow>::kLanes) {
      const uint8_t* row = static_cast<const uint8_t*>(staged) + y * s.stride_h * p.stage.row_bytes + c * kBytes;
      int32_t* to = out + y * s.out_w * s.out_c + c;
      int64_t x = 0;
      for (; x + kPixels <= s.out_w; x += kPixels)
        convolve<kNarrow, kPixels>(s, p, base, row + x * step, c, to + x * s.out_c);
      for (; x < s.out_w; ++x) convolve<kNarrow, 1>(s, p, base, row + x * step, c, to + x * s.out_c);
    }
}

}  // namespace

bool neon_depthwise_narrow_fits(const ConvShape& s) {
  const WeightForm form = signed_form(s);
  return form.whole && products_in_int16(s, form) >= s.kernel_h * s.kernel_w;
}

extern const ConvKernel kNeonDepthwise = {"neon-depthwise",        packed_bytes<false>, pack<false>,
                                          staged_row_bytes<false>, stage<false>,        run<false>};
extern const ConvKernel kNeonDepthwiseNarrow = {"neon-depthwise-narrow", packed_bytes<true>, pack<true>,
                                                staged_row_bytes<true>,  stage<true>,        run<true>};

}  // namespace bitstrata
