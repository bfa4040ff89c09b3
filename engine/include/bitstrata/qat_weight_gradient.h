// The weight gradient of a quantization-aware step: of a convolution of codes, from a gradient in bfloat16.
#pragma once

#include <cstdint>

#include "bitstrata/products.h"

namespace bitstrata {

// out[o, i, ky, kx] = factor[o] * sum over the batch and all output positions of g[., o] * x[position under the tap,
// i]; padding counts as 0. x: (batch, in_h, in_w, in_c), without shifts; g: (batch, out_h, out_w, out_c) bfloat16; factor:
// (out_c,); out: (out_c, in_c, kernel_h, kernel_w). Sums are float32, over stretches of positions that depend on the
// shape alone and are added in their order: nothing depends on the number of threads. Where all of them are integers
// below 2^24, they are exact. A kernel may round sums and differences of neighbouring gradients to bfloat16 before it multiplies them.
// Throws std::invalid_argument on a shape that is none, or with several groups.
void qat_weight_gradient(const Kernels&, int threads, const ProductShape&, const ProductCodes& x, const uint16_t* g,
                         const float* factor, float* out);

}  // namespace bitstrata
