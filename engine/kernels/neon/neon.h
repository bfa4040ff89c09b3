// What the AArch64 rows share: kernels for any processor of that architecture.
#pragma once

#include "bitstrata/kernels.h"

namespace bitstrata {

// Any convolution.
extern const ConvKernel kNeonConv;
// The same where pixels can be read from the input itself.
extern const ConvKernel kNeonDirect;
bool neon_direct_fits(const ConvShape&);
// One input and one output channel in each group: products of int16 summed in int32, exact whatever the codes.
extern const ConvKernel kNeonDepthwise;
// The same with products of s8 summed in int16: only where that is proved to hold a whole window's.
extern const ConvKernel kNeonDepthwiseNarrow;
bool neon_depthwise_narrow_fits(const ConvShape&);

extern const Kernels kNeonKernels;
extern const ProductKernels kNeonProducts;

}  // namespace bitstrata
