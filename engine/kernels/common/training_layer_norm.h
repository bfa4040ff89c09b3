// The quantized layer normalization; see bitstrata/layer_kernels.h.
//
// Like everything in this folder this is compiled once for each instruction set, in an unnamed namespace.
#pragma once

#include "bitstrata/layer_kernels.h"
#include "layer_rows_bytes.h"
#include "training_loops.h"

namespace bitstrata {
namespace {

inline float layer_range(const float* x, int64_t count) {
  int32_t most = 0;  // as integers, magnitudes order NaN above infinity above all else
  for (int64_t j = 0; j < count; ++j) most = greater(magnitude_bits(x[j]), most);
  return from_bits(most);
}

// x + 1.5 * 2^23: round(x) is this less 1.5 * 2^23, and, in two's complement, its low byte where |x| < 127.5, which all
// that is divided by its own step is.
constexpr float kRounder = 12582912.0f;
inline int8_t low_byte(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<int8_t>(bits);
}

inline void layer_codes_nearest(const float* x, int64_t count, float inverse, int8_t* out) {
  BITSTRATA_INDEPENDENT
  for (int64_t j = 0; j < count; ++j) out[j] = low_byte(x[j] * inverse + kRounder);
}

inline void layer_codes_noisy(const float* x, int64_t count, float inverse, float bound, const uint16_t* bits,
                              int8_t* out) {
  const int16_t lo = static_cast<int16_t>(128 - bound), hi = static_cast<int16_t>(128 + bound);
  BITSTRATA_INDEPENDENT
  for (int64_t j = 0; j < count; ++j) {
    const int32_t fixed = static_cast<int32_t>((x[j] * inverse + 128.0f) * 65536.0f) + bits[j];
    const int16_t whole = static_cast<int16_t>(fixed >> 16);  // short, so that a vector holds more of them
    const int16_t from = whole > lo ? whole : lo, code = from < hi ? from : hi;
    out[j] = static_cast<int8_t>(code - 128);
  }
}

inline void layer_codes(const float* x, int64_t count, float inverse, float bound, const Noise* noise, int8_t* out) {
  if (noise == nullptr) return layer_codes_nearest(x, count, inverse, out);
  constexpr int64_t kPart = 8 * kNoiseBlock;  // little: x comes from memory while bits are computed
  uint16_t buffer[kPart];
  for (int64_t at = 0, n; at < count; at += n) {
    const int64_t element = noise->start + at, inside = element % kNoiseBlock;
    n = least(kPart - inside, count - at);
    const uint16_t* bits = noise_bits(*noise, element, n, buffer);
    layer_codes_noisy(x + at, n, inverse, bound, bits, out + at);
  }
}

inline void layer_sums(const int8_t* x, int64_t rows, int64_t features, const LayerSums& to) {
  for (int64_t r = 0; r < rows; ++r, x += features) {
    const RowBounds bounds = row_bounds(x, features);
    to.sum[r] = bounds.sum;
    to.least[r] = bounds.least;
    to.most[r] = bounds.most;
    if (to.squares != nullptr)
      to.squares[r] = layer_total<128 * 128>(features, [=](int64_t j) { return static_cast<int16_t>(x[j] * x[j]); });
  }
}

inline void layer_sides(const int8_t* x, int64_t rows, int64_t features, const LayerSides& a, int64_t* below,
                        int64_t* above, int64_t* sum_above) {
  for (int64_t r = 0; r < rows; ++r, x += features) {
    const RowSides sides = row_sides(x, features, a.below[r], a.up_to[r]);
    below[r] = sides.below;
    above[r] = sides.above;
    sum_above[r] = sides.sum_above;
  }
}

inline void layer_result(int8_t* x, int64_t rows, int64_t features, const LayerResult& a, float* out) {
  const float *scale = a.scale, *offset = a.offset, step = a.step;
  for (int64_t r = 0; r < rows; ++r, x += features, out += features) {
    const float mean = a.mean[r], gain = a.gain[r];
    BITSTRATA_INDEPENDENT
    for (int64_t j = 0; j < features; ++j) {
      const float shifted = (static_cast<float>(x[j]) * step - mean) * gain + kRounder;
      x[j] = low_byte(shifted);
      out[j] = (shifted - kRounder) * scale[j] + offset[j];
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
  for (int64_t r = 0; r < rows; ++r) {
    const int8_t* with = h + r * features;
    const RowProducts sums = row_products(g + r * features, with, to.weight, features);
    to.p[r] = sums.p;
    to.ph[r] = sums.ph;
    to.h[r] = to.signs ? row_signs(with, features) : layer_total<128>(features, [=](int64_t j) { return with[j]; });
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
      const int32_t side = h[j];
      const float unless_over = side < 0 ? negative : zero;  // two choices in a row become two selections
      const float constant = side > 0 ? positive : unless_over;
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
