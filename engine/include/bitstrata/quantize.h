// ShiftQuant of whole tensors, and the fully quantized L1 normalization: what src/bitstrata/integer/shiftquant.py and
// functional/l1norm.py define, operation for operation, in float32.
//
// Tensors are rows of `channels` neighbours. Functions that are given a tensor's rows in several places throw nothing;
// shapes are the caller's to check.
#pragma once

#include <cstddef>
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
  float clip = 1;       // ranges are multiplied by it: what lies beyond gets the outermost code
  bool absorb = false;  // codes are stored as code << (groups - 1 - exponent)
  bool powers = false;  // signed codes of up to 4 bits, in one group, are 0 and +-2^k, k < 2^(bits - 1) - 1
  int32_t largest() const { return powers ? 1 << ((1 << (bits - 1)) - 2) : (1 << (bits - (is_signed ? 1 : 0))) - 1; }
};

// scale is NaN if the tensor is not finite; then nothing was written.
struct ShiftGrid {
  float scale = 0;
  std::vector<uint8_t> exponents;  // (channels,)
};

ShiftGrid shift_grid(const std::vector<float>& ranges, const ShiftFormat&);
std::vector<float> channel_ranges(const Rows&, const RealTensor&);
// ranges: what channel_ranges returns, if it is known, or null.
ShiftGrid shift_codes(const Rows&, const RealTensor&, const ShiftFormat&, const Noise*, uint8_t* out,
                      const float* ranges = nullptr);

// Each channel's sum of int8 codes.
std::vector<int64_t> code_sums(const Rows&, const int8_t* codes);

void max_pool_gradient(const Kernels&, int threads, int64_t images, const PoolMap&, const float* gradient,
                       const uint8_t* places, float* out);
// What the backward pass of an L1 normalization needs of codes that a maximum pooling alone reads, and codes that have
// this in common with them; see Training::keep_maxima.
void keep_maxima(const Kernels&, int threads, int64_t images, const PoolMap&, const int8_t* codes,
                 const uint8_t* places, int8_t* maxima, uint8_t* signs);
void put_maxima(const Kernels&, int threads, int64_t images, const PoolMap&, const int8_t* maxima, const uint8_t* signs,
                const uint8_t* places, int8_t* codes);

// Codes as one stream of bits and back; see Training::pack.
void pack_codes(const Kernels&, int threads, const uint8_t* codes, int64_t count, int width, uint8_t* out);
void unpack_codes(const Kernels&, int threads, const uint8_t* packed, int64_t count, int width, bool is_signed,
                  uint8_t* out);
// Codes of a grid at rest: `bits` each, without shifts that they have absorbed.
void pack_codes(const Rows&, const uint8_t* codes, const ShiftGrid&, const ShiftFormat&, uint8_t* out);

// A weight, (out, in / groups, taps), as symmetric codes to nearest with a scale for each output channel, (out,), or,
// if not `by_output`, for each input channel, (in,); all scales are the same if there is one for the tensor. False if
// it is not finite; then codes and scales are of no use.
enum class WeightScales { kChannel, kTensor };
struct WeightShape {
  int64_t out, in, taps, groups;  // in: of a group
  int64_t elements() const { return out * in * taps; }
};
bool weight_codes(const Kernels&, int threads, const float* weight, const WeightShape&, int bits, bool by_output,
                  WeightScales, int8_t* codes, float* scale);

// out = x * scale (+ add), 0 where bits are 0; its largest magnitude. add, bits: null for none.
float join(const Rows&, const RealTensor&, const float* add, const uint8_t* bits, float* out);

// What every stride-th pixel of a map has, from the first on; the others have 0. rows: (images * out_h() * out_w(),
// channels), int32 with scales.
struct StridedTensor {
  RealTensor rows;
  int64_t in_h, in_w, stride_h, stride_w;  // of the map
  int64_t out_h() const { return (in_h - 1) / stride_h + 1; }
  int64_t out_w() const { return (in_w - 1) / stride_w + 1; }
};
// As `join`, of a map of whole images.
float join(const Rows&, const RealTensor&, const StridedTensor& add, const uint8_t* bits, float* out);

struct NormOptions {
  int bits = 8;
  bool l2 = false;
  double eps = 1e-5;
  double factor = 1;  // of the mean absolute deviation
};

// Where maxima were: with their gradient, all that is needed of a maximum pooling's gradient. Stretches of the
// pooling's input are made of it where they are read, so that it is never in memory as a whole.
struct PooledGradient {
  PoolMap map;            // whose kernel_h * kernel_w is at most 256
  const uint8_t* places;  // (images, out_h, out_w, channels)
};

