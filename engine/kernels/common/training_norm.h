// The quantized normalization, forward; see bitstrata/training.h.
//
// Like everything in this folder this is compiled once for each instruction set, in an unnamed namespace.
#pragma once

#include "training_loops.h"

namespace bitstrata {
namespace {

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
    ask_for(from, kAhead, n);
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
#elif defined(__AVX2__)
  for (; i + 8 <= count; i += 8)
    bits[i / 8] = static_cast<uint8_t>(
        _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x + i), _mm256_setzero_ps(), _CMP_GT_OQ)));
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
#elif defined(__AVX2__)
  const __m256i places = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  for (; i + 8 <= count; i += 8) {
    const __m256i kept = _mm256_and_si256(_mm256_set1_epi32(bits[i / 8]), places);
    const __m256 mask = _mm256_castsi256_ps(_mm256_cmpeq_epi32(kept, places));
    _mm256_storeu_ps(x + i, _mm256_and_ps(_mm256_loadu_ps(x + i), mask));
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
      y = y < floor ? floor : y;  // NaN stays
      to[j] = y;
      top[j] = from_bits(greater(magnitude_bits(y), magnitude_bits(top[j])));  // as in `range`
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

}  // namespace
}  // namespace bitstrata
