// One layer's share of a training step in integers: quantization, products, and what is kept from the forward to the
// backward pass, in one call each way. The operations are those of quantize.h and products.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "bitstrata/conv_norm.h"

namespace bitstrata {

enum class StepStatus { kDone, kWeight, kReal };  // or what was not finite: the weight, or the input or gradient

// The input's codes at rest: `format.bits` bits each, in the order (batch, in_h, in_w, in_c), and the grid that they
// belong to.
struct KeptCodes {
  const uint8_t* packed;
  const uint8_t* exponents;  // pack_exponents of (in_c,)
  float scale;
  ShiftFormat format;
};

// y: (batch, out_h, out_w, out_c), (+ bias, (out_c,); null for none). packed: as KeptCodes::packed, or null if nothing
// is to be kept. The grid is that of the codes that were made; with kWeight or kReal nothing else is defined.
StepStatus layer_forward(const Kernels&, int threads, const ProductShape&, const RealTensor& x, const ShiftFormat&,
                         const Noise*, const ConvWeight&, const float* bias, float* y, uint8_t* packed, ShiftGrid*);

// y of layer_forward once more, from what was kept and the same weight and bias: the same floats.
StepStatus layer_again(const Kernels&, int threads, const ProductShape&, const KeptCodes& x, const ConvWeight&,
                       const float* bias, float* y);

// Where gradients go, each in the shape of what it is of; null if nobody asks for it.
struct LayerGradients {
  float *input, *weight, *bias;
};

// The gradient is quantized once. x may be null if the weight's gradient is not asked for.
StepStatus layer_backward(const Kernels&, int threads, const ProductShape&, const RealTensor& gradient,
                          const ShiftFormat&, const Noise*, const KeptCodes* x, const ConvWeight&,
                          const LayerGradients&);

// Exponents below `groups` in as few bits each as hold them, the first in the low bits of the first byte.
std::vector<uint8_t> pack_exponents(const std::vector<uint8_t>& exponents, int groups);
std::vector<uint8_t> unpack_exponents(const uint8_t* packed, int64_t count, int groups);

}  // namespace bitstrata
