// Rows of a layer normalization in pieces, and the numbers that belong to each row.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include "bitstrata/layer_kernels.h"
#include "bitstrata/quantize.h"
#include "parallel.h"

namespace bitstrata {

// Calls body(first row, last row) for pieces shared by threads.
inline void for_row_blocks(const Rows& r, const std::function<void(int64_t, int64_t)>& body) {
  constexpr int64_t kElements = 1 << 16;
  parallel_for(r.threads, r.rows, std::max<int64_t>(kElements / r.channels / 8, 1) * 8, body);
}

// So many rows, eight or a multiple unless they are long, stay in the cache from one kernel to the next. Eight rows of
// a multiple of sixteen features begin where a block of random bits does.
inline int64_t cached_rows(int64_t features) {
  constexpr int64_t kElements = 1 << 13;
  const int64_t rows = kElements / features;
  return rows >= 8 ? rows / 8 * 8 : std::max<int64_t>(rows, 1);
}

// Calls body(first, number of rows) for such pieces of [first, last), backwards: what the pass before read last is
// still in the cache.
template <typename Body>
void for_cached_rows(int64_t first, int64_t last, int64_t features, const Body& body) {
  const int64_t most = cached_rows(features);
  for (int64_t piece = (last - first - 1) / most; piece >= 0; --piece) {
    const int64_t r = first + piece * most;
    body(r, std::min(most, last - r));
  }
}

// The largest code that stands for less than the mean, and the largest that stands for no more.
struct CodesBeside {
  CodesBeside(float mean, float step, int32_t largest) {
    // Begins near: the loops then find the first code at the mean or over it, whatever the quotient was rounded to.
    int32_t code = static_cast<int32_t>(std::min(std::max(mean / step, -128.0f), 128.0f));
    code = std::min(std::max(code, -largest), largest + 1);
    while (code > -largest && static_cast<float>(code - 1) * step >= mean) --code;
    while (code <= largest && static_cast<float>(code) * step < mean) ++code;
    below = static_cast<int8_t>(code - 1);
    while (code <= largest && static_cast<float>(code) * step <= mean) ++code;
    up_to = static_cast<int8_t>(code - 1);
  }
  int8_t below, up_to;
};

// What the gradient of some rows is made with.
class GradientRows {
 public:
  struct Factors {
    float step, weight_step, h_step;  // of the codes of gradient, weight and normalized input
    bool l2;
    double factor;  // of the mean absolute deviation
  };

  explicit GradientRows(int64_t rows) {
    for (auto& s : sums_) s.resize(static_cast<std::size_t>(rows));
    for (auto* v : {&coefficient_, &slope_, &constant_[0], &constant_[1], &constant_[2]})
      v->resize(static_cast<std::size_t>(rows));
  }

  LayerGradientSums sums(const int8_t* weight, bool signs, int64_t* feature_g, int64_t* feature_gh) {
    return {weight, signs, sums_[0].data(), sums_[1].data(), sums_[2].data(), feature_g, feature_gh};
  }

  // From the sums; inverse: of the spread of each row.
  void set(int64_t rows, int64_t features, const float* inverse, const Factors& f) {
    const double n = static_cast<double>(features), h_step = f.h_step;
    for (std::size_t r = 0; r < static_cast<std::size_t>(rows); ++r) {
      coefficient_[r] = f.step * inverse[r] * f.weight_step;
      const double a = coefficient_[r], p = static_cast<double>(sums_[0][r]), ph = static_cast<double>(sums_[1][r]);
      const double mean = a * p / n;                // of the gradient of the normalized input, over its spread
      const double together = a * ph / n * h_step;  // of its product with the normalized input
      const double of_h = static_cast<double>(sums_[2][r]) / n;
      if (f.l2) {
        constant_[1][r] = static_cast<float>(mean - of_h * h_step * together);
        slope_[r] = static_cast<float>(h_step * together);
        continue;
      }
      for (int s = 0; s < 3; ++s) constant_[s][r] = static_cast<float>(mean + (s - 1.0 - of_h) * f.factor * together);
    }
  }

  LayerGradient args(const float* weight) const {
    return {
        weight, coefficient_.data(), {constant_[0].data(), constant_[1].data(), constant_[2].data()}, slope_.data()};
  }

 private:
  std::vector<int64_t> sums_[3];
  std::vector<float> coefficient_, slope_, constant_[3];
};

}  // namespace bitstrata
