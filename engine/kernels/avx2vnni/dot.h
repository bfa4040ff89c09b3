// vpdpbusd on 256 bits, in the encoding that this file is compiled for. See ../common/pointwise.h for the unnamed
// namespace.
#pragma once

#include <immintrin.h>

namespace bitstrata {
namespace {

// Each int32 lane: sum + the four products of a's u8 and b's s8, without saturation.
inline __m256i dot(__m256i sum, __m256i a, __m256i b) {
#ifdef __AVXVNNI__
  return _mm256_dpbusd_avx_epi32(sum, a, b);
#else
  return _mm256_dpbusd_epi32(sum, a, b);
#endif
}

}  // namespace
}  // namespace bitstrata
