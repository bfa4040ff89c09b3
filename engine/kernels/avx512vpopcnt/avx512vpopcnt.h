// What rows whose processors may count bits in vectors use of this folder.
#pragma once

#include "bitstrata/kernels.h"

namespace bitstrata {

// Any convolution of codes in up to 8 bits by pairs of bit-planes; pays where such pairs are few.
extern const ConvKernel kAvx512VpopcntConv;

// Whether this processor has AVX-512 VPOPCNTDQ; its operating system saves the registers if AVX-512 is supported.
bool avx512vpopcnt_supported();
// Whether pairs of planes are the fastest way to compute this convolution.
bool avx512vpopcnt_pays(const ConvShape&, double byte_share);

}  // namespace bitstrata
