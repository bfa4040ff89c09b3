// Products of floats in the backward pass of quantization-aware training. Kernels: float_kernels.h.
#pragma once

#include <cstdint>

#include "bitstrata/products.h"
#include "bitstrata/qat.h"

namespace bitstrata {

// The gradient of a convolution's input: the transposed convolution of g, (batch, out_h, out_w, out_c), with a weight
// of integers, (out_c, in_c, kernel_h, kernel_w); out: (batch, in_h, in_w, in_c). Both are bfloat16, sums are float32
// and rounded once, to nearest. Whatever the number of threads, the result is the same. Throws std::invalid_argument,
// before anything is written, on a shape that does not agree with itself, more than one group, or more than 128 taps.
void qat_input_gradient(const Kernels&, int threads, const ProductShape&, const uint16_t* g, const QatWeight&,
                        uint16_t* out);

}  // namespace bitstrata
