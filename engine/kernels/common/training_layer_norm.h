// The quantized layer normalization; see bitstrata/layer_kernels.h.
//
// Like everything in this folder this is compiled once for each instruction set, in an unnamed namespace.
#pragma once

#include "bitstrata/layer_kernels.h"
#include "training_loops.h"

namespace bitstrata {
namespace {

inline float layer_range(const float* x, int64_t count) {
  int32_t most = 0;  // as integers, magnitudes order NaN above infinity above all else
  for (int64_t j = 0; j < count; ++j) most = greater(magnitude_bits(x[j]), most);
  return from_bits(most);
}

template <bool kNoisy>
inline void layer_codes_with(const float* x, int64_t count, float inverse, float bound, const uint16_t* bits,
                             int8_t* out) {
  BITSTRATA_INDEPENDENT
  for (int64_t j = 0; j < count; ++j)
    out[j] = static_cast<int8_t>(code_of<kNoisy>(x[j] * inverse, -bound, bound, kNoisy ? bits[j] : 0));
}

inline void layer_codes(const float* x, int64_t count, float inverse, float bound, const Noise* noise, int8_t* out) {
  if (noise == nullptr) return layer_codes_with<false>(x, count, inverse, bound, nullptr, out);
  uint16_t buffer[kNoiseBuffer];
  for (int64_t at = 0; at < count; at += kNoiseChunk) {
    const int64_t n = least(kNoiseChunk, count - at);
    layer_codes_with<true>(x + at, n, inverse, bound, noise_bits(*noise, noise->start + at, n, buffer), out + at);
  }
}

// Sums of value(j) for j below count. |value| <= kLargest: int32 over pieces in which it cannot overflow.
template <int64_t kLargest, typename Value>
inline int64_t layer_total(int64_t count, const Value& value) {
  constexpr int64_t kPiece = 0x7FFFFFFF / kLargest;
  int64_t total = 0;
  for (int64_t at = 0; at < count; at += kPiece) {
    const int64_t end = least(count, at + kPiece);
    int32_t part = 0;
    for (int64_t j = at; j < end; ++j) part += value(j);
    total += part;
  }
  return total;
}

inline void layer_sums(const int8_t* x, int64_t rows, int64_t features, const LayerSums& to) {
  for (int64_t r = 0; r < rows; ++r, x += features) {
    int8_t low = 127, high = -128;
    for (int64_t j = 0; j < features; ++j) low = x[j] < low ? x[j] : low;
    for (int64_t j = 0; j < features; ++j) high = x[j] > high ? x[j] : high;
    to.least[r] = low;
    to.most[r] = high;
    to.sum[r] = layer_total<128>(features, [=](int64_t j) { return x[j]; });
    if (to.squares != nullptr)
      to.squares[r] = layer_total<128 * 128>(features, [=](int64_t j) { return static_cast<int16_t>(x[j] * x[j]); });
  }
}

inline void layer_sides(const int8_t* x, int64_t rows, int64_t features, const LayerSides& a, int64_t* below,
                        int64_t* above, int64_t* sum_above) {
  for (int64_t r = 0; r < rows; ++r, x += features) {
    const int8_t under = a.below[r], up_to = a.up_to[r];
    below[r] = layer_total<1>(features, [=](int64_t j) { return static_cast<int8_t>(x[j] <= under); });
    above[r] = layer_total<1>(features, [=](int64_t j) { return static_cast<int8_t>(x[j] > up_to); });
    sum_above[r] =
        layer_total<128>(features, [=](int64_t j) { return static_cast<int8_t>(x[j] > up_to ? x[j] : int8_t{0}); });
  }
}

inline void layer_result(int8_t* x, int64_t rows, int64_t features, const LayerResult& a, float* out) {
  const float *scale = a.scale, *offset = a.offset, step = a.step;
  for (int64_t r = 0; r < rows; ++r, x += features, out += features) {
    const float mean = a.mean[r], gain = a.gain[r];
    BITSTRATA_INDEPENDENT
    for (int64_t j = 0; j < features; ++j) {
      const float h = round_even((static_cast<float>(x[j]) * step - mean) * gain);
      x[j] = static_cast<int8_t>(static_cast<int32_t>(h));
      out[j] = h * scale[j] + offset[j];
    }
  }
}

// Adds the sums of g and of g * h of each feature over all rows. |g|, |h| <= 127.
inline void layer_feature_sums(const int8_t* g, const int8_t* h, int64_t rows, int64_t features, int64_t* sum_g,
                               int64_t* sum_gh) {
  constexpr int64_t kFeatures = 256, kRows = 256;
  int16_t part_g[kFeatures];
  int32_t part_gh[kFeatures];
  for (int64_t f = 0; f < features; f += kFeatures) {
    const int64_t n = least(kFeatures, features - f);
    for (int64_t first = 0; first < rows; first += kRows) {
      const int64_t last = least(rows, first + kRows);
      std::memset(part_g, 0, sizeof part_g);
      std::memset(part_gh, 0, sizeof part_gh);
      for (int64_t r = first; r < last; ++r) {
        const int8_t *from = g + r * features + f, *with = h + r * features + f;
        BITSTRATA_INDEPENDENT
        for (int64_t j = 0; j < n; ++j) part_g[j] = static_cast<int16_t>(part_g[j] + from[j]);
        BITSTRATA_INDEPENDENT
        for (int64_t j = 0; j < n; ++j) part_gh[j] += static_cast<int16_t>(from[j] * with[j]);
      }
      BITSTRATA_INDEPENDENT
      for (int64_t j = 0; j < n; ++j) sum_g[f + j] += part_g[j];
      BITSTRATA_INDEPENDENT
      for (int64_t j = 0; j < n; ++j) sum_gh[f + j] += part_gh[j];
    }
  }
}

inline void layer_gradient_sums(const int8_t* g, const int8_t* h, int64_t rows, int64_t features,
                                const LayerGradientSums& to) {
  const int8_t* weight = to.weight;
  for (int64_t r = 0; r < rows; ++r) {
    const int8_t *from = g + r * features, *with = h + r * features;
    to.p[r] = layer_total<127 * 127>(features, [=](int64_t j) { return static_cast<int16_t>(from[j] * weight[j]); });
    to.ph[r] = layer_total<127 * 127 * 127>(
        features, [=](int64_t j) { return static_cast<int16_t>(from[j] * weight[j]) * static_cast<int16_t>(with[j]); });
    to.h[r] = to.signs ? layer_total<1>(features,
                                        [=](int64_t j) { return static_cast<int8_t>((with[j] > 0) - (with[j] < 0)); })
                       : layer_total<128>(features, [=](int64_t j) { return with[j]; });
  }
  layer_feature_sums(g, h, rows, features, to.feature_g, to.feature_gh);
}

inline void layer_l1_gradient(const int8_t* g, const int8_t* h, int64_t rows, int64_t features, const LayerGradient& a,
                              float* out) {
  const float* weight = a.weight;
  for (int64_t r = 0; r < rows; ++r, g += features, h += features, out += features) {
    const float by = a.coefficient[r], negative = a.constant[0][r], zero = a.constant[1][r],
                positive = a.constant[2][r];
    BITSTRATA_INDEPENDENT
    for (int64_t j = 0; j < features; ++j) {
      const float side = static_cast<float>(h[j]);
      const float constant = side < 0 ? negative : side > 0 ? positive : zero;
      out[j] = by * (static_cast<float>(g[j]) * weight[j]) - constant;
    }
  }
}

inline void layer_l2_gradient(const int8_t* g, const int8_t* h, int64_t rows, int64_t features, const LayerGradient& a,
                              float* out) {
  const float* weight = a.weight;
  for (int64_t r = 0; r < rows; ++r, g += features, h += features, out += features) {
    const float by = a.coefficient[r], constant = a.constant[1][r], slope = a.slope[r];
    BITSTRATA_INDEPENDENT
    for (int64_t j = 0; j < features; ++j)
      out[j] = (by * (static_cast<float>(g[j]) * weight[j]) - constant) - static_cast<float>(h[j]) * slope;
  }
}

constexpr LayerKernels kLayerKernels = {
    layer_range,  layer_codes,         layer_sums,        layer_sides,
    layer_result, layer_gradient_sums, layer_l1_gradient, layer_l2_gradient,
};

}  // namespace
}  // namespace bitstrata
