#include <cmath>
#include <limits>
#include <mutex>

#include "bitstrata/quantize.h"
#include "norm_parts.h"

namespace bitstrata {

Norm::Norm(const Rows& rows, const NormOptions& options, const float* weight, const float* bias)
    : rows_(rows),
      options_(options),
      period_(period_of(rows.channels, rows.kernels.training->norm_period)),
      weight_(copied(weight, rows.channels)),
      bias_(copied(bias, rows.channels)) {}

bool Norm::forward(const RealTensor& x, const int32_t* least, const int32_t* most, int8_t* codes) {
  const Training& k = *rows_.kernels.training;
  const int64_t c = rows_.channels;
  float top = 0;
  if (x.i32 != nullptr) {
    for (int64_t i = 0; i < c; ++i)
      top = larger(top, larger(std::fabs(static_cast<float>(least[i]) * x.scale[i]),
                               std::fabs(static_cast<float>(most[i]) * x.scale[i])));
  } else {
    for (float r : channel_ranges(rows_, x)) top = larger(top, r);
  }
  if (!std::isfinite(top)) return false;
  step_ = Symmetric::step_of(top, bound());
  const float inverse = 1.0f / step_;
  std::vector<float> scale;
  if (x.scale != nullptr) scale = repeated(std::vector<float>(x.scale, x.scale + c), period_);
  const float* by = scale.empty() ? nullptr : scale.data();
  const size_t wide = static_cast<size_t>(period_);
  std::vector<int64_t> sum(wide, 0);
  std::vector<int32_t> low(wide, INT32_MAX), high(wide, INT32_MIN);
  std::mutex mutex;
  for_blocks(rows_, [&](int64_t at, int64_t count) {
    std::vector<int64_t> part(wide, 0);
    std::vector<int32_t> part_low(wide, INT32_MAX), part_high(wide, INT32_MIN);
    if (x.i32 != nullptr)
      k.norm_codes_i32(x.i32 + at, count, period_, by, inverse, bound(), codes + at, part.data(), part_low.data(),
                       part_high.data());
    else
      k.norm_codes_f32(x.f32 + at, count, period_, by, inverse, bound(), codes + at, part.data(), part_low.data(),
                       part_high.data());
    std::lock_guard<std::mutex> lock(mutex);
    add_to(sum, part);
    least_of(low, part_low);
    most_of(high, part_high);
  });
  sum = folded_sum(sum, c);
  mean_.resize(sum.size());
  const float n = static_cast<float>(rows_.rows);
  for (size_t i = 0; i < sum.size(); ++i) mean_[i] = static_cast<float>(sum[i]) / n * step_;
  const Symmetric grid(mean_, bound());
  std::vector<float> center(sum.size());
  for (size_t i = 0; i < sum.size(); ++i) center[i] = grid.value(i);
  normalize(center, spread(codes, sum, center), folded_least(low, c), folded_most(high, c), codes);
  return true;
}

// What to divide by, before it is quantized; sets the deviation.
std::vector<float> Norm::spread(const int8_t* codes, const std::vector<int64_t>& sum,
                                const std::vector<float>& center) {
  const Training& k = *rows_.kernels.training;
  const size_t c = static_cast<size_t>(rows_.channels), wide = static_cast<size_t>(period_);
  const int32_t largest = static_cast<int32_t>(bound());
  std::vector<int8_t> below(c), up_to(c);  // codes under the mean, and not over it
  for (size_t i = 0; i < c; ++i) {
    const auto value = [&](int32_t code) { return static_cast<float>(code) * step_; };
    const float near = center[i] / step_;
    below[i] = static_cast<int8_t>(first_code(largest, near, [&](int32_t v) { return value(v) >= center[i]; }) - 1);
    up_to[i] = static_cast<int8_t>(first_code(largest, near, [&](int32_t v) { return value(v) > center[i]; }) - 1);
  }
  const std::vector<int8_t> all_below = repeated(below, period_), all_up_to = repeated(up_to, period_);
  std::vector<int64_t> sums[3];  // numbers below and above the mean, sum above; or, with l2, the sum of squares
  for (auto& s : sums) s.assign(wide, 0);
  std::mutex mutex;
  for_blocks(rows_, [&](int64_t at, int64_t count) {
    std::vector<int64_t> part[3];
    for (auto& s : part) s.assign(wide, 0);
    if (options_.l2)
      k.norm_squares(codes + at, count, period_, part[0].data());
    else
      k.norm_sides(codes + at, count, period_, {all_below.data(), all_up_to.data()}, part[0].data(), part[1].data(),
                   part[2].data());
    std::lock_guard<std::mutex> lock(mutex);
    for (int s = 0; s < 3; ++s) add_to(sums[s], part[s]);
  });
  for (auto& s : sums) s = folded_sum(s, rows_.channels);
  const double step = step_, n = static_cast<double>(rows_.rows);
  deviation_.resize(c);
  std::vector<float> out(c);
  for (size_t i = 0; i < c; ++i) {
    const double mu = center[i];
    if (options_.l2) {
      const double square =
          step * step * static_cast<double>(sums[0][i]) - 2.0 * mu * step * static_cast<double>(sum[i]) + n * mu * mu;
      deviation_[i] = static_cast<float>(std::sqrt(std::max(square / n, 0.0)));
      const double wide_deviation = deviation_[i];
      out[i] = static_cast<float>(std::sqrt(wide_deviation * wide_deviation + options_.eps));
    } else {
      const int64_t at_mean = rows_.rows - sums[0][i] - sums[1][i];  // all of one code, if any
      const int64_t sum_below = sum[i] - sums[2][i] - at_mean * up_to[i];
      const int64_t signs = sums[1][i] - sums[0][i];
      deviation_[i] = static_cast<float>(
          (step * static_cast<double>(sums[2][i] - sum_below) - mu * static_cast<double>(signs)) / n * options_.factor);
      out[i] = deviation_[i] + static_cast<float>(options_.eps);
    }
  }
  return out;
}

// The input's codes, within least and most of each channel, become the normalized ones.
void Norm::normalize(const std::vector<float>& center, const std::vector<float>& spread,
                     const std::vector<int32_t>& least, const std::vector<int32_t>& most, int8_t* codes) {
  const Training& k = *rows_.kernels.training;
  const size_t c = static_cast<size_t>(rows_.channels), wide = static_cast<size_t>(period_);
  const Symmetric grid(spread, bound());
  inverse_.resize(c);
  float top = 0;
  for (size_t i = 0; i < c; ++i) {
    inverse_[i] = 1.0f / (std::max(grid.codes[i], 1.0f) * grid.step);
    for (int32_t code : {least[i], most[i]})
      top = larger(top, std::fabs((static_cast<float>(code) * step_ - center[i]) * inverse_[i]));
  }
  h_step_ = Symmetric::step_of(top, bound());
  const float inverse_h = 1.0f / h_step_;
  const Symmetric weight(weight_, bound()), bias(bias_, bound());
  std::vector<float> gain(c), scale(c), offset(c);
  least_.resize(c);
  most_.resize(c);
  for (size_t i = 0; i < c; ++i) {
    gain[i] = inverse_[i] * inverse_h;
    scale[i] = weight_.empty() ? h_step_ : h_step_ * weight.value(i);
    offset[i] = bias_.empty() ? 0.0f : bias.value(i);
    const auto h = [&](int32_t code) {
      return static_cast<int32_t>(std::nearbyintf((static_cast<float>(code) * step_ - center[i]) * gain[i]));
    };
    least_[i] = h(least[i]);
    most_[i] = h(most[i]);
  }
  scale_ = repeated(scale, period_);
  offset_ = repeated(offset, period_);
  const std::vector<float> all_center = repeated(center, period_), all_gain = repeated(gain, period_);
  h_sum_.assign(wide, 0);
  std::mutex mutex;
  for_blocks(rows_, [&](int64_t at, int64_t count) {
    std::vector<int64_t> part(wide, 0);
    k.norm_center(codes + at, count, period_, {step_, all_center.data(), all_gain.data()}, !options_.l2, part.data());
    std::lock_guard<std::mutex> lock(mutex);
    add_to(h_sum_, part);
  });
  h_sum_ = folded_sum(h_sum_, rows_.channels);

  // Results are monotone in h, so those above 0 are of neighbouring codes.
  const int32_t largest = static_cast<int32_t>(bound());
  std::vector<int8_t> first(c), last(c);
  for (size_t i = 0; i < c; ++i) {
    const bool rising = scale[i] >= 0;
    const float zero = -offset[i] / scale[i];
    const int32_t turn = first_code(largest, zero, [&](int32_t h) { return (result(i, h) > 0) == rising; });
    first[i] = static_cast<int8_t>(rising ? std::min(turn, largest) : -largest);
    last[i] = static_cast<int8_t>(rising ? (turn > largest ? largest - 1 : largest) : turn - 1);
  }
  pass_[0] = repeated(first, period_);
  pass_[1] = repeated(last, period_);
  whole_[0].assign(wide, static_cast<int8_t>(-largest));
  whole_[1].assign(wide, static_cast<int8_t>(largest));
}

float Norm::result(size_t channel, int32_t h) const {
  return static_cast<float>(h) * scale_[channel] + offset_[channel];
}

void Norm::track(float* mean, float* deviation, double share) const {
  const float keep = static_cast<float>(1 - share), add = static_cast<float>(share);
  const auto move = [&](float* running, const std::vector<float>& batch) {
    for (size_t i = 0; i < batch.size(); ++i) running[i] = running[i] * keep + batch[i] * add;
  };
  move(mean, mean_);
  move(deviation, deviation_);
}

AffineArgs Norm::affine(bool rectify) const {
  return {scale_.data(), offset_.data(), rectify ? 0.0f : -std::numeric_limits<float>::infinity()};
}

ShiftGrid Norm::to_codes(const int8_t* codes, bool rectify, const ShiftFormat& f, const Noise* noise,
                         uint8_t* out) const {
  const Training& k = *rows_.kernels.training;
  std::vector<float> ranges(static_cast<size_t>(rows_.channels), 0.0f);
  for (size_t i = 0; i < ranges.size(); ++i)
    for (int32_t h : {least_[i], most_[i]}) {
      const float y = result(i, h);
      ranges[i] = larger(ranges[i], rectify ? std::max(y, 0.0f) : std::fabs(y));
    }
  const ShiftGrid grid = shift_grid(ranges, f);
  const CodeTables tables(grid, f, period_);
  for_blocks(rows_, [&](int64_t at, int64_t count) {
    const Noise from = moved(noise, at);
    k.norm_to_codes(codes + at, count, period_, affine(rectify), tables.args(noise ? &from : nullptr), out + at);
  });
  return grid;
}

std::vector<float> Norm::to_f32(const int8_t* codes, bool rectify, const float* add, float* out, uint8_t* bits) const {
  const Training& k = *rows_.kernels.training;
  const size_t wide = static_cast<size_t>(period_);
  std::vector<float> most(wide, 0.0f);
  std::mutex mutex;
  for_blocks(rows_, [&](int64_t at, int64_t count) {
    std::vector<float> part(wide, 0.0f);
    k.norm_to_f32(codes + at, count, period_, affine(rectify), add ? add + at : nullptr, out + at, part.data(),
                  bits ? bits + at / 8 : nullptr);
    std::lock_guard<std::mutex> lock(mutex);
    for (size_t i = 0; i < wide; ++i) most[i] = larger(part[i], most[i]);
  });
  return folded_range(most, rows_.channels);
}

}  // namespace bitstrata
