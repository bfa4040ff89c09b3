// A convolution and the quantized normalization of its sums as one operation, forward and backward: what lies between
// stays integers. The operations are those of products.h and quantize.h; the arithmetic between them is given here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "bitstrata/products.h"
#include "bitstrata/quantize.h"

namespace bitstrata {

// What a product needs of one side: codes, and what they stand for.
struct ScaledCodes {
  ProductCodes codes;
  double unit;            // of the sums: scale * 2^-(groups - 1)
  const double* channel;  // (channels,): of stored codes, which with absorbed shifts are units
};

// What a convolution reads: codes of a grid, (batch, in_h, in_w, in_c), the same at rest, or the result of a
// normalization; of the latter two codes are made, in scratch memory, wherever they are needed.
struct ConvInput {
  const uint8_t* codes = nullptr;
  const uint8_t* packed = nullptr;  // see pack_codes
  const ShiftGrid* grid = nullptr;  // of these two
  const Norm* norm = nullptr;       // and its normalized codes, (batch * in_h * in_w, in_c)
  const int8_t* normed = nullptr;
  bool rectified = false;
  ShiftFormat format;  // of the codes
};

// Whether codes are worth packing: where the kernel that does it is fast, and the room is half of it or more.
inline bool rests(const ShiftFormat& f) { return f.bits <= 4; }

struct ConvWeight {
  const float* data;  // (out, in / groups, taps)
  int bits;
  WeightScales scales;
  // What weight_codes makes of it for the product at hand, if that is known, else null.
  const int8_t* codes = nullptr;
  const float* scale = nullptr;
};

enum class Status { kDone, kWeight, kNorm, kProduct };  // or what was not finite: the weight, or the gradient of which

// Bytes of scratch memory, which must be aligned to kScratchAlignment.
constexpr size_t kScratchAlignment = 64;
size_t conv_norm_forward_scratch(const ProductShape&, const ConvInput&);
size_t conv_norm_backward_scratch(const ProductShape&, const ConvInput&);

// Codes of the normalized convolution in `codes`, (rows, out). Null if its sums, scaled, or the weight are not finite,
// which `status` tells.
std::unique_ptr<Norm> conv_norm_forward(const Kernels&, int threads, const ProductShape&, const ConvInput&,
                                        const ConvWeight&, const NormOptions&, const float* gamma, const float* beta,
                                        uint8_t* scratch, int8_t* codes, Status* status);

struct ConvNormGradient {
  RealTensor real;               // of the result, or of its maximum pooling
  const PooledGradient* pooled;  // then, else null
  const float* range;            // its largest magnitude where it passes, or null
  bool rectified;                // the result was
  const Noise* noise;            // of its codes; null for nearest
  ShiftFormat format;            // of the products' gradient
  const Noise* product_noise;
};

// Where it goes; each but scratch may be null if nobody asks for it. input_range is written if there are an input's
// gradient and a normalization that it belongs to.
struct ConvNormResult {
  uint8_t* scratch;
  int32_t* input;  // (batch, in_h, in_w, in_c): sums, which stand for sum * input_factor[c]; may be the gradient's
  bool dense;      // else (batch, out_h, out_w, in_c): of the pixels alone that a 1x1 kernel without padding reads
  float* input_factor;
  float* input_range;  // the largest magnitude of what these stand for, where it passes the input's normalization
  float* weight;
  float *gamma, *beta;
};

Status conv_norm_backward(const Kernels&, int threads, const ProductShape&, Norm&, const int8_t* codes,
                          const ConvNormGradient&, const ConvInput&, const ConvWeight&, const ConvNormResult&);

}  // namespace bitstrata
