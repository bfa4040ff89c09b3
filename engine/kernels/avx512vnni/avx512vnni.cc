// The AVX-512 VNNI row of the dispatch table, and its requantization. The other kernels are the portable ones,
// vectorized by the compiler with this file's flags.
#include "avx512vnni.h"

#include <immintrin.h>

#include "../avx512bf16/avx512bf16.h"
#include "../avx512vpopcnt/avx512vpopcnt.h"
#include "../common/pointwise.h"
#include "results.h"

namespace bitstrata {

extern const Training kAvx512VnniTraining;
extern const ProductKernels kAvx512VnniProducts;
extern const Limits kAvx512VnniLimits;
namespace {

// Sixteen channels in 64 bits.
struct Sixteen {
  Sixteen(const RequantArgs& a, int64_t c, __mmask16 mask)
      : multiplier(a.multiplier + c, mask),
        bias(a.bias + c, mask),
        shift(a.shift + c, mask),
        lo(_mm512_set1_epi64(a.lo)),
        hi(_mm512_set1_epi64(a.hi)) {}
  __m512i operator()(__m512i x) const {
    const __m512i even = half(x, multiplier.even, bias.even, shift.even);
    const __m512i odd = half(_mm512_srli_epi64(x, 32), multiplier.odd, bias.odd, shift.odd);
    return _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
  }
  __m512i half(__m512i x, __m512i m, __m512i b, __m512i s) const {
    const __m512i y = _mm512_srav_epi64(_mm512_add_epi64(_mm512_mul_epi32(x, m), b), s);
    return _mm512_min_epi64(_mm512_max_epi64(y, lo), hi);
  }
  Parities multiplier, bias, shift;
  __m512i lo, hi;
};

// The same, of results that fit 32 bits.
struct SixteenNarrow {
  SixteenNarrow(const RequantArgs& a, int64_t c, __mmask16 mask)
      : products(a, c, mask),
        shift(a.shift + c, mask),
        odd_up(_mm512_sub_epi64(_mm512_set1_epi64(32), shift.odd)),
        lo(_mm512_set1_epi32(a.lo)),
        hi(_mm512_set1_epi32(a.hi)) {}
  __m512i operator()(__m512i x) const {
    const __m512i y = _mm512_mask_blend_epi32(0xAAAA, _mm512_srlv_epi64(products.of_even(x), shift.even),
                                              _mm512_sllv_epi64(products.of_odd(x), odd_up));
    return _mm512_min_epi32(_mm512_max_epi32(y, lo), hi);
  }
  Products products;
  Parities shift;
  __m512i odd_up, lo, hi;  // odd_up: what brings an odd lane's result to the upper 32 bits
};

inline __m512i load(const int32_t* x, __mmask16 mask) { return _mm512_maskz_loadu_epi32(mask, x); }
inline __m512i load(const uint8_t* x, __mmask16 mask) { return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, x)); }
inline __m512i load(const int8_t* x, __mmask16 mask) { return _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, x)); }
inline void store(int32_t* to, __m512i v, __mmask16 mask) { _mm512_mask_storeu_epi32(to, mask, v); }
inline void store(uint8_t* to, __m512i v, __mmask16 mask) { _mm_mask_storeu_epi8(to, mask, _mm512_cvtepi32_epi8(v)); }
inline void store(int8_t* to, __m512i v, __mmask16 mask) { _mm_mask_storeu_epi8(to, mask, _mm512_cvtepi32_epi8(v)); }

template <typename In, typename Out, typename Constants>
inline void requant_pixels(const Constants& constants, const In* in, Out* to, int64_t pitch, int64_t pixels,
                           __mmask16 mask) {
  if (mask == 0xFFFF)
    for (int64_t p = 0; p < pixels; ++p, in += pitch, to += pitch) store(to, constants(load(in, 0xFFFF)), 0xFFFF);
  else
    for (int64_t p = 0; p < pixels; ++p, in += pitch, to += pitch) store(to, constants(load(in, mask)), mask);
}

constexpr int64_t kPixels = 64;  // that pass together, so that they stay in the cache

// Sixteen channels of many pixels at a time, so that their constants stay in registers.
template <typename In, typename Out>
void requant_few(const RequantArgs& a, const In* x, Out* out, int64_t pixels) {
  for (int64_t c = 0; c < a.channels; c += 16) {
    const int64_t count = smaller<int64_t>(16, a.channels - c);
    const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
    const In* in = x + c;
    Out* to = out + c;
    const auto pass = [&](const auto& constants) { requant_pixels(constants, in, to, a.channels, pixels, mask); };
    switch (a.form_of(c)) {
      case RequantForm::low:
        pass(SixteenLow(a, c, mask));
        break;
      case RequantForm::high:
        pass(SixteenHigh(a, c, mask));
        break;
      case RequantForm::narrow:
        pass(SixteenNarrow(a, c, mask));
        break;
      case RequantForm::wide:
        pass(Sixteen(a, c, mask));
    }
  }
}

template <typename In, typename Out>
void requant_vnni(const RequantArgs& a, const void* x, void* out, int64_t pixels) {
  for (int64_t p = 0; p < pixels; p += kPixels)
    requant_few(a, static_cast<const In*>(x) + p * a.channels, static_cast<Out*>(out) + p * a.channels,
                smaller(kPixels, pixels - p));
}

