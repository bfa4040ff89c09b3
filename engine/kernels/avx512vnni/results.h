// What becomes of a convolution's sums: they are stored, or requantized in their registers and stored as codes. See
// ../common/pointwise.h for the unnamed namespace.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../common/unroll.h"
#include "bitstrata/kernels.h"

namespace bitstrata {
namespace {

// Sixteen channels' int64, of lanes 0, 2, 4... and of lanes 1, 3, 5...
struct Parities {
  BITSTRATA_INLINE Parities(const int64_t* from, __mmask16 mask) {
    const __m512i low = _mm512_maskz_loadu_epi64(static_cast<__mmask8>(mask), from);
    const __m512i high = _mm512_maskz_loadu_epi64(static_cast<__mmask8>(mask >> 8), from + 8);
    even = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14), high);
    odd = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15), high);
  }
  __m512i even, odd;
};

// Requantization of sixteen channels, from channel c on, in two of its forms: see RequantForm.
struct SixteenLow {
  BITSTRATA_INLINE SixteenLow(const RequantArgs& a, int64_t c, __mmask16 mask)
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

// x * factor + bias of sixteen channels in 64 bits.
struct Products {
  BITSTRATA_INLINE Products(const RequantArgs& a, int64_t c, __mmask16 mask)
      : even(_mm512_maskz_loadu_epi32(mask, a.factor + c)), odd(_mm512_srli_epi64(even, 32)), bias(a.bias + c, mask) {}
  BITSTRATA_INLINE __m512i of_even(__m512i x) const { return _mm512_add_epi64(_mm512_mul_epi32(x, even), bias.even); }
  BITSTRATA_INLINE __m512i of_odd(__m512i x) const {
    return _mm512_add_epi64(_mm512_mul_epi32(_mm512_srli_epi64(x, 32), odd), bias.odd);
  }
  __m512i even, odd;
  Parities bias;
};

struct SixteenHigh {
  BITSTRATA_INLINE SixteenHigh(const RequantArgs& a, int64_t c, __mmask16 mask)
      : products(a, c, mask),
        places(_mm512_maskz_loadu_epi32(mask, a.places + c)),
        lo(_mm512_set1_epi32(a.lo)),
        hi(_mm512_set1_epi32(a.hi)) {}
  BITSTRATA_INLINE __m512i operator()(__m512i x) const {
    const __m512i upper = _mm512_mask_shuffle_epi32(products.of_odd(x), 0x5555, products.of_even(x), _MM_PERM_DDBB);
    return _mm512_min_epi32(_mm512_max_epi32(_mm512_srav_epi32(upper, places), lo), hi);
  }
  Products products;
  __m512i places, lo, hi;
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
  // Calls body(store) with the Vector of j.
  template <bool kLast, typename Body>
  BITSTRATA_INLINE void vector(int64_t j, __mmask16 mask, const Body& body) const {
    body(Vector<kLast>(*this, j, mask));
  }
  const void* at(int64_t pixel, int64_t j) const { return to + pixel * pitch + j * 16; }
  Results from(int64_t pixel, int64_t first_channel) const { return {to + pixel * pitch + first_channel, pitch}; }

  int32_t* to;
  int64_t pitch;
};

template <>
struct Results<uint8_t> {
  template <typename Form, bool kLast>
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
    Form requant;
    uint8_t* to;
    int64_t pitch;
    __mmask16 mask;
  };
  template <bool kLast, typename Body>
  BITSTRATA_INLINE void vector(int64_t j, __mmask16 mask, const Body& body) const {
    if (requant->form[0] == RequantForm::high)
      body(Vector<SixteenHigh, kLast>(*this, j, mask));
    else
      body(Vector<SixteenLow, kLast>(*this, j, mask));
  }
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
