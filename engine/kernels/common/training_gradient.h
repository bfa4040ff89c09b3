// The quantized normalization, backward; see bitstrata/training.h.
//
// Like everything in this folder this is compiled once for each instruction set, in an unnamed namespace.
#pragma once

#include "training_norm.h"

namespace bitstrata {
namespace {

// The value where first <= x <= last, else 0.
inline float passing(float value, int8_t x, int8_t first, int8_t last) {
  const float from = x >= first ? value : 0.0f;
  return x <= last ? from : 0.0f;
}

template <bool kScaled, typename In>
void gradient_range_with(const In* g, const int8_t* x, int64_t count, int64_t period, const float* scale,
                         const PassArgs& p, float* most) {
  constexpr int64_t kValues = 512;
  each_stretch(0, count, period, [&](int64_t start, int64_t channel, int64_t size) {
    for (int64_t done = 0; done < size; done += kValues) {
      const int64_t at = start + done, c = channel + done, n = least(kValues, size - done);
      const In* from = g + at;
      const int8_t *codes = x + at, *first = p.first + c, *last = p.last + c;
      const float* s = scale + (kScaled ? c : 0);
      float* to = most + c;
      float values[kValues];
      BITSTRATA_INDEPENDENT
      for (int64_t j = 0; j < n; ++j) {
        const float value = kScaled ? to_float(from[j]) * s[j] : to_float(from[j]);
        values[j] = passing(value, codes[j], first[j], last[j]);
      }
      BITSTRATA_INDEPENDENT
      for (int64_t j = 0; j < n; ++j)  // as in `range`: NaN is above all
        to[j] = from_bits(greater(magnitude_bits(values[j]), magnitude_bits(to[j])));
    }
  });
}

template <typename In>
void gradient_range(const In* g, const int8_t* x, int64_t count, int64_t period, const float* scale, const PassArgs& p,
                    float* most) {
  scale == nullptr ? gradient_range_with<false>(g, x, count, period, scale, p, most)
                   : gradient_range_with<true>(g, x, count, period, scale, p, most);
}

template <bool kNoisy, bool kScaled, typename In>
void gradient_codes_with(const In* g, const int8_t* x, int64_t count, int64_t period, const float* scale, float inverse,
                         float bound, const Noise* noise, const PassArgs& p, int8_t* out) {
  each_noisy_stretch<kNoisy>(count, period, noise, [&](int64_t at, int64_t c, int64_t n, const uint16_t* bits) {
    const In* from = g + at;
    const float* s = scale + (kScaled ? c : 0);
    int8_t* to = out + at;
    ask_for(from, kAhead, n);
    ask_for(x + at, kAhead, n);
    const float by = inverse, most = bound;  // copies: a store of bytes might change what a reference refers to
    BITSTRATA_INDEPENDENT
    for (int64_t j = 0; j < n; ++j) {
      const float value = kScaled ? to_float(from[j]) * s[j] : to_float(from[j]);
      to[j] = static_cast<int8_t>(code_of<kNoisy>(value * by, -most, most, kNoisy ? bits[j] : 0));
    }
    const int8_t *codes = x + at, *first = p.first + c, *last = p.last + c;
    BITSTRATA_INDEPENDENT
    for (int64_t j = 0; j < n; ++j) {  // bytes alone make the longest vectors
      const int8_t passing = static_cast<int8_t>(-((codes[j] >= first[j]) & (codes[j] <= last[j])));
      to[j] = static_cast<int8_t>(to[j] & passing);
    }
  });
}

inline int8_t greater8(int8_t a, int8_t b) { return a > b ? a : b; }
inline int8_t lesser8(int8_t a, int8_t b) { return a < b ? a : b; }

// Extends least and most by v where the code is on one side: below 0, 0, above. With one side at a time, and masks in
// place of conditions, compilers make vectors of bytes of it.
template <typename Where>
inline void extend_side(const int8_t* v, const int8_t* code, int64_t n, int8_t* least, int8_t* most,
                        const Where& where) {
  BITSTRATA_INDEPENDENT
  for (int64_t j = 0; j < n; ++j) {
    const int8_t mask = static_cast<int8_t>(-where(code[j])), other = static_cast<int8_t>(~mask);
    const int8_t here = static_cast<int8_t>(v[j] & mask);
    least[j] = lesser8(static_cast<int8_t>(here | (other & 127)), least[j]);
    most[j] = greater8(static_cast<int8_t>(here | (other & -128)), most[j]);
  }
}

inline void gradient_sums(const int8_t* g, const int8_t* h, int64_t count, int64_t period, const GradientSums& sums) {
  each_stretch(0, count, period, [&](int64_t at, int64_t c, int64_t n) {
    const int8_t *v = g + at, *code = h + at;
    const auto extend = [&](int side, const auto& where) {
      extend_side(v, code, n, sums.least[side] + c, sums.most[side] + c, where);
    };
    extend(0, [](int8_t h) { return h < 0; });
    extend(1, [](int8_t h) { return h == 0; });
    extend(2, [](int8_t h) { return h > 0; });
  });
  sum_codes_up(g, count, period, sums.g);
  sum_up<128 * 128, int32_t>(count, period, sums.gh, [=](int64_t i, int64_t) { return g[i] * h[i]; });
}

template <bool kNoisy, typename In>
void gradient_codes_by(const In* g, const int8_t* x, int64_t count, int64_t period, const float* scale, float inverse,
                       float bound, const Noise* noise, const PassArgs& p, int8_t* out) {
  scale == nullptr ? gradient_codes_with<kNoisy, false>(g, x, count, period, scale, inverse, bound, noise, p, out)
                   : gradient_codes_with<kNoisy, true>(g, x, count, period, scale, inverse, bound, noise, p, out);
}

template <typename In>
void gradient_codes(const In* g, const int8_t* x, int64_t count, int64_t period, const float* scale, float inverse,
                    float bound, const Noise* noise, const PassArgs& p, int8_t* out, const GradientSums& sums) {
  each_stage(count, period, [&](int64_t at, int64_t n) {
    if (noise == nullptr) {
      gradient_codes_by<false>(g + at, x + at, n, period, scale, inverse, bound, noise, p, out + at);
    } else {
      const Noise moved{noise->seed, noise->stream, noise->start + at};
      gradient_codes_by<true>(g + at, x + at, n, period, scale, inverse, bound, &moved, p, out + at);
    }
    gradient_sums(out + at, x + at, n, period, sums);
  });
}

inline float l1_gradient_at(int8_t g, int8_t h, float coefficient, float negative, float zero, float positive) {
  const float side = static_cast<float>(h);
  const float constant = side < 0 ? negative : side > 0 ? positive : zero;
  return coefficient * static_cast<float>(g) - constant;
}

inline void l1_gradient(const int8_t* g, const int8_t* h, int64_t count, int64_t period, const L1GradientArgs& a,
                        float* out) {
  each_stretch(0, count, period, [&](int64_t at, int64_t c, int64_t n) {
    const int8_t *gradient = g + at, *codes = h + at;
    const float *coefficient = a.coefficient + c, *negative = a.constant[0] + c, *zero = a.constant[1] + c,
                *positive = a.constant[2] + c;
    float* to = out + at;
    BITSTRATA_INDEPENDENT
    for (int64_t j = 0; j < n; ++j)
      to[j] = l1_gradient_at(gradient[j], codes[j], coefficient[j], negative[j], zero[j], positive[j]);
  });
}

inline void l2_gradient(const int8_t* g, const int8_t* h, int64_t count, int64_t period, const L2GradientArgs& a,
                        float* out) {
  each_stretch(0, count, period, [&](int64_t at, int64_t c, int64_t n) {
    const int8_t *gradient = g + at, *codes = h + at;
    const float *coefficient = a.coefficient + c, *constant = a.constant + c, *slope = a.slope + c;
    float* to = out + at;
    BITSTRATA_INDEPENDENT
    for (int64_t j = 0; j < n; ++j)
      to[j] =
          (coefficient[j] * static_cast<float>(gradient[j]) - constant[j]) - static_cast<float>(codes[j]) * slope[j];
  });
}

template <bool kNoisy, bool kPowers>
void l1_gradient_codes_with(const int8_t* g, const int8_t* h, int64_t count, int64_t period, const L1GradientArgs& l,
                            const CodeArgs& a, uint8_t* out) {
  each_noisy_stretch<kNoisy>(count, period, a.noise, [&](int64_t at, int64_t c, int64_t n, const uint16_t* bits) {
    const int8_t *gradient = g + at, *codes = h + at;
    const float *coefficient = l.coefficient + c, *negative = l.constant[0] + c, *zero = l.constant[1] + c,
                *positive = l.constant[2] + c, *factor = a.factor + c;
    const int32_t* shift = a.shift + c;
    uint8_t* to = out + at;
    const float lo = a.lo, hi = a.hi;
    BITSTRATA_INDEPENDENT
    for (int64_t j = 0; j < n; ++j) {
      const float dx = l1_gradient_at(gradient[j], codes[j], coefficient[j], negative[j], zero[j], positive[j]);
      to[j] =
          static_cast<uint8_t>(code_of_u<kNoisy, kPowers>(dx * factor[j], lo, hi, kNoisy ? bits[j] : 0) << shift[j]);
    }
  });
}

inline void l1_gradient_codes(const int8_t* g, const int8_t* h, int64_t count, int64_t period, const L1GradientArgs& l,
                              const CodeArgs& a, uint8_t* out) {
  as_asked(a, [&](auto noisy, auto powers) {
    l1_gradient_codes_with<noisy.value, powers.value>(g, h, count, period, l, a, out);
  });
}

}  // namespace
}  // namespace bitstrata