// One normalization of one batch. The normalized input's codes, once made, are the caller's to keep and to pass again.
class Norm {
 public:
  Norm(const Rows&, const NormOptions&, const float* weight, const float* bias);

  // The normalized codes of x and the batch's statistics. least and most: of i32, for each channel, or null. False if x
  // is not finite.
  bool forward(const RealTensor& x, const int32_t* least, const int32_t* most, int8_t* codes);
  // The result, rectified or not, as codes or as floats (+ add, null for none); see Training::norm_to_f32.
  ShiftGrid to_codes(const int8_t* codes, bool rectify, const ShiftFormat&, const Noise*, uint8_t* out) const;
  std::vector<float> to_f32(const int8_t* codes, bool rectify, const float* add, float* out, uint8_t* bits) const;
  // Its maximum pooling, image by image; see Training::max_pool. Each channel's largest magnitude.
  std::vector<float> max_pool(const int8_t* codes, bool rectify, const PoolMap&, float* out, uint8_t* places) const;

  // Moves running statistics towards the batch's: running * (1 - share) + batch * share, each operation rounded.
  void track(float* mean, float* deviation, double share) const;

  // Codes of the gradient of the result, or, if `rectify`, of the rectified result. pooled: the gradient is that of the
  // maximum pooling of it, in float32; else null. range: its largest magnitude where it passes, if that is known, else
  // null. False if it is not finite.
  bool backward(const RealTensor& gradient, const PooledGradient* pooled, const float* range, const int8_t* codes,
                bool rectify, const Noise*, int8_t* out);
  // Then the gradient of x; the codes may take the place of the gradient's.
  void gradient_f32(const int8_t* gradient, const int8_t* codes, float* out) const;
  ShiftGrid gradient_codes(const int8_t* gradient, const int8_t* codes, const ShiftFormat&, const Noise*,
                           uint8_t* out) const;

  // Which normalized codes the gradient passes, `period` of them: whole pixels, whose channels are repeated.
  PassArgs passes(bool rectify) const {
    const auto& by = rectify ? pass_ : whole_;
    return {by[0].data(), by[1].data()};
  }
  int64_t period() const { return period_; }

  const Rows& rows() const { return rows_; }
  const std::vector<float>& mean() const { return mean_; }            // of the batch, before it is quantized
  const std::vector<float>& deviation() const { return deviation_; }  // likewise, without eps
  const std::vector<float>& weight_gradient() const { return weight_gradient_; }
  const std::vector<float>& bias_gradient() const { return bias_gradient_; }

 private:
  float bound() const { return static_cast<float>((1 << (options_.bits - 1)) - 1); }
  std::vector<float> spread(const int8_t* codes, const std::vector<int64_t>& sum, const std::vector<float>& center);
  void normalize(const std::vector<float>& center, const std::vector<float>& spread, const std::vector<int32_t>& least,
                 const std::vector<int32_t>& most, int8_t* codes);
  float result(std::size_t channel, int32_t h) const;
  AffineArgs affine(bool rectify) const;
  // Calls body(stretch of the gradient, its first element, number of elements) for all of it, by several threads.
  template <typename Body>
  void each_gradient(const RealTensor&, const PooledGradient*, const Body&) const;
  float gradient_range(const RealTensor&, const PooledGradient*, const float* scale, const int8_t* codes,
                       bool rectify) const;
  void gradient_constants(float step, const std::vector<int64_t>& sum_g, const std::vector<int64_t>& sum_gh);

  Rows rows_;
  NormOptions options_;
  int64_t period_;
  std::vector<float> weight_, bias_;  // (channels,), empty for none
  float step_ = 1, h_step_ = 1;       // of the input's and of the normalized input's codes
  std::vector<float> mean_, deviation_, weight_gradient_, bias_gradient_, inverse_;  // (channels,)
  std::vector<int32_t> least_, most_;                                                // h of each channel
  std::vector<int64_t> h_sum_;              // of h, or, without l2, of its signs, (channels,)
  std::vector<float> scale_, offset_;       // (period,)
  std::vector<int8_t> pass_[2], whole_[2];  // first and last code that a rectifier lets pass; all codes; (period,)
  std::vector<float> coefficient_, slope_, constant_[3];  // of the gradient, (period,)
  std::vector<int8_t> least_g_[3], most_g_[3];            // by the sign of h, (channels,)
};

}  // namespace bitstrata
