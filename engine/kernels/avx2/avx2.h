// What the AVX2 files share.
#pragma once

#include "bitstrata/kernels.h"

namespace bitstrata {

// Any convolution, products of pairs in int16: exact whatever the codes.
extern const ConvKernel kAvx2Wide;
// Products of u8 and s8 pairs, summed in int16: see avx2_sums_fit.
extern const ConvKernel kAvx2Narrow;
// One input and one output channel in each group.
extern const ConvKernel kAvx2Depthwise;

// Whether sums of the narrow kernel's products fit int16 for every weight and input within the shape's bounds.
bool avx2_narrow_is_exact(const ConvShape&);

}  // namespace bitstrata
