// A convolution and the quantized normalization of its sums as one operation, forward and backward: what lies between
// stays integers. The operations are those of products.h and quantize.h; the arithmetic between them is given here.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "bitstrata/products.h"
#include "bitstrata/quantize.h"

namespace bitstrata {

// What a product needs of one side: codes, and what 1 of a channel's stored code stands for.
struct ScaledCodes {
  ProductCodes codes;
  double unit;            // of the sums: scale * 2^-(groups - 1)
  const double* channel;  // (channels,): of stored codes, which with absorbed shifts are units
};

struct ConvWeight {
  const float* data;  // (out, in / groups, taps)
  int bits;
  WeightScales scales;
};

enum class Status { kDone, kWeight, kNorm, kProduct };  // or what was not finite: the weight, or the gradient of which

// Codes of the normalized convolution in `codes`, (rows, out); acc: as many int32. Null if its sums, scaled, or the
// weight are not finite, which `status` tells.
std::unique_ptr<Norm> conv_norm_forward(const Kernels&, int threads, const ProductShape&, const ScaledCodes& x,
                                        const ConvWeight&, const NormOptions&, const float* gamma, const float* beta,
                                        int32_t* acc, int8_t* codes, Status* status);

struct ConvNormGradient {
  RealTensor real;     // of the result
  const float* range;  // its largest magnitude, or null
  bool rectified;      // the result was
  const Noise* noise;  // of its codes; null for nearest
  ShiftFormat format;  // of the products' gradient
  const Noise* product_noise;
};

// Where it goes; input and weight may be null if nobody asks for them.
struct ConvNormResult {
  int8_t* gradient;        // (rows, out), scratch
  uint8_t* product_codes;  // likewise
  int32_t* input;          // (batch, in_h, in_w, in_c): sums, which stand for sum * input_factor[c]
  float* input_factor;
  float* weight;
};

Status conv_norm_backward(const Kernels&, int threads, const ProductShape&, Norm&, const int8_t* codes,
                          const ConvNormGradient&, const ScaledCodes& x, const ConvWeight&, const ConvNormResult&);

}  // namespace bitstrata
