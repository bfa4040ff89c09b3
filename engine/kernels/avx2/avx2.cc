// The AVX2 row of the dispatch table, and its requantization. The other kernels are the portable ones, vectorized by
// the compiler with this file's flags.
#include "avx2.h"

#include <immintrin.h>

#include "requant_eight.h"

namespace bitstrata {

extern const Training kAvx2Training;
extern const ProductKernels kAvx2Products;
extern const Limits kAvx2Limits;
namespace {

constexpr int64_t kPixels = 64;  // that pass together, so that they stay in the cache

template <typename Constants, typename Out>
inline void requant_eight(const Constants& constants, const int32_t* x, Out* to, int64_t pitch, int64_t pixels) {
  for (int64_t p = 0; p < pixels; ++p, x += pitch, to += pitch) store_eight(to, constants(load(x)));
}

// From i32. Eight channels of many pixels at a time, so that their constants stay in registers; the clamped results fit
// the output's type, so that packing keeps them.
template <typename Out>
void requant_i32(const RequantArgs& a, const void* x, void* out, int64_t pixels) {
  const int32_t* in = static_cast<const int32_t*>(x);
  Out* to = static_cast<Out*>(out);
  for (int64_t first = 0; first < pixels; first += kPixels, in += kPixels * a.channels, to += kPixels * a.channels) {
    const int64_t some = smaller(kPixels, pixels - first);
    int64_t c = 0;
    for (; c + 8 <= a.channels; c += 8) {
      const auto pass = [&](const auto& constants) { requant_eight(constants, in + c, to + c, a.channels, some); };
      switch (a.form_of(c)) {
        case RequantForm::low:
          pass(EightLow(a, c));
          break;
        case RequantForm::high:
          pass(EightHigh(a, c));
          break;
        case RequantForm::narrow:
          pass(EightNarrow(a, c));
          break;
        case RequantForm::wide:
          pass(EightWide(a, c));
      }
    }
    for (int64_t p = 0; p < some && c < a.channels; ++p)
      for (int64_t i = c; i < a.channels; ++i)
        to[p * a.channels + i] = static_cast<Out>(requant_one(a, i, in[p * a.channels + i]));
  }
}

// Where int16 holds fewer of the narrow kernel's steps, widening them takes what it gains over the wide Winograd one.
constexpr int64_t kFewSteps = 16;

const ConvKernel* pick_conv(const ConvShape& s) {
  if (s.groups > 1 && s.group_in() == 1 && s.group_out() == 1) return &kAvx2Depthwise;
  const bool narrow = avx2_narrow_fits(s);
  const bool winograd = avx2_winograd_pays(s);
  if (const ConvKernel* tables = avx2_table_choice(s, winograd ? 0.5 : narrow ? 0.65 : 1.3, 6)) return tables;
  if (winograd) return &kAvx2Winograd;
  if (avx2_narrow_steps(s) < kFewSteps && avx2_winograd_wide_pays(s)) return &kAvx2WinogradWide;
  if (narrow) return &kAvx2Narrow;
  return avx2_stem_pays(s) ? &kAvx2Stem : &kAvx2Wide;
}

// The one of few products, or the one of all, whichever is not picked.
const ConvKernel* other_conv(const ConvShape& s) {
  const ConvKernel* few = avx2_winograd_fits(s)        ? &kAvx2Winograd
                          : avx2_winograd_wide_fits(s) ? &kAvx2WinogradWide
                          : avx2_stem_fits(s)          ? &kAvx2Stem
                                                       : nullptr;
  if (few == nullptr || pick_conv(s) != few) return few;
  return avx2_narrow_fits(s) ? &kAvx2Narrow : &kAvx2Wide;
}

const char* lacks() {
  if (!__builtin_cpu_supports("avx2")) return "processor flag avx2";
  return __builtin_cpu_supports("bmi2") ? nullptr : "processor flag bmi2";
}

bool supported() { return lacks() == nullptr; }

}  // namespace

extern const Kernels kAvx2Kernels;
const Kernels kAvx2Kernels = {
    "avx2",
    supported,
    pick_conv,
    {{requant<uint8_t, uint8_t>, requant<uint8_t, int8_t>, requant<uint8_t, int32_t>},
     {requant<int8_t, uint8_t>, requant<int8_t, int8_t>, requant<int8_t, int32_t>},
     {requant_i32<uint8_t>, requant_i32<int8_t>, requant_i32<int32_t>}},
    add,
    {clip<uint8_t>, clip<int8_t>, clip<int32_t>},
    {max_pool<uint8_t>, max_pool<int8_t>, max_pool<int32_t>},
    {sum_pool<uint8_t, int32_t>, sum_pool<int8_t, int32_t>, sum_pool<int32_t, int32_t>},
    {sum_pool<uint8_t, uint8_t>, sum_pool<int8_t, int8_t>, nullptr},
    true,
    &kAvx2Training,
    &kAvx2Products,
    lacks,
    [] { return &kAvx2Limits; },
    nullptr,
    other_conv,
};

}  // namespace bitstrata
