// Kernels of a training step beside its products: quantization, and the quantized L1 normalization.
//
// A tensor is rows of `channels` neighbours, one row for each position of each sample. Whatever belongs to a channel
// comes as an array of `period` elements, in which the channels repeat: period is a multiple of channels. A kernel is
// given `count` elements, a multiple of channels, of which the first is channel 0, and adds to the sums and ranges that
// it finds. Arithmetic on floats is float32, operation by operation as written here, without fused multiply-adds;
// round(x) is to nearest, ties to even. So results depend neither on the instruction set nor on the number of threads.
#pragma once

#include <cstdint>

#include "bitstrata/fake_kernels.h"
#include "bitstrata/layer_kernels.h"
#include "bitstrata/qat_kernels.h"

namespace bitstrata {

constexpr int64_t kLongPeriod = 256;  // so that a loop over a period is worth its start

// Stochastic rounding of a float z in [-128, 384): (int32((z + 128) * 2^16) + k >> 16) - 128, with k 16 random bits.
// Those of element i are half h of word w of Philox4x32-7 at counter (j low, j high, stream low, stream high) under the
// key (seed low, seed high), where j = i / 128 * 16 + i % 32 / 2, w = i / 32 % 4, h = i % 2, half 0 being the low one.
struct Noise {
  uint64_t seed = 0, stream = 0;
  int64_t start = 0;  // number of the first element
};

// code = clamp(R(x * factor[c]), lo, hi) << shift[c]. With `powers` codes are 0 and +-2^k: with z = |x * factor[c]|,
// R(z) is 0 or 1 below 1, and else the bits of z, as an integer, give the exponent: (bits + 2^7 k >> 23) - 127, with k
// 16 random bits, 2^15 for the nearest; k decides below 1 as in Noise.
struct CodeArgs {
  const float* factor;   // (period,)
  const int32_t* shift;  // (period,)
  float lo, hi;
  const Noise* noise;  // null: to nearest
  bool powers = false;
};

// The normalized input's codes: h = round((x * step - mean[c]) * gain[c]).
struct CenterArgs {
  float step;
  const float *mean, *gain;  // (period,) each
};

// A normalization's result: y = h * scale[c] + offset[c], at least `floor`.
struct AffineArgs {
  const float *scale, *offset;  // (period,) each
  float floor;                  // 0 with a rectifier, else -infinity
};

// Codes up to below[c] are under the channel's mean, those beyond up_to[c] over it.
struct SideArgs {
  const int8_t *below, *up_to;  // (period,) each
};

// Gradients count where first[c] <= h <= last[c]: where a rectifier lets them pass.
struct PassArgs {
  const int8_t *first, *last;  // (period,) each
};

// Of the gradient's codes g of a channel: sums of g and of g * h; the least and the most g where h is negative, 0 and
// positive, 127 and -128 where there is none. (period,) each.
struct GradientSums {
  int64_t *g, *gh;
  int8_t *least[3], *most[3];
};

// dx = coefficient[c] * g - constant[sign(h) + 1][c]
struct L1GradientArgs {
  const float *coefficient, *constant[3];  // (period,) each
};

// dx = (coefficient[c] * g - constant[c]) - h * slope[c]
struct L2GradientArgs {
  const float *coefficient, *constant, *slope;  // (period,) each
};

// Pooling of one image, rows of pixels; `kernel_h * kernel_w` is at most 256.
struct PoolMap {
  int64_t in_h, in_w, channels;
  int64_t out_h, out_w;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
  int64_t in_size() const { return in_h * in_w * channels; }
  int64_t out_size() const { return out_h * out_w * channels; }
  int64_t sign_bytes() const { return (in_size() + 3) / 4; }
};

struct Training {
  int64_t norm_period;  // that the kernels of the normalization like best; channels may ask for more
  // most[c] = max |x|
  void (*range_f32)(const float* x, int64_t count, int64_t period, float* most);
  void (*range_bf16)(const uint16_t* x, int64_t count, int64_t period, float* most);
  void (*codes_f32)(const float* x, int64_t count, int64_t period, const CodeArgs&, uint8_t* out);
  void (*codes_bf16)(const uint16_t* x, int64_t count, int64_t period, const CodeArgs&, uint8_t* out);

  // sum[c] = sum of x[., c]
  void (*sum_codes)(const int8_t* x, int64_t count, int64_t period, int64_t* sum);

  // Codes of `width` bits, 2 to 8, as one stream of bits, low bits first; unused bits are 0.
  void (*pack)(const uint8_t* codes, int64_t count, int width, uint8_t* out);
  void (*unpack)(const uint8_t* packed, int64_t count, int width, bool is_signed, uint8_t* out);
  // Codes that absorbed shifts, code << shift[c], back to bare ones, of which the high bits are arbitrary: factor[c] is
  // 2^(last - shift[c]).
  void (*unshift)(const uint8_t* codes, int64_t count, int64_t period, const uint16_t* factor, int last, uint8_t* out);

