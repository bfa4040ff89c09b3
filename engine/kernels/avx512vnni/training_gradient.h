// The quantized normalization, backward, by hand; see bitstrata/training.h. The common loops do the rest.
#pragma once

#include "../common/training_gradient.h"
#include "training_norm.h"

namespace bitstrata {
namespace {

// Where gradients pass in a block.
struct Passes {
  Passes(const PassArgs& p, int64_t c, __mmask64 mask)
      : first(load_bytes(p.first + c, mask)), last(load_bytes(p.last + c, mask)) {}
  __mmask64 operator()(__m512i h) const { return _mm512_cmpge_epi8_mask(h, first) & _mm512_cmple_epi8_mask(h, last); }
  __m512i first, last;
};

// As integers, magnitudes order NaN above infinity above all else. Those of accumulators are multiplied at the end:
// conversion and products are monotone.
inline __m512i magnitudes(const float* x, __mmask16 mask) {
  return _mm512_and_si512(_mm512_maskz_loadu_epi32(mask, x), _mm512_set1_epi32(0x7FFFFFFF));
}
inline __m512i magnitudes(const int32_t* x, __mmask16 mask) {
  return _mm512_abs_epi32(_mm512_maskz_loadu_epi32(mask, x));
}
inline __m512 as_float(const float*, __m512i most) { return _mm512_castsi512_ps(most); }
inline __m512 as_float(const int32_t*, __m512i most) { return _mm512_cvtepu32_ps(most); }

template <typename In>
void fast_gradient_range(const In* g, const int8_t* x, int64_t count, int64_t period, const float* scale,
                         const PassArgs& p, float* most) {
  each_part(count, period, kPartOfWords, [&](int64_t from, int64_t to) {
    each_column(from, to, period, [&](int64_t c, int64_t valid, int64_t first, int64_t end) {
      const __mmask64 mask = first_of(valid);
      const Passes passes(p, c, mask);
      __m512i top[4];
      for (__m512i& t : top) t = _mm512_setzero_si512();
      for (int64_t at = first; at < end; at += period) {
        const __mmask64 pass = passes(load_bytes(x + at, mask)) & mask;
        for (int q = 0; q < 4; ++q) top[q] = _mm512_max_epu32(top[q], magnitudes(g + at + 16 * q, quarter(pass, q)));
      }
      for (int q = 0; q < 4; ++q) {
        const __mmask16 m = quarter(mask, q);
        float* to_most = most + c + 16 * q;
        __m512 value = as_float(g, top[q]);
        if (scale != nullptr) value = _mm512_mul_ps(value, _mm512_maskz_loadu_ps(m, scale + c + 16 * q));
        const __m512i seen = _mm512_maskz_loadu_epi32(m, to_most);
        const __m512i bits = _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(0x7FFFFFFF));
        _mm512_mask_storeu_epi32(to_most, m, _mm512_max_epi32(seen, bits));
      }
    });
  });
}

// Four rows of a block with the four bytes of a column beside each other. Lane 4 i + j of vector k has column
// 16 i + 4 k + j.
struct FourRows {
  FourRows(__m512i r0, __m512i r1, __m512i r2, __m512i r3) {
    const __m512i a = _mm512_unpacklo_epi8(r0, r1), b = _mm512_unpacklo_epi8(r2, r3), c = _mm512_unpackhi_epi8(r0, r1),
                  d = _mm512_unpackhi_epi8(r2, r3);
    v[0] = _mm512_unpacklo_epi16(a, b);
    v[1] = _mm512_unpackhi_epi16(a, b);
    v[2] = _mm512_unpacklo_epi16(c, d);
    v[3] = _mm512_unpackhi_epi16(c, d);
  }
  // Adds sums of such lanes to those of the columns.
  static void flush(const __m512i (&sums)[4], int64_t valid, int64_t* to) {
    int32_t part[kBlock];
    for (int k = 0; k < 4; ++k) {
      int32_t* at = part + 4 * k;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm512_castsi512_si128(sums[k]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(at + 16), _mm512_extracti32x4_epi32(sums[k], 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(at + 32), _mm512_extracti32x4_epi32(sums[k], 2));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(at + 48), _mm512_extracti32x4_epi32(sums[k], 3));
    }
    for (int64_t j = 0; j < valid; ++j) to[j] += part[j];
  }
  __m512i v[4];
};

// Adds the sums of g and of g * h of a block's columns; both end with rows before `end`.
inline void block_sums(const int8_t* g, const int8_t* h, int64_t end, int64_t period, __mmask64 mask, int64_t valid,
                       int64_t* sum, int64_t* with_h) {
  const __m512i sign = _mm512_set1_epi8(-128), one = _mm512_set1_epi8(1), zero = _mm512_setzero_si512();
  __m512i of_g[4] = {zero, zero, zero, zero}, of_gh[4] = {zero, zero, zero, zero};  // with h + 128 for h
  for (int64_t at = 0; at < end; at += 4 * period) {
    const auto row = [&](const int8_t* x, int r) {
      return at + r * period < end ? load_bytes(x + at + r * period, mask) : zero;
    };
    const FourRows gradients(row(g, 0), row(g, 1), row(g, 2), row(g, 3)),
        codes(row(h, 0), row(h, 1), row(h, 2), row(h, 3));
    for (int k = 0; k < 4; ++k) {
      of_g[k] = _mm512_dpbusd_epi32(of_g[k], one, gradients.v[k]);
      of_gh[k] = _mm512_dpbusd_epi32(of_gh[k], _mm512_xor_si512(codes.v[k], sign), gradients.v[k]);
    }
  }
  for (int k = 0; k < 4; ++k) of_gh[k] = _mm512_sub_epi32(of_gh[k], _mm512_slli_epi32(of_g[k], 7));
  FourRows::flush(of_g, valid, sum);
  FourRows::flush(of_gh, valid, with_h);
}

// The least and the most gradients of a block where h is negative, 0 and positive.
struct Sides {
  Sides() {
    for (int s = 0; s < 3; ++s) least[s] = _mm512_set1_epi8(127), most[s] = _mm512_set1_epi8(-128);
  }
  void add(__m512i v, __m512i h, __mmask64 mask) {
    const __mmask64 negative = _mm512_movepi8_mask(h), not_zero = _mm512_test_epi8_mask(h, h);
    extend(0, negative, v);
    extend(1, ~not_zero & mask, v);
    extend(2, not_zero & ~negative, v);
  }
  void extend(int s, __mmask64 mask, __m512i v) {
    least[s] = _mm512_mask_min_epi8(least[s], mask, least[s], v);
    most[s] = _mm512_mask_max_epi8(most[s], mask, most[s], v);
  }
  void flush(const GradientSums& to, int64_t c, __mmask64 mask) const {
    for (int s = 0; s < 3; ++s) {
      store_bytes(to.least[s] + c, mask, _mm512_min_epi8(least[s], load_bytes(to.least[s] + c, mask)));
      store_bytes(to.most[s] + c, mask, _mm512_max_epi8(most[s], load_bytes(to.most[s] + c, mask)));
    }
  }
  __m512i least[3], most[3];
};

template <bool kNoisy, bool kScaled, typename In>
void block_gradient_codes(const In* g, const int8_t* x, int64_t count, int64_t period, const float* scale,
                          float inverse, float bound, const Noise* noise, const PassArgs& p, int8_t* out,
                          const GradientSums& sums) {
  const __m512 by = _mm512_set1_ps(kNoisy ? inverse * kOne : inverse);
  const __m512i hi = _mm512_set1_epi8(static_cast<char>(bound)), lo = _mm512_set1_epi8(static_cast<char>(-bound));
  uint16_t buffer[kNoiseBuffer];
  each_part(count, period, kNoiseChunk, [&](int64_t from, int64_t to) {
    const uint16_t* bits = kNoisy ? noise_bits(*noise, noise->start + from, to - from, buffer) : nullptr;
    each_column(from, to, period, [&](int64_t c, int64_t valid, int64_t first, int64_t end) {
      const __mmask64 mask = first_of(valid);
      const Floats s = kScaled ? load_floats(scale + c, mask) : Floats{};
      const Passes passes(p, c, mask);
      Sides sides;
      for (int64_t at = first; at < end; at += period) {
        ask_for(g, at + (to - from), kBlock);
        ask_for(x, at + (to - from), kBlock);
        const __m512i h = load_bytes(x + at, mask);
        const Floats z = times(scaled<kScaled>(g + at, mask, s), by);
        __m512i codes;
        if constexpr (kNoisy)
          codes = rounded(z, bits + (at - from));
        else
          codes = rounded(z);
        codes = _mm512_maskz_mov_epi8(passes(h), clamped(codes, lo, hi));
        store_bytes(out + at, mask, codes);
        sides.add(codes, h, mask);
      }
      sides.flush(sums, c, mask);
      block_sums(out + first, x + first, end - first, period, mask, valid, sums.g + c, sums.gh + c);
    });
  });
}

template <typename In>
void fast_gradient_codes(const In* g, const int8_t* x, int64_t count, int64_t period, const float* scale, float inverse,
                         float bound, const Noise* noise, const PassArgs& p, int8_t* out, const GradientSums& sums) {
  if (period > kNoiseChunk || inverse > kLargestFactor)
    return gradient_codes(g, x, count, period, scale, inverse, bound, noise, p, out, sums);
  if (noise == nullptr)
    scale == nullptr
        ? block_gradient_codes<false, false>(g, x, count, period, scale, inverse, bound, noise, p, out, sums)
        : block_gradient_codes<false, true>(g, x, count, period, scale, inverse, bound, noise, p, out, sums);
  else
    scale == nullptr
        ? block_gradient_codes<true, false>(g, x, count, period, scale, inverse, bound, noise, p, out, sums)
        : block_gradient_codes<true, true>(g, x, count, period, scale, inverse, bound, noise, p, out, sums);
}

// What a block's gradients become: coefficient * g - constant, by the side of h.
struct L1Block {
  L1Block(const L1GradientArgs& l, int64_t c, __mmask64 m)
      : mask(m),
        coefficient(load_floats(l.coefficient + c, m)),
        below(load_floats(l.constant[0] + c, m)),
        at_zero(load_floats(l.constant[1] + c, m)),
        above(load_floats(l.constant[2] + c, m)) {}
  Floats operator()(const int8_t* g, const int8_t* h) const {
    const __m512i side = load_bytes(h, mask);
    const __mmask64 negative = _mm512_movepi8_mask(side), zero = _mm512_testn_epi8_mask(side, side);
    Floats dx = load_floats(g, mask);
    for (int q = 0; q < 4; ++q) {
      __m512 constant = _mm512_mask_mov_ps(above.v[q], quarter(negative, q), below.v[q]);
      constant = _mm512_mask_mov_ps(constant, quarter(zero, q), at_zero.v[q]);
      dx.v[q] = _mm512_sub_ps(_mm512_mul_ps(coefficient.v[q], dx.v[q]), constant);
    }
    return dx;
  }
  __mmask64 mask;
  Floats coefficient, below, at_zero, above;
};

inline void fast_l1_gradient(const int8_t* g, const int8_t* h, int64_t count, int64_t period, const L1GradientArgs& l,
                             float* out) {
  each_part(count, period, kPartOfWords, [&](int64_t from, int64_t to) {
    each_column(from, to, period, [&](int64_t c, int64_t valid, int64_t first, int64_t end) {
      const L1Block block(l, c, first_of(valid));
      for (int64_t at = first; at < end; at += period) {
        const Floats dx = block(g + at, h + at);
        for (int q = 0; q < 4; ++q) _mm512_mask_storeu_ps(out + at + 16 * q, quarter(block.mask, q), dx.v[q]);
      }
    });
  });
}

template <bool kNoisy>
void block_l1_gradient_codes(const int8_t* g, const int8_t* h, int64_t count, int64_t period, const L1GradientArgs& l,
                             const CodeArgs& a, uint8_t* out) {
  const __m512i lo = _mm512_set1_epi8(static_cast<char>(a.lo)), hi = _mm512_set1_epi8(static_cast<char>(a.hi));
  uint16_t buffer[kNoiseBuffer];
  each_part(count, period, kNoiseChunk, [&](int64_t from, int64_t to) {
    const uint16_t* bits = kNoisy ? noise_bits(*a.noise, a.noise->start + from, to - from, buffer) : nullptr;
    each_column(from, to, period, [&](int64_t c, int64_t valid, int64_t first, int64_t end) {
      const L1Block block(l, c, first_of(valid));
      const Floats factor = times(load_floats(a.factor + c, block.mask), _mm512_set1_ps(kNoisy ? kOne : 1.0f));
      const Shifts shifts(a.shift + c, block.mask);
      for (int64_t at = first; at < end; at += period) {
        ask_for(g, at + (to - from), kBlock);
        ask_for(h, at + (to - from), kBlock);
        Floats dx = block(g + at, h + at);
        for (int q = 0; q < 4; ++q) dx.v[q] = _mm512_mul_ps(dx.v[q], factor.v[q]);
        __m512i codes;
        if constexpr (kNoisy)
          codes = rounded(dx, bits + (at - from));
        else
          codes = rounded(dx);
        store_bytes(out + at, block.mask, shifts(clamped(codes, lo, hi)));
      }
    });
  });
}

inline void fast_l1_gradient_codes(const int8_t* g, const int8_t* h, int64_t count, int64_t period,
                                   const L1GradientArgs& l, const CodeArgs& a, uint8_t* out) {
  float largest = 0;
  for (int64_t c = 0; c < period; ++c) largest = greater(a.factor[c], largest);
  if (period > kNoiseChunk || a.hi > 127 || largest > kLargestFactor || a.powers)
    return l1_gradient_codes(g, h, count, period, l, a, out);
  a.noise == nullptr ? block_l1_gradient_codes<false>(g, h, count, period, l, a, out)
                     : block_l1_gradient_codes<true>(g, h, count, period, l, a, out);
}

}  // namespace
}  // namespace bitstrata
