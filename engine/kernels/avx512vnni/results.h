// What becomes of a convolution's sums: they are stored, or requantized in their registers and stored as codes. See
// ../common/pointwise.h for the unnamed namespace.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../common/unroll.h"
#include "bitstrata/kernels.h"

namespace bitstrata {
namespace {

// Requantization of sixteen channels, from channel c on, in 32 bits, where that was proved to give the same integers.
struct SixteenShort {
  BITSTRATA_INLINE SixteenShort(const RequantArgs& a, int64_t c, __mmask16 mask)
      : from(_mm512_maskz_loadu_epi32(mask, a.from + c)),
        to(_mm512_maskz_loadu_epi32(mask, a.to + c)),
        factor(_mm512_maskz_loadu_epi32(mask, a.factor + c)),
        addend(_mm512_maskz_loadu_epi32(mask, a.addend + c)),
        places(_mm512_maskz_loadu_epi32(mask, a.places + c)) {}
  BITSTRATA_INLINE __m512i operator()(__m512i x) const {
    const __m512i inside = _mm512_min_epi32(_mm512_max_epi32(x, from), to);
    return _mm512_srav_epi32(_mm512_add_epi32(_mm512_mullo_epi32(inside, factor), addend), places);
  }
  __m512i from, to, factor, addend, places;
};

// Results of a block of pixels, `pitch` elements apart; a vector is sixteen neighbouring channels.
template <typename Out>
struct Results;

template <>
struct Results<int32_t> {
  // Stores the sums of vector j of each pixel. mask: channels that are real, of the last vector.
  template <bool kLast>
  struct Vector {
    BITSTRATA_INLINE Vector(const Results& r, int64_t j, __mmask16 mask)
        : to(r.to + j * 16), pitch(r.pitch), mask(mask) {}
    BITSTRATA_INLINE void operator()(int64_t pixel, __m512i sum) const {
      if constexpr (kLast)
        _mm512_mask_storeu_epi32(to + pixel * pitch, mask, sum);
      else
        _mm512_storeu_si512(to + pixel * pitch, sum);
    }
    int32_t* to;
    int64_t pitch;
    __mmask16 mask;
  };
  const void* at(int64_t pixel, int64_t j) const { return to + pixel * pitch + j * 16; }
  Results from(int64_t pixel, int64_t first_channel) const { return {to + pixel * pitch + first_channel, pitch}; }

  int32_t* to;
  int64_t pitch;
};

template <>
struct Results<uint8_t> {
  template <bool kLast>
  struct Vector {
    BITSTRATA_INLINE Vector(const Results& r, int64_t j, __mmask16 mask)
        : requant(*r.requant, r.channel + j * 16, kLast ? mask : 0xFFFF),
          to(r.to + j * 16),
          pitch(r.pitch),
          mask(mask) {}
    BITSTRATA_INLINE void operator()(int64_t pixel, __m512i sum) const {
      const __m128i codes = _mm512_cvtepi32_epi8(requant(sum));
      if constexpr (kLast)
        _mm_mask_storeu_epi8(to + pixel * pitch, mask, codes);
      else
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + pixel * pitch), codes);
    }
    SixteenShort requant;
    uint8_t* to;
    int64_t pitch;
    __mmask16 mask;
  };
  const void* at(int64_t pixel, int64_t j) const { return to + pixel * pitch + j * 16; }
  Results from(int64_t pixel, int64_t first_channel) const {
    return {to + pixel * pitch + first_channel, pitch, requant, channel + first_channel};
  }

  uint8_t* to;
  int64_t pitch;
  const RequantArgs* requant;
  int64_t channel;  // that `to` belongs to
};

}  // namespace
}  // namespace bitstrata