  // code = clamp(round((x * scale[c]) * inverse), -bound, bound), scale null for 1; sums and ranges of the codes.
  void (*norm_codes_i32)(const int32_t* x, int64_t count, int64_t period, const float* scale, float inverse,
                         float bound, int8_t* out, int64_t* sum, int32_t* least, int32_t* most);
  void (*norm_codes_f32)(const float* x, int64_t count, int64_t period, const float* scale, float inverse, float bound,
                         int8_t* out, int64_t* sum, int32_t* least, int32_t* most);
  // Numbers of codes below and above the mean, and the sum of those above.
  void (*norm_sides)(const int8_t* x, int64_t count, int64_t period, const SideArgs&, int64_t* below, int64_t* above,
                     int64_t* sum_above);
  void (*norm_squares)(const int8_t* x, int64_t count, int64_t period, int64_t* sum);
  // h in the place of x; sums of h, or, if `signs`, of its signs.
  void (*norm_center)(int8_t* x, int64_t count, int64_t period, const CenterArgs&, bool signs, int64_t* sum);
  // The result in the next product's codes.
  void (*norm_to_codes)(const int8_t* h, int64_t count, int64_t period, const AffineArgs&, const CodeArgs&,
                        uint8_t* out);
  // y (+ add, null for none), at least affine.floor after the sum; most[c] = max |out|; bits, null for none: 1 where
  // out > 0, element i in bit i % 8 of byte i / 8.
  void (*norm_to_f32)(const int8_t* h, int64_t count, int64_t period, const AffineArgs&, const float* add, float* out,
                      float* most, uint8_t* bits);

  // The largest y of each window, at least affine.floor, and at which position of the window it is, the first of
  // equals; most[c] = max |out|. Arrays of the affine have `channels` elements or more.
  void (*max_pool)(const int8_t* h, const PoolMap&, const AffineArgs&, float* out, uint8_t* places, float* most);
  // The gradient of the pooled map's input: sums over windows in the order of their pixels.
  void (*max_pool_gradient)(const float* g, const uint8_t* places, const PoolMap&, float* out);
  // h at the maxima, and all its signs, sign_bytes of them: 1 of a positive code, 2 of a negative one, four a byte. And
  // back: h at the maxima, elsewhere its signs.
  void (*keep_maxima)(const int8_t* h, const uint8_t* places, const PoolMap&, int8_t* maxima, uint8_t* signs);
  void (*put_maxima)(const int8_t* maxima, const uint8_t* signs, const uint8_t* places, const PoolMap&, int8_t* h);

  // g = x * scale[c] (+ add) where `bits` is 1, else 0; scale, add, bits null for none; most = max |g|. out may be the
  // memory of x or of add.
  void (*join_i32)(const int32_t* x, int64_t count, int64_t period, const float* scale, const float* add,
                   const uint8_t* bits, float* out, float* most);
  void (*join_f32)(const float* x, int64_t count, int64_t period, const float* scale, const float* add,
                   const uint8_t* bits, float* out, float* most);
  // most[c] = max |g * scale[c]| where g passes.
  void (*gradient_range_i32)(const int32_t* g, const int8_t* h, int64_t count, int64_t period, const float* scale,
                             const PassArgs&, float* most);
  void (*gradient_range_f32)(const float* g, const int8_t* h, int64_t count, int64_t period, const float* scale,
                             const PassArgs&, float* most);
  // code = clamp(R((g * scale[c]) * inverse), -bound, bound) where g passes, else 0.
  void (*gradient_codes_i32)(const int32_t* g, const int8_t* h, int64_t count, int64_t period, const float* scale,
                             float inverse, float bound, const Noise*, const PassArgs&, int8_t* out,
                             const GradientSums&);
  void (*gradient_codes_f32)(const float* g, const int8_t* h, int64_t count, int64_t period, const float* scale,
                             float inverse, float bound, const Noise*, const PassArgs&, int8_t* out,
                             const GradientSums&);
  // The gradient of the input, as floats, or in the codes of the products before it.
  void (*l1_gradient)(const int8_t* g, const int8_t* h, int64_t count, int64_t period, const L1GradientArgs&,
                      float* out);
  void (*l2_gradient)(const int8_t* g, const int8_t* h, int64_t count, int64_t period, const L2GradientArgs&,
                      float* out);
  void (*l1_gradient_codes)(const int8_t* g, const int8_t* h, int64_t count, int64_t period, const L1GradientArgs&,
                            const CodeArgs&, uint8_t* out);  // which may be g

  LayerKernels layer;  // of the layer normalization
  FakeKernels fake;    // of fake quantization
  QatKernels qat;      // of quantization-aware training
};

}  // namespace bitstrata
