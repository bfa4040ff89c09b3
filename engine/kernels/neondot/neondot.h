// What the files of the dot product row share.
#pragma once

#include "bitstrata/kernels.h"

namespace bitstrata {

// Any convolution.
extern const ConvKernel kNeonDotConv;
// The same where pixels can be read from the input itself.
extern const ConvKernel kNeonDotDirect;

extern const WeightGradKernel kNeonDotWeightGrad;

}  // namespace bitstrata
