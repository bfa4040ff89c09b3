// The fully quantized layer normalization: what src/bitstrata/functional/l1norm.py defines for statistics over the
// last dimension and a weight that differs over it; spec/training.md states the arithmetic.
#pragma once

#include <cstdint>
#include <vector>

#include "bitstrata/quantize.h"

namespace bitstrata {

// One normalization of a tensor (rows, channels), channels being what statistics are over. What backward needs, beside
// the codes, which are the caller's to keep and to pass again, is a number for each row.
class LayerNorm {
 public:
  // weight, bias: (channels,), null for none.
  LayerNorm(const Rows&, const NormOptions&, const float* weight, const float* bias);

  // The result and the normalized codes, both (rows, channels). False, with nothing written, if x, weight or bias are
  // not finite.
  bool forward(const float* x, int8_t* codes, float* out);
  // The gradient of x from that of the result. False, with nothing written, if it is not finite. noise: null to
  // nearest.
  bool backward(const float* gradient, const int8_t* codes, const Noise* noise, float* out);

  const Rows& rows() const { return rows_; }
  const std::vector<float>& weight_gradient() const { return weight_gradient_; }  // (channels,), of the last backward
  const std::vector<float>& bias_gradient() const { return bias_gradient_; }

 private:
  // A vector on a symmetric grid over all of it.
  struct Vector {
    std::vector<float> codes;
    float step = 1;
    bool finite = true;
  };
  // Of the input's codes, for each row.
  struct Sums {
    std::vector<int64_t> sum, squares;
    std::vector<int8_t> least, most;
  };
  float bound() const { return static_cast<float>((1 << (options_.bits - 1)) - 1); }
  Vector on_grid(const float* x, int64_t count) const;
  float range(const float* x) const;
  Sums input_codes(const float* x, int8_t* codes) const;
  std::vector<float> means(const Sums&) const;
  std::vector<float> l1_spreads(const int8_t* codes, const Sums&, const std::vector<float>& mean) const;
  std::vector<float> l2_spreads(const Sums&, const std::vector<float>& mean) const;
  void set_inverses(const std::vector<float>& spread);
  void set_range(const Sums&, const std::vector<float>& mean);
  void result(const std::vector<float>& mean, int8_t* codes, float* out) const;
  void gradient_rows(int64_t first, int64_t last, const float* gradient, const int8_t* codes, const Noise* noise,
                     float step, float* out, int64_t* feature_sums) const;

  Rows rows_;
  NormOptions options_;
  Vector weight_, bias_;
  std::vector<int8_t> weight_codes_;  // 1 without a weight
  float step_ = 1, h_step_ = 1;       // of the input's and of the normalized input's codes
  std::vector<float> inverse_;        // of the quantized spread, (rows,)
  std::vector<float> weight_gradient_, bias_gradient_;
};

}  // namespace bitstrata
