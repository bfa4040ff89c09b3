// ShiftQuant of whole tensors, and the fully quantized L1 normalization: what src/bitstrata/integer/shiftquant.py and
// functional/l1norm.py define, operation for operation, in float32.
//
// Tensors are rows of `channels` neighbours. Functions that are given a tensor's rows in several places throw nothing;
// shapes are the caller's to check.
#pragma once

#include <cstdint>
#include <vector>

#include "bitstrata/kernels.h"
#include "bitstrata/training.h"

namespace bitstrata {

// Where work runs, and on how many rows of how many channels.
struct Rows {
  const Kernels& kernels;
  int threads;
  int64_t rows, channels;
  int64_t elements() const { return rows * channels; }
};

// A tensor of float32, bfloat16 or int32 with a scale for each channel; exactly one pointer is not null.
struct RealTensor {
  const float* f32 = nullptr;
  const uint16_t* bf16 = nullptr;
  const int32_t* i32 = nullptr;
  const float* scale = nullptr;  // (channels,), with i32; or null
};

struct ShiftFormat {
  int bits = 4, groups = 4;
  bool is_signed = true;
  bool absorb = false;  // codes are stored as code << (groups - 1 - exponent)
};

// scale is NaN if the tensor is not finite; then nothing was written.
struct ShiftGrid {
  float scale = 0;
  std::vector<uint8_t> exponents;  // (channels,)
};

ShiftGrid shift_grid(const std::vector<float>& ranges, const ShiftFormat&);
std::vector<float> channel_ranges(const Rows&, const RealTensor&);
ShiftGrid shift_codes(const Rows&, const RealTensor&, const ShiftFormat&, const Noise*, uint8_t* out);

// A weight, (out, in / groups, taps), as symmetric codes to nearest with a scale for each output channel, (out,), or, if
// not `by_output`, for each input channel, (in,). False if it is not finite; then the codes are not written.
struct WeightShape {
  int64_t out, in, taps, groups;  // in: of a group
  int64_t elements() const { return out * in * taps; }
};
bool weight_codes(const Kernels&, int threads, const float* weight, const WeightShape&, int bits, bool by_output,
                  int8_t* codes, float* scale);

// out = x * scale (+ add), 0 where bits are 0; the range of each channel. add, bits: null for none.
std::vector<float> join(const Rows&, const RealTensor&, const float* add, const uint8_t* bits, float* out);

struct NormOptions {
  int bits = 8;
  bool l2 = false;
  double eps = 1e-5;
  double factor = 1;  // of the mean absolute deviation
};

// One normalization of one batch. Codes of the input, once made, are the caller's to keep and to pass again.
class Norm {
 public:
  Norm(const Rows&, const NormOptions&, const float* weight, const float* bias);

  // Codes of x and the batch's statistics. least and most: of i32, for each channel, or null. False if x is not finite.
  bool forward(const RealTensor& x, const int32_t* least, const int32_t* most, int8_t* codes);
  // The result, rectified or not, as codes or as floats (+ add, null for none); see Training::norm_to_f32.
  ShiftGrid to_codes(const int8_t* codes, bool rectify, const ShiftFormat&, const Noise*, uint8_t* out) const;
  std::vector<float> to_f32(const int8_t* codes, bool rectify, const float* add, float* out, uint8_t* bits) const;

  // Codes of the gradient of the result, or, if `rectify`, of the rectified result. False if it is not finite.
  bool backward(const RealTensor& gradient, const int8_t* codes, bool rectify, const Noise*, int8_t* out);
  // Then the gradient of x.
  void gradient_f32(const int8_t* gradient, const int8_t* codes, float* out) const;
  ShiftGrid gradient_codes(const int8_t* gradient, const int8_t* codes, const ShiftFormat&, const Noise*,
                           uint8_t* out) const;

  const Rows& rows() const { return rows_; }
  const std::vector<float>& mean() const { return mean_; }            // of the batch, before it is quantized
  const std::vector<float>& deviation() const { return deviation_; }  // likewise, without eps
  const std::vector<float>& weight_gradient() const { return weight_gradient_; }
  const std::vector<float>& bias_gradient() const { return bias_gradient_; }

 private:
  void statistics(const int8_t* codes, const std::vector<int64_t>& sum, const std::vector<int32_t>& least,
                  const std::vector<int32_t>& most);
  float result(int64_t channel, int32_t code) const;
  AffineArgs affine(bool rectify) const;
  PassArgs passes(bool rectify) const;
  SideArgs sides() const { return {below_.data(), above_.data()}; }
  void gradient_constants(float step, const std::vector<int64_t>& sum_g, const std::vector<int64_t>& sum_gh);

  Rows rows_;
  NormOptions options_;
  int64_t period_;
  std::vector<float> weight_, bias_;  // (channels,), empty for none
  float step_ = 1, h_step_ = 1;
  std::vector<float> mean_, deviation_, weight_gradient_, bias_gradient_;
  std::vector<int32_t> least_, most_;  // codes of each channel
  // (period,):
  std::vector<float> center_, inverse_, gain_, scale_, offset_;
  std::vector<int32_t> below_, above_, first_, last_, all_first_, all_last_;
  std::vector<int64_t> sign_sum_, h_sum_;  // (channels,): of the signs; of h, with l2
  std::vector<float> coefficient_, at_below_, at_mean_, at_above_, slope_;
  std::vector<int32_t> extremes_[6];  // least and most gradient code below, at and above the mean, (channels,)
};

}  // namespace bitstrata
