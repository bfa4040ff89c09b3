// What the AVX-512 VNNI files share.
#pragma once

#include "bitstrata/kernels.h"

namespace bitstrata {

// Any convolution: products of u8 and s8 in fours, summed in int32.
extern const ConvKernel kAvx512VnniConv;
// The same where pixels can be read from the input itself: unpadded 1x1 windows on u8.
extern const ConvKernel kAvx512VnniDirect;
// Three neighbouring columns of weights of few bits, with stride 1, by two thirds of the products.
extern const ConvKernel kAvx512VnniWinograd;
// The same by half of the products, weights and inputs of up to four bits.
extern const ConvKernel kAvx512VnniWinogradFour;
// One input and one output channel in each group; only where avx512vnni_depthwise_fits.
extern const ConvKernel kAvx512VnniDepthwise;
// Of any depthwise convolution; defined with the AVX2 kernels, which this row's processors can run too.
extern const ConvKernel kAvx2Depthwise;

bool avx512vnni_direct_fits(const ConvShape&);
bool avx512vnni_winograd_fits(const ConvShape&);
// Whether it fits and is faster than the first.
bool avx512vnni_winograd_pays(const ConvShape&);
bool avx512vnni_winograd_four_fits(const ConvShape&);
// Whether it fits and is faster than both.
bool avx512vnni_winograd_four_pays(const ConvShape&);
bool avx512vnni_depthwise_fits(const ConvShape&);

}  // namespace bitstrata
