// Products of floats in the backward pass of quantization-aware training. Kernels: float_kernels.h.
#pragma once

#include <cstdint>

#include "bitstrata/products.h"
#include "bitstrata/qat.h"

namespace bitstrata {

// The gradient of a convolution's input: the transposed convolution of g, (batch, out_h, out_w, out_c), with a weight
// of integers, (out_c, in_c, kernel_h, kernel_w); out: (batch, in_h, in_w, in_c). Both are bfloat16, sums are float32
// and rounded once, to nearest. A kernel may round sums and differences of two gradients to bfloat16 before it
// multiplies them. Whatever the number of threads, the result is the same. Throws std::invalid_argument, before
// anything is written, on a shape that does not agree with itself, more than one group, or more than 128 taps.
void qat_input_gradient(const Kernels&, int threads, const ProductShape&, const uint16_t* g, const QatWeight&,
                        uint16_t* out);

// The gradient of its weight: out[o, i, ky, kx] = factor[o] * sum over the batch and all output positions of g[., o] *
// x[position under the tap, i]; padding counts as 0. x: (batch, in_h, in_w, in_c), without shifts; g: (batch, out_h,
// out_w, out_c) bfloat16; factor: (out_c,); out: (out_c, in_c, kernel_h, kernel_w), or with `channels_last`
// (out_c, kernel_h, kernel_w, in_c). Sums are float32, over stretches of
// positions that depend on the shape alone and are added in their order: nothing depends on the number of threads.
// A kernel may round sums and differences of neighbouring gradients to bfloat16 before it multiplies them. Of gradients
// that are integers within -128..128, sums below 2^24 are exact. Throws std::invalid_argument on a shape that is none,
// or with several groups.
void qat_weight_gradient(const Kernels&, int threads, const ProductShape&, const ProductCodes& x, const uint16_t* g,
                         const float* factor, bool channels_last, float* out);

}  // namespace bitstrata