inline __m512i load_all(const uint8_t* x, __mmask64 mask) { return _mm512_maskz_loadu_epi8(mask, x); }
inline __m512i load_all(const int8_t* x, __mmask64 mask) { return _mm512_maskz_loadu_epi8(mask, x); }
inline __m512i load_all(const int32_t* x, __mmask64 mask) {
  return _mm512_maskz_loadu_epi32(static_cast<__mmask16>(mask), x);
}
inline void store_all(uint8_t* to, __mmask64 mask, __m512i v) { _mm512_mask_storeu_epi8(to, mask, v); }
inline void store_all(int8_t* to, __mmask64 mask, __m512i v) { _mm512_mask_storeu_epi8(to, mask, v); }
inline void store_all(int32_t* to, __mmask64 mask, __m512i v) {
  _mm512_mask_storeu_epi32(to, static_cast<__mmask16>(mask), v);
}
inline __m512i largest(const uint8_t*, __m512i a, __m512i b) { return _mm512_max_epu8(a, b); }
inline __m512i largest(const int8_t*, __m512i a, __m512i b) { return _mm512_max_epi8(a, b); }
inline __m512i largest(const int32_t*, __m512i a, __m512i b) { return _mm512_max_epi32(a, b); }

// A vector of channels at a time: its largest stays in a register through the window.
template <typename T>
void max_pool_vnni(const PoolShape& s, const void* x, void* out, int64_t row_begin, int64_t row_end) {
  constexpr int64_t kLanes = 64 / sizeof(T);
  for (int64_t y = row_begin; y < row_end; ++y) {
    const Window h(y * s.stride_h - s.pad_top, s.kernel_h, s.in_h);
    T* to = static_cast<T*>(out) + y * s.out_w * s.channels;
    for (int64_t i = 0; i < s.out_w; ++i, to += s.channels) {
      const Window w(i * s.stride_w - s.pad_left, s.kernel_w, s.in_w);
      for (int64_t c = 0; c < s.channels; c += kLanes) {
        const __mmask64 mask = ~uint64_t{0} >> (64 - smaller(kLanes, s.channels - c));
        const T* from = static_cast<const T*>(x) + (h.begin * s.in_w + w.begin) * s.channels + c;
        __m512i most = load_all(from, mask);
        for (int64_t v = h.begin; v < h.end; ++v, from += s.in_w * s.channels)
          for (int64_t u = 0; u < w.end - w.begin; ++u)
            most = largest(from, most, load_all(from + u * s.channels, mask));
        store_all(to + c, mask, most);
      }
    }
  }
}

const ConvKernel* pick_conv(const ConvShape& s) {
  if (s.groups > 1 && s.group_in() == 1 && s.group_out() == 1)
    return avx512vnni_depthwise_fits(s) ? &kAvx512VnniDepthwise : &kAvx2Depthwise;
  const bool two = avx512vnni_winograd_pays(s), four = avx512vnni_winograd_four_pays(s);
#ifdef BITSTRATA_HAVE_AVX512VPOPCNT
  if (avx512vpopcnt_supported() && avx512vpopcnt_pays(s, four ? 0.58 : two ? 0.72 : 1)) return &kAvx512VpopcntConv;
#endif
  if (four) return &kAvx512VnniWinogradFour;
  if (two) return &kAvx512VnniWinograd;
  return avx512vnni_direct_fits(s) ? &kAvx512VnniDirect : &kAvx512VnniConv;
}

const ConvKernel* other_conv(const ConvShape& s) {
  if (!avx512vnni_winograd_fits(s)) return nullptr;
  if (pick_conv(s) != &kAvx512VnniWinograd) return &kAvx512VnniWinograd;
  return avx512vnni_winograd_four_fits(s) ? &kAvx512VnniWinogradFour : &kAvx512VnniConv;
}

// The compiler's checks include that the operating system saves the registers.
const char* lacks() {
  if (!__builtin_cpu_supports("avx2")) return "processor flag avx2";
  if (!__builtin_cpu_supports("bmi2")) return "processor flag bmi2";
  if (!__builtin_cpu_supports("avx512f")) return "processor flag avx512f";
  if (!__builtin_cpu_supports("avx512bw")) return "processor flag avx512bw";
  if (!__builtin_cpu_supports("avx512vl")) return "processor flag avx512vl";
  if (!__builtin_cpu_supports("avx512dq")) return "processor flag avx512dq";
  return __builtin_cpu_supports("avx512vnni") ? nullptr : "processor flag avx512_vnni";
}

bool supported() { return lacks() == nullptr; }

}  // namespace

extern const Kernels kAvx512VnniKernels;
const Kernels kAvx512VnniKernels = {
    "avx512vnni",
    supported,
    pick_conv,
    {{requant_vnni<uint8_t, uint8_t>, requant_vnni<uint8_t, int8_t>, requant_vnni<uint8_t, int32_t>},
     {requant_vnni<int8_t, uint8_t>, requant_vnni<int8_t, int8_t>, requant_vnni<int8_t, int32_t>},
     {requant_vnni<int32_t, uint8_t>, requant_vnni<int32_t, int8_t>, requant_vnni<int32_t, int32_t>}},
    add,
    {clip<uint8_t>, clip<int8_t>, clip<int32_t>},
    {max_pool_vnni<uint8_t>, max_pool_vnni<int8_t>, max_pool_vnni<int32_t>},
    {sum_pool<uint8_t, int32_t>, sum_pool<int8_t, int32_t>, sum_pool<int32_t, int32_t>},
    {sum_pool<uint8_t, uint8_t>, sum_pool<int8_t, int8_t>, nullptr},
    true,
    &kAvx512VnniTraining,
    &kAvx512VnniProducts,
    lacks,
    [] { return &kAvx512VnniLimits; },
#ifdef BITSTRATA_HAVE_AVX512BF16
    avx512bf16_products,
#else
    nullptr,
#endif
    other_conv,
};

}  // namespace bitstrata
