// What rows whose processors may multiply bfloat16 in vectors of 512 bits use of this folder.
#pragma once

#include "bitstrata/kernels.h"

namespace bitstrata {

// The products of floats with AVX-512 BF16; null where the processor lacks it. The operating system saves the
// registers if AVX-512 is supported, which the caller has checked.
const FloatProducts* avx512bf16_products();

extern const InputGradientKernel kAvx512Bf16InputGradient, kAvx512Bf16TilesInputGradient;
extern const FloatWeightGradKernel kAvx512Bf16WeightGrad, kAvx512Bf16TilesWeightGrad;

}  // namespace bitstrata
