// The kernels of bitstrata/training.h, in loops that compilers turn into vector code for the instruction set at hand.
//
// Like everything in this folder this is compiled once for each instruction set, in an unnamed namespace; translation
// units that include it must be compiled without contraction of floating-point expressions.
#pragma once

#include <cstring>

#include "bitstrata/training.h"
#include "noise.h"
#include "pack.h"

// Before a loop whose steps do not depend on one another: no array that it writes overlaps another.
#ifdef __clang__
#define BITSTRATA_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define BITSTRATA_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace bitstrata {
namespace {

inline int64_t least(int64_t a, int64_t b) { return b < a ? b : a; }

// To nearest, ties to even: exact for |x| < 2^22, and beyond that far from every bound that codes are clamped to.
inline float round_even(float x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  return (x + kMagic) - kMagic;
}

// Comparisons written so that they become single vector instructions.
inline float greater(float a, float b) { return a > b ? a : b; }
inline float lesser(float a, float b) { return a < b ? a : b; }
inline int32_t greater(int32_t a, int32_t b) { return a > b ? a : b; }
inline int32_t lesser(int32_t a, int32_t b) { return a < b ? a : b; }

inline int32_t magnitude_bits(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits & 0x7FFFFFFF;
}
inline float from_bits(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float magnitude(float x) { return __builtin_fabsf(x); }

inline float to_float(float x) { return x; }
inline float to_float(int32_t x) { return static_cast<float>(x); }
inline float to_float(uint16_t bfloat) { return from_bits(static_cast<int32_t>(static_cast<uint32_t>(bfloat) << 16)); }

inline int32_t round_noisy(float z, int32_t bits) {
  return ((static_cast<int32_t>((z + 128.0f) * 65536.0f) + bits) >> 16) - 128;
}

// Calls body(at, channel, n): elements [at, at + n) whose first has index `channel` in arrays of `period` elements.
template <typename Body>
inline void each_stretch(int64_t begin, int64_t end, int64_t period, const Body& body) {
  int64_t channel = begin % period;
  for (int64_t at = begin; at < end;) {
    const int64_t n = least(period - channel, end - at);
    body(at, channel, n);
    at += n;
    channel = 0;
  }
}

// The same with random bits of element `at`, null without noise.
template <bool kNoisy, typename Body>
inline void each_noisy_stretch(int64_t count, int64_t period, const Noise* noise, const Body& body) {
  if constexpr (kNoisy) {
    uint16_t buffer[kNoiseBuffer];
    const int64_t chunk = period < kNoiseChunk ? kNoiseChunk / period * period : kNoiseChunk;
    for (int64_t begin = 0; begin < count; begin += chunk) {
      const int64_t end = least(count, begin + chunk);
      const uint16_t* bits = noise_bits(*noise, noise->start + begin, end - begin, buffer);
      each_stretch(begin, end, period,
                   [&](int64_t at, int64_t channel, int64_t n) { body(at, channel, n, bits + (at - begin)); });
    }
  } else {
    each_stretch(0, count, period, [&](int64_t at, int64_t channel, int64_t n) {
      body(at, channel, n, static_cast<const uint16_t*>(nullptr));
    });
  }
}

template <typename In>
void range(const In* x, int64_t count, int64_t period, float* most) {
  each_stretch(0, count, period, [&](int64_t at, int64_t channel, int64_t n) {
    const In* from = x + at;
    float* to = most + channel;
    BITSTRATA_INDEPENDENT
    for (int64_t j = 0; j < n; ++j)  // as integers, magnitudes order NaN above infinity above all else
      to[j] = from_bits(greater(magnitude_bits(to_float(from[j])), magnitude_bits(to[j])));
  });
}

template <bool kNoisy>
inline int32_t code_of(float z, float lo, float hi, uint16_t bits) {
  if constexpr (kNoisy) {
    return greater(lesser(round_noisy(z, bits), static_cast<int32_t>(hi)), static_cast<int32_t>(lo));
  } else {
    return static_cast<int32_t>(greater(lesser(round_even(z), hi), lo));
  }
}

// The code modulo 2^32, to be shifted.
template <bool kNoisy>
inline uint32_t code_of_u(float z, float lo, float hi, uint16_t bits) {
  return static_cast<uint32_t>(code_of<kNoisy>(z, lo, hi, bits));
}

template <bool kNoisy, typename In>
void codes_with(const In* x, int64_t count, int64_t period, const CodeArgs& a, uint8_t* out) {
  each_noisy_stretch<kNoisy>(count, period, a.noise, [&](int64_t at, int64_t c, int64_t n, const uint16_t* bits) {
    const In* from = x + at;
    const float* factor = a.factor + c;
    const int32_t* shift = a.shift + c;
    uint8_t* to = out + at;
    const float lo = a.lo, hi = a.hi;
    BITSTRATA_INDEPENDENT
    for (int64_t j = 0; j < n; ++j)
      to[j] = static_cast<uint8_t>(code_of_u<kNoisy>(to_float(from[j]) * factor[j], lo, hi, kNoisy ? bits[j] : 0)
                                   << shift[j]);
  });
}

template <typename In>
void codes(const In* x, int64_t count, int64_t period, const CodeArgs& a, uint8_t* out) {
  a.noise == nullptr ? codes_with<false>(x, count, period, a, out) : codes_with<true>(x, count, period, a, out);
}

constexpr int64_t kStage = 1 << 12;  // elements that stay in the cache between two passes

// Calls body(at, n) for pieces of a few thousand elements, whole periods and whole bytes of bits.
template <typename Body>
inline void each_stage(int64_t count, int64_t period, const Body& body) {
  const int64_t unit = 8 * period, stage = unit < kStage ? kStage / unit * unit : unit;
  for (int64_t at = 0; at < count; at += stage) body(at, least(stage, count - at));
}

// Adds value(at, channel) to total[channel] for all elements. |value| <= kLargest: sums are kept in small integers over
// stretches in which these cannot overflow.
template <int64_t kLargest, typename Small, typename Value>
inline void sum_up(int64_t count, int64_t period, int64_t* total, const Value& value) {
  constexpr int64_t kChannels = 256, kRows = ((int64_t{1} << (8 * sizeof(Small) - 1)) - 1) / kLargest;
  Small part[kChannels];
  for (int64_t c = 0; c < period; c += kChannels) {
    const int64_t n = least(kChannels, period - c);
    for (int64_t first = 0; first < count; first += kRows * period) {
      const int64_t last = least(count, first + kRows * period);
      std::memset(part, 0, sizeof part);
      for (int64_t at = first; at < last; at += period) {
        const int64_t inside = least(n, last - at - c);
        BITSTRATA_INDEPENDENT
        for (int64_t j = 0; j < inside; ++j) part[j] = static_cast<Small>(part[j] + value(at + c + j, c + j));
      }
      BITSTRATA_INDEPENDENT
      for (int64_t j = 0; j < n; ++j) total[c + j] += part[j];
    }
  }
}

inline void sum_codes_up(const int8_t* x, int64_t count, int64_t period, int64_t* total) {
  sum_up<128, int16_t>(count, period, total, [=](int64_t i, int64_t) { return x[i]; });
}

template <bool kScaled, typename In>
void norm_codes_with(const In* x, int64_t count, int64_t period, const float* scale, float inverse, float bound,
                     int8_t* out, int32_t* low, int32_t* high) {
  each_stretch(0, count, period, [&](int64_t at, int64_t c, int64_t n) {
    const In* from = x + at;
    const float* s = scale + (kScaled ? c : 0);
    int8_t* to = out + at;
    int32_t* lowest = low + c;
    int32_t* highest = high + c;
    const float by = inverse, most = bound;  // copies: a store of bytes might change what a reference refers to
    BITSTRATA_INDEPENDENT
    for (int64_t j = 0; j < n; ++j) {
      const float value = kScaled ? to_float(from[j]) * s[j] : to_float(from[j]);
      const int32_t code = static_cast<int32_t>(greater(lesser(round_even(value * by), most), -most));
      to[j] = static_cast<int8_t>(code);
      lowest[j] = lesser(code, lowest[j]);
      highest[j] = greater(code, highest[j]);
    }
  });
}

template <typename In>
void norm_codes(const In* x, int64_t count, int64_t period, const float* scale, float inverse, float bound, int8_t* out,
                int64_t* sum, int32_t* low, int32_t* high) {
  each_stage(count, period, [&](int64_t at, int64_t n) {
    scale == nullptr ? norm_codes_with<false>(x + at, n, period, scale, inverse, bound, out + at, low, high)
                     : norm_codes_with<true>(x + at, n, period, scale, inverse, bound, out + at, low, high);
    sum_codes_up(out + at, n, period, sum);
  });
}

inline void norm_sides(const int8_t* x, int64_t count, int64_t period, const SideArgs& a, int64_t* below,
                       int64_t* above, int64_t* sum_above) {
  const int8_t *under = a.below, *up_to = a.up_to;
  each_stage(count, period, [=](int64_t at, int64_t n) {
    const int8_t* from = x + at;
    sum_up<1, int16_t>(n, period, below,
                       [=](int64_t i, int64_t c) { return static_cast<int8_t>(from[i] <= under[c]); });
    sum_up<1, int16_t>(n, period, above, [=](int64_t i, int64_t c) { return static_cast<int8_t>(from[i] > up_to[c]); });
    sum_up<128, int16_t>(n, period, sum_above, [=](int64_t i, int64_t c) {
      return static_cast<int8_t>(from[i] & -static_cast<int8_t>(from[i] > up_to[c]));
    });
  });
}

inline void norm_squares(const int8_t* x, int64_t count, int64_t period, int64_t* sum) {
  sum_up<128 * 128, int32_t>(count, period, sum, [=](int64_t i, int64_t) { return x[i] * x[i]; });
}

inline void norm_center(int8_t* x, int64_t count, int64_t period, const CenterArgs& a, bool signs, int64_t* sum) {
  each_stage(count, period, [=](int64_t first, int64_t size) {
    each_stretch(first, first + size, period, [=](int64_t at, int64_t c, int64_t n) {
      int8_t* codes = x + at;
      const float *mean = a.mean + c, *gain = a.gain + c, step = a.step;
      BITSTRATA_INDEPENDENT
      for (int64_t j = 0; j < n; ++j) {
        const float h = round_even((static_cast<float>(codes[j]) * step - mean[j]) * gain[j]);
        codes[j] = static_cast<int8_t>(static_cast<int32_t>(h));
      }
    });
    const int8_t* h = x + first;
    if (signs)
      sum_up<1, int16_t>(size, period, sum,
                         [=](int64_t i, int64_t) { return static_cast<int8_t>((h[i] > 0) - (h[i] < 0)); });
    else
      sum_codes_up(h, size, period, sum);
  });
}

template <bool kNoisy>
void norm_to_codes_with(const int8_t* x, int64_t count, int64_t period, const AffineArgs& f, const CodeArgs& a,
                        uint8_t* out) {
  each_noisy_stretch<kNoisy>(count, period, a.noise, [&](int64_t at, int64_t c, int64_t n, const uint16_t* bits) {
    const int8_t* from = x + at;
    const float* scale = f.scale + c;
    const float* offset = f.offset + c;
    const float* factor = a.factor + c;
    const int32_t* shift = a.shift + c;
    uint8_t* to = out + at;
    const float floor = f.floor, lo = a.lo, hi = a.hi;
    BITSTRATA_INDEPENDENT
    for (int64_t j = 0; j < n; ++j) {
      const float y = greater(static_cast<float>(from[j]) * scale[j] + offset[j], floor);
      to[j] = static_cast<uint8_t>(code_of_u<kNoisy>(y * factor[j], lo, hi, kNoisy ? bits[j] : 0) << shift[j]);
    }
  });
}

inline void norm_to_codes(const int8_t* x, int64_t count, int64_t period, const AffineArgs& f, const CodeArgs& a,
                          uint8_t* out) {
  a.noise == nullptr ? norm_to_codes_with<false>(x, count, period, f, a, out)
                     : norm_to_codes_with<true>(x, count, period, f, a, out);
}

// Bit i: whether x[i] > 0. Whole bytes.
inline void positive_bits(const float* x, int64_t count, uint8_t* bits) {
  int64_t i = 0;
#ifdef __AVX512F__
  for (; i + 16 <= count; i += 16) {
    const uint16_t two = _mm512_cmp_ps_mask(_mm512_loadu_ps(x + i), _mm512_setzero_ps(), _CMP_GT_OQ);
    std::memcpy(bits + i / 8, &two, 2);
  }
#endif
  for (; i < count; i += 8) {
    uint32_t byte = 0;
    const int64_t n = least(8, count - i);
    for (int64_t b = 0; b < n; ++b) byte |= static_cast<uint32_t>(x[i + b] > 0) << b;
    bits[i / 8] = static_cast<uint8_t>(byte);
  }
}

// x[i] = 0 where bit i is 0.
inline void keep_bits(const uint8_t* bits, int64_t count, float* x) {
  int64_t i = 0;
#ifdef __AVX512F__
  for (; i + 16 <= count; i += 16) {
    uint16_t two;
    std::memcpy(&two, bits + i / 8, 2);
    _mm512_storeu_ps(x + i, _mm512_maskz_loadu_ps(two, x + i));
  }
#endif
  for (; i + 8 <= count; i += 8) {
    const int32_t byte = bits[i / 8];
    BITSTRATA_INDEPENDENT
    for (int b = 0; b < 8; ++b) x[i + b] = byte & (1 << b) ? x[i + b] : 0.0f;
  }
  for (; i < count; ++i) x[i] = bits[i / 8] >> (i % 8) & 1 ? x[i] : 0.0f;
}

template <bool kAdds>
void norm_to_f32_with(const int8_t* x, int64_t count, int64_t period, const AffineArgs& f, const float* add, float* out,
                      float* most) {
  each_stretch(0, count, period, [&](int64_t at, int64_t c, int64_t n) {
    const int8_t* from = x + at;
    const float* scale = f.scale + c;
    const float* offset = f.offset + c;
    const float* other = add + (kAdds ? at : 0);
    float* to = out + at;
    float* top = most + c;
    const float floor = f.floor;
    BITSTRATA_INDEPENDENT
    for (int64_t j = 0; j < n; ++j) {
      float y = static_cast<float>(from[j]) * scale[j] + offset[j];
      if (kAdds) y = y + other[j];
      y = greater(y, floor);
      to[j] = y;
      top[j] = greater(magnitude(y), top[j]);
    }
  });
}

inline void norm_to_f32(const int8_t* x, int64_t count, int64_t period, const AffineArgs& f, const float* add,
                        float* out, float* most, uint8_t* bits) {
  each_stage(count, period, [&](int64_t at, int64_t n) {
    if (add == nullptr)
      norm_to_f32_with<false>(x + at, n, period, f, add, out + at, most);
    else
      norm_to_f32_with<true>(x + at, n, period, f, add + at, out + at, most);
    if (bits != nullptr) positive_bits(out + at, n, bits + at / 8);
  });
}

template <bool kScaled, bool kAdds, typename In>
void join_with(const In* x, int64_t count, int64_t period, const float* scale, const float* add, float* out) {
  each_stretch(0, count, period, [&](int64_t at, int64_t c, int64_t n) {
    const In* from = x + at;
    const float* s = scale + (kScaled ? c : 0);
    const float* other = add + (kAdds ? at : 0);
    float* to = out + at;
    BITSTRATA_INDEPENDENT
    for (int64_t j = 0; j < n; ++j) {
      const float value = kScaled ? to_float(from[j]) * s[j] : to_float(from[j]);
      to[j] = kAdds ? value + other[j] : value;
    }
  });
}

template <typename In>
void join(const In* x, int64_t count, int64_t period, const float* scale, const float* add, const uint8_t* bits,
          float* out, float* most) {
  each_stage(count, period, [&](int64_t at, int64_t n) {
    if (scale != nullptr)
      add != nullptr ? join_with<true, true>(x + at, n, period, scale, add + at, out + at)
                     : join_with<true, false>(x + at, n, period, scale, add, out + at);
    else
      add != nullptr ? join_with<false, true>(x + at, n, period, scale, add + at, out + at)
                     : join_with<false, false>(x + at, n, period, scale, add, out + at);
    if (bits != nullptr) keep_bits(bits + at / 8, n, out + at);
    range(out + at, n, period, most);
  });
}

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

inline void gradient_sums(const int8_t* g, const int8_t* h, int64_t count, int64_t period, const GradientSums& sums) {
  each_stretch(0, count, period, [&](int64_t at, int64_t c, int64_t n) {
    const int8_t *v = g + at, *code = h + at;
    int8_t *low0 = sums.least[0] + c, *low1 = sums.least[1] + c, *low2 = sums.least[2] + c;
    int8_t *high0 = sums.most[0] + c, *high1 = sums.most[1] + c, *high2 = sums.most[2] + c;
    BITSTRATA_INDEPENDENT
    for (int64_t j = 0; j < n; ++j) {
      low0[j] = lesser8(code[j] < 0 ? v[j] : int8_t{127}, low0[j]);
      high0[j] = greater8(code[j] < 0 ? v[j] : int8_t{-128}, high0[j]);
      low1[j] = lesser8(code[j] == 0 ? v[j] : int8_t{127}, low1[j]);
      high1[j] = greater8(code[j] == 0 ? v[j] : int8_t{-128}, high1[j]);
      low2[j] = lesser8(code[j] > 0 ? v[j] : int8_t{127}, low2[j]);
      high2[j] = greater8(code[j] > 0 ? v[j] : int8_t{-128}, high2[j]);
    }
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

template <bool kNoisy>
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
      to[j] = static_cast<uint8_t>(code_of_u<kNoisy>(dx * factor[j], lo, hi, kNoisy ? bits[j] : 0) << shift[j]);
    }
  });
}

inline void l1_gradient_codes(const int8_t* g, const int8_t* h, int64_t count, int64_t period, const L1GradientArgs& l,
                              const CodeArgs& a, uint8_t* out) {
  a.noise == nullptr ? l1_gradient_codes_with<false>(g, h, count, period, l, a, out)
                     : l1_gradient_codes_with<true>(g, h, count, period, l, a, out);
}

constexpr Training kTraining = {
    range<float>,
    range<uint16_t>,
    codes<float>,
    codes<uint16_t>,
    pack,
    unpack,
    norm_codes<int32_t>,
    norm_codes<float>,
    norm_sides,
    norm_squares,
    norm_center,
    norm_to_codes,
    norm_to_f32,
    join<int32_t>,
    join<float>,
    gradient_range<int32_t>,
    gradient_range<float>,
    gradient_codes<int32_t>,
    gradient_codes<float>,
    l1_gradient,
    l2_gradient,
    l1_gradient_codes,
};

}  // namespace
}  // namespace bitstrata
