// The quantized normalization, forward, by hand; see bitstrata/training.h. The common loops do the rest.
#pragma once

#include "../common/training_norm.h"
#include "lanes.h"

namespace bitstrata {
namespace {

constexpr int64_t kPartOfWords = 1 << 13, kPartOfBytes = 1 << 14;  // elements that stay in the L1 cache

// Least and greatest of a block's codes over rows.
struct Extremes {
  __m512i low = _mm512_set1_epi8(127), high = _mm512_set1_epi8(-128);
  void add(__m512i codes) {
    low = _mm512_min_epi8(low, codes);
    high = _mm512_max_epi8(high, codes);
  }
  void flush(int32_t* least, int32_t* most, int64_t valid) const {
    int8_t a[kBlock], b[kBlock];
    _mm512_storeu_si512(a, low);
    _mm512_storeu_si512(b, high);
    for (int64_t j = 0; j < valid; ++j) {
      least[j] = lesser(int32_t{a[j]}, least[j]);
      most[j] = greater(int32_t{b[j]}, most[j]);
    }
  }
};

template <bool kScaled, typename In>
inline Floats scaled(const In* x, __mmask64 mask, const Floats& scale) {
  Floats f = load_floats(x, mask);
  if (kScaled)
    for (int q = 0; q < 4; ++q) f.v[q] = _mm512_mul_ps(f.v[q], scale.v[q]);
  return f;
}

inline Floats times(Floats f, __m512 by) {
  for (__m512& v : f.v) v = _mm512_mul_ps(v, by);
  return f;
}

template <bool kScaled, typename In>
void block_norm_codes(const In* x, int64_t count, int64_t period, const float* scale, float inverse, float bound,
                      int8_t* out, int64_t* sum, int32_t* low, int32_t* high) {
  const __m512 by = _mm512_set1_ps(inverse);
  const __m512i hi = _mm512_set1_epi8(static_cast<char>(bound)), lo = _mm512_set1_epi8(static_cast<char>(-bound));
  each_part(count, period, kPartOfWords, [&](int64_t from, int64_t to) {
    each_column(from, to, period, [&](int64_t c, int64_t valid, int64_t first, int64_t end) {
      const __mmask64 mask = first_of(valid);
      const Floats s = kScaled ? load_floats(scale + c, mask) : Floats{};
      ByteSums sums;
      Extremes extremes;
      for (int64_t at = first; at < end; at += period) {
        ask_for(x, at + kAhead, kBlock);
        const __m512i codes = clamped(rounded(times(scaled<kScaled>(x + at, mask, s), by)), lo, hi);
        store_bytes(out + at, mask, codes);
        sums.add(codes);
        extremes.add(codes);
      }
      sums.flush(sum + c, valid);
      extremes.flush(low + c, high + c, valid);
    });
  });
}

template <typename In>
void fast_norm_codes(const In* x, int64_t count, int64_t period, const float* scale, float inverse, float bound,
                     int8_t* out, int64_t* sum, int32_t* low, int32_t* high) {
  scale == nullptr ? block_norm_codes<false>(x, count, period, scale, inverse, bound, out, sum, low, high)
                   : block_norm_codes<true>(x, count, period, scale, inverse, bound, out, sum, low, high);
}

inline void fast_norm_sides(const int8_t* x, int64_t count, int64_t period, const SideArgs& a, int64_t* below,
                            int64_t* above, int64_t* sum_above) {
  each_part(count, period, kPartOfBytes, [&](int64_t from, int64_t to) {
    each_column(from, to, period, [&](int64_t c, int64_t valid, int64_t first, int64_t end) {
      const __mmask64 mask = first_of(valid);
      const __m512i under = load_bytes(a.below + c, mask), up_to = load_bytes(a.up_to + c, mask);
      Counts of_below, of_above;
      ByteSums sums;
      for (int64_t at = first; at < end; at += period) {
        const __m512i codes = load_bytes(x + at, mask);
        const __mmask64 over = _mm512_cmpgt_epi8_mask(codes, up_to);
        of_below.add(_mm512_cmple_epi8_mask(codes, under));
        of_above.add(over);
        sums.add(_mm512_maskz_mov_epi8(over, codes));
      }
      of_below.flush(below + c, valid);
      of_above.flush(above + c, valid);
      sums.flush(sum_above + c, valid);
    });
  });
}

inline void fast_norm_center(int8_t* x, int64_t count, int64_t period, const CenterArgs& a, bool signs, int64_t* sum) {
  const __m512 step = _mm512_set1_ps(a.step);
  each_part(count, period, kPartOfBytes, [&](int64_t from, int64_t to) {
    each_column(from, to, period, [&](int64_t c, int64_t valid, int64_t first, int64_t end) {
      const __mmask64 mask = first_of(valid);
      const Floats mean = load_floats(a.mean + c, mask), gain = load_floats(a.gain + c, mask);
      const __m512i one = _mm512_set1_epi8(1), minus_one = _mm512_set1_epi8(-1);
      ByteSums sums;
      for (int64_t at = first; at < end; at += period) {
        Floats f = load_floats(x + at, mask);
        for (int q = 0; q < 4; ++q)
          f.v[q] = _mm512_mul_ps(_mm512_sub_ps(_mm512_mul_ps(f.v[q], step), mean.v[q]), gain.v[q]);
        const __m512i h = rounded(f);
        store_bytes(x + at, mask, h);
        sums.add(signs ? clamped(h, minus_one, one) : h);
      }
      sums.flush(sum + c, valid);
    });
  });
}

// A block's codes are moved to the left by the shift of their channels: doubled once, twice and four times more.
struct Shifts {
  Shifts(const int32_t* shift, __mmask64 mask) {
    Ints s;
    for (int q = 0; q < 4; ++q) s.v[q] = _mm512_maskz_loadu_epi32(quarter(mask, q), shift + 16 * q);
    const __m512i bytes = to_bytes(s);
    for (int b = 0; b < 3; ++b) bit[b] = _mm512_test_epi8_mask(bytes, _mm512_set1_epi8(static_cast<char>(1 << b)));
  }
  __m512i operator()(__m512i codes) const {
    codes = _mm512_mask_add_epi8(codes, bit[0], codes, codes);
    for (int i = 0; i < 2; ++i) codes = _mm512_mask_add_epi8(codes, bit[1], codes, codes);
    if (bit[2] != 0)
      for (int i = 0; i < 4; ++i) codes = _mm512_mask_add_epi8(codes, bit[2], codes, codes);
    return codes;
  }
  __mmask64 bit[3];
};

inline void fast_norm_to_codes(const int8_t* x, int64_t count, int64_t period, const AffineArgs& f, const CodeArgs& a,
                               uint8_t* out) {
  if (a.noise != nullptr || a.hi > 127) return norm_to_codes(x, count, period, f, a, out);
  const __m512 floor = _mm512_set1_ps(f.floor);
  const __m512i lo = _mm512_set1_epi8(static_cast<char>(a.lo)), hi = _mm512_set1_epi8(static_cast<char>(a.hi));
  each_part(count, period, kPartOfBytes, [&](int64_t from, int64_t to) {
    each_column(from, to, period, [&](int64_t c, int64_t valid, int64_t first, int64_t end) {
      const __mmask64 mask = first_of(valid);
      const Floats scale = load_floats(f.scale + c, mask), offset = load_floats(f.offset + c, mask),
                   factor = load_floats(a.factor + c, mask);
      const Shifts shifts(a.shift + c, mask);
      for (int64_t at = first; at < end; at += period) {
        Floats y = load_floats(x + at, mask);
        for (int q = 0; q < 4; ++q) {
          y.v[q] = _mm512_add_ps(_mm512_mul_ps(y.v[q], scale.v[q]), offset.v[q]);
          y.v[q] = _mm512_mul_ps(_mm512_max_ps(y.v[q], floor), factor.v[q]);
        }
        store_bytes(out + at, mask, shifts(clamped(rounded(y), lo, hi)));
      }
    });
  });
}

}  // namespace
}  // namespace bitstrata
