#include "bitstrata/quantize.h"

#include <atomic>
#include <cmath>
#include <limits>
#include <mutex>

#include "quantize_rows.h"

namespace bitstrata {
namespace {

constexpr float kSmallestScale = 0x1p-118f;  // so that 2^7 / scale is finite

Noise moved(const Noise* noise, int64_t start) { return noise ? Noise{noise->seed, noise->stream, start} : Noise{}; }

}  // namespace

ShiftGrid shift_grid(const std::vector<float>& ranges, const ShiftFormat& f) {
  const float largest = static_cast<float>(f.is_signed ? (1 << (f.bits - 1)) - 1 : (1 << f.bits) - 1);
  float top = 0;
  for (float r : ranges) top = larger(top, r);
  ShiftGrid grid;
  grid.exponents.assign(ranges.size(), 0);
  if (!std::isfinite(top)) {
    grid.scale = std::numeric_limits<float>::quiet_NaN();
    return grid;
  }
  grid.scale = top / largest;
  if (grid.scale < kSmallestScale) grid.scale = 0;
  for (size_t c = 0; c < ranges.size(); ++c)
    while (grid.exponents[c] < f.groups - 1 && ranges[c] <= std::ldexp(top, -(grid.exponents[c] + 1)))
      ++grid.exponents[c];
  return grid;
}

std::vector<float> channel_ranges(const Rows& r, const RealTensor& x) {
  const Training& k = *r.kernels.training;
  const int64_t period = period_of(r.channels);
  std::vector<float> wide(static_cast<size_t>(period), 0.0f);
  std::mutex mutex;
  for_blocks(r, [&](int64_t at, int64_t count) {
    std::vector<float> part(static_cast<size_t>(period), 0.0f);
    if (x.bf16 != nullptr)
      k.range_bf16(x.bf16 + at, count, period, part.data());
    else
      k.range_f32(x.f32 + at, count, period, part.data());
    std::lock_guard<std::mutex> lock(mutex);
    for (size_t i = 0; i < wide.size(); ++i) wide[i] = larger(part[i], wide[i]);
  });
  return folded_range(wide, r.channels);
}

// What codes of a grid are made with.
struct CodeTables {
  CodeTables(const ShiftGrid& grid, const ShiftFormat& f, int64_t period) {
    const int32_t largest = f.is_signed ? (1 << (f.bits - 1)) - 1 : (1 << f.bits) - 1;
    const float inverse = grid.scale > 0 ? 1.0f / grid.scale : 0.0f;
    std::vector<float> factors;
    std::vector<int32_t> shifts;
    for (uint8_t e : grid.exponents) {
      factors.push_back(std::ldexp(inverse, e));
      shifts.push_back(f.absorb ? f.groups - 1 - e : 0);
    }
    factor = repeated(factors, period);
    shift = repeated(shifts, period);
    lo = f.is_signed ? static_cast<float>(-largest) : 0.0f;
    hi = static_cast<float>(largest);
  }
  CodeArgs args(const Noise* noise) const { return {factor.data(), shift.data(), lo, hi, noise}; }

  std::vector<float> factor;
  std::vector<int32_t> shift;
  float lo, hi;
};

ShiftGrid shift_codes(const Rows& r, const RealTensor& x, const ShiftFormat& f, const Noise* noise, uint8_t* out) {
  const Training& k = *r.kernels.training;
  const ShiftGrid grid = shift_grid(channel_ranges(r, x), f);
  if (std::isnan(grid.scale)) return grid;
  const int64_t period = period_of(r.channels);
  const CodeTables tables(grid, f, period);
  for_blocks(r, [&](int64_t at, int64_t count) {
    const Noise from = moved(noise, at);
    const CodeArgs args = tables.args(noise ? &from : nullptr);
    if (x.bf16 != nullptr)
      k.codes_bf16(x.bf16 + at, count, period, args, out + at);
    else
      k.codes_f32(x.f32 + at, count, period, args, out + at);
  });
  return grid;
}

namespace {

float scale_of(float range, float largest) {
  const float scale = range / largest;
  return scale < kSmallestScale ? 0.0f : scale;
}

float inverse_of(float scale) { return scale > 0 ? 1.0f / scale : 0.0f; }

// One output channel of `inner` weights with a scale of its own.
bool row_codes(const Training& k, const float* weight, int64_t inner, float largest, uint8_t* codes, float* scale) {
  constexpr int64_t kPeriod = 64;
  float ranges[kPeriod] = {}, factor[kPeriod];
  const int32_t shift[kPeriod] = {};
  k.range_f32(weight, inner, kPeriod, ranges);
  float top = 0;
  for (float r : ranges) top = larger(top, r);
  if (!std::isfinite(top)) return false;
  *scale = scale_of(top, largest);
  std::fill_n(factor, kPeriod, inverse_of(*scale));
  k.codes_f32(weight, inner, kPeriod, {factor, shift, -largest, largest, nullptr}, codes);
  return true;
}

// The output channels of one group, as rows of in * taps, with a scale for each input channel.
bool column_codes(const Rows& r, const float* weight, int64_t taps, float largest, uint8_t* codes, float* scale) {
  RealTensor real;
  real.f32 = weight;
  const std::vector<float> ranges = channel_ranges(r, real);
  std::vector<float> factors(ranges.size());
  for (int64_t i = 0; i < r.channels / taps; ++i) {
    float top = 0;
    for (int64_t t = 0; t < taps; ++t) top = larger(top, ranges[static_cast<size_t>(i * taps + t)]);
    if (!std::isfinite(top)) return false;
    scale[i] = scale_of(top, largest);
    std::fill_n(factors.begin() + i * taps, taps, inverse_of(scale[i]));
  }
  const int64_t period = period_of(r.channels);
  const std::vector<float> factor = repeated(factors, period);
  const std::vector<int32_t> shift(static_cast<size_t>(period), 0);
  for_blocks(r, [&](int64_t at, int64_t count) {
    r.kernels.training->codes_f32(weight + at, count, period, {factor.data(), shift.data(), -largest, largest, nullptr},
                                  codes + at);
  });
  return true;
}

}  // namespace

bool weight_codes(const Kernels& kernels, int threads, const float* weight, const WeightShape& s, int bits,
                  bool by_output, int8_t* codes, float* scale) {
  const float largest = static_cast<float>((1 << (bits - 1)) - 1);
  uint8_t* to = reinterpret_cast<uint8_t*>(codes);
  const int64_t inner = s.in * s.taps;
  std::atomic<bool> finite{true};
  if (by_output) {
    const int64_t grain = std::max<int64_t>((1 << 15) / inner, 1);
    parallel_for(threads, s.out, grain, [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o)
        if (!row_codes(*kernels.training, weight + o * inner, inner, largest, to + o * inner, scale + o)) finite = false;
    });
    return finite;
  }
  const int64_t rows = s.out / s.groups;
  for (int64_t group = 0; group < s.groups; ++group) {
    const Rows r{kernels, threads, rows, inner};
    const int64_t at = group * rows * inner;
    if (!column_codes(r, weight + at, s.taps, largest, to + at, scale + group * s.in)) finite = false;
  }
  return finite;
}

std::vector<float> join(const Rows& r, const RealTensor& x, const float* add, const uint8_t* bits, float* out) {
  const Training& k = *r.kernels.training;
  const int64_t period = period_of(r.channels);
  std::vector<float> wide(static_cast<size_t>(period), 0.0f), scale;
  if (x.scale != nullptr) scale = repeated(std::vector<float>(x.scale, x.scale + r.channels), period);
  std::mutex mutex;
  for_blocks(r, [&](int64_t at, int64_t count) {
    std::vector<float> part(static_cast<size_t>(period), 0.0f);
    const float* by = scale.empty() ? nullptr : scale.data();
    const float* other = add ? add + at : nullptr;
    const uint8_t* keep = bits ? bits + at / 8 : nullptr;
    if (x.i32 != nullptr)
      k.join_i32(x.i32 + at, count, period, by, other, keep, out + at, part.data());
    else
      k.join_f32(x.f32 + at, count, period, by, other, keep, out + at, part.data());
    std::lock_guard<std::mutex> lock(mutex);
    for (size_t i = 0; i < wide.size(); ++i) wide[i] = larger(part[i], wide[i]);
  });
  return folded_range(wide, r.channels);
}

// ---- normalization

namespace {

// A vector as codes of a symmetric grid over all of it.
struct Symmetric {
  Symmetric(const std::vector<float>& x, float bound) {
    float top = 0;
    for (float v : x) top = larger(top, std::fabs(v));
    step = top / bound;
    if (step < kSmallestScale) step = 1;
    const float inverse = 1.0f / step;
    for (float v : x) codes.push_back(std::min(std::max(std::nearbyintf(v * inverse), -bound), bound));
  }
  float value(size_t i) const { return codes[i] * step; }

  float step;
  std::vector<float> codes;
};

std::vector<float> copied(const float* x, int64_t count) {
  return x ? std::vector<float>(x, x + count) : std::vector<float>();
}

}  // namespace

Norm::Norm(const Rows& rows, const NormOptions& options, const float* weight, const float* bias)
    : rows_(rows),
      options_(options),
      period_(period_of(rows.channels)),
      weight_(copied(weight, rows.channels)),
      bias_(copied(bias, rows.channels)) {}

bool Norm::forward(const RealTensor& x, const int32_t* least, const int32_t* most, int8_t* codes) {
  const Training& k = *rows_.kernels.training;
  const int64_t c = rows_.channels;
  const float bound = static_cast<float>((1 << (options_.bits - 1)) - 1);
  float top = 0;
  if (x.i32 != nullptr && least != nullptr) {
    for (int64_t i = 0; i < c; ++i)
      top = larger(top, larger(std::fabs(static_cast<float>(least[i]) * x.scale[i]),
                               std::fabs(static_cast<float>(most[i]) * x.scale[i])));
  } else {
    for (float r : channel_ranges(rows_, x)) top = larger(top, r);
  }
  if (!std::isfinite(top)) return false;
  step_ = top / bound;
  if (step_ < kSmallestScale) step_ = 1;
  const float inverse = 1.0f / step_;
  std::vector<float> scale;
  if (x.scale != nullptr) scale = repeated(std::vector<float>(x.scale, x.scale + c), period_);
  const size_t wide = static_cast<size_t>(period_);
  std::vector<int64_t> sum(wide, 0);
  std::vector<int32_t> low(wide, INT32_MAX), high(wide, INT32_MIN);
  std::mutex mutex;
  for_blocks(rows_, [&](int64_t at, int64_t count) {
    std::vector<int64_t> part(wide, 0);
    std::vector<int32_t> part_low(wide, INT32_MAX), part_high(wide, INT32_MIN);
    const float* by = scale.empty() ? nullptr : scale.data();
    if (x.i32 != nullptr)
      k.norm_codes_i32(x.i32 + at, count, period_, by, inverse, bound, codes + at, part.data(), part_low.data(),
                       part_high.data());
    else
      k.norm_codes_f32(x.f32 + at, count, period_, by, inverse, bound, codes + at, part.data(), part_low.data(),
                       part_high.data());
    std::lock_guard<std::mutex> lock(mutex);
    for (size_t i = 0; i < wide; ++i) {
      sum[i] += part[i];
      low[i] = std::min(low[i], part_low[i]);
      high[i] = std::max(high[i], part_high[i]);
    }
  });
  statistics(codes, folded_sum(sum, c), folded_least(low, c), folded_most(high, c));
  return true;
}

void Norm::statistics(const int8_t* codes, const std::vector<int64_t>& sum, const std::vector<int32_t>& least,
                      const std::vector<int32_t>& most) {
  const Training& k = *rows_.kernels.training;
  const size_t c = static_cast<size_t>(rows_.channels), wide = static_cast<size_t>(period_);
  const float bound = static_cast<float>((1 << (options_.bits - 1)) - 1);
  const float count = static_cast<float>(rows_.rows);
  const double n = static_cast<double>(rows_.rows);
  least_ = least;
  most_ = most;
  mean_.resize(c);
  for (size_t i = 0; i < c; ++i) mean_[i] = static_cast<float>(sum[i]) / count * step_;
  const Symmetric center(mean_, bound);
  std::vector<float> centers(c);
  for (size_t i = 0; i < c; ++i) centers[i] = center.value(i);
  center_ = repeated(centers, period_);

  // Where a code's sign against the mean changes.
  std::vector<int32_t> below(c), above(c);
  const int32_t largest = static_cast<int32_t>(bound);
  for (size_t i = 0; i < c; ++i) {
    int32_t code = -largest;
    while (code <= largest && static_cast<float>(code) * step_ < centers[i]) ++code;
    below[i] = code - 1;
    while (code <= largest && static_cast<float>(code) * step_ <= centers[i]) ++code;
    above[i] = code;
  }
  below_ = repeated(below, period_);
  above_ = repeated(above, period_);

  std::vector<int64_t> sums[3];  // numbers below and above the mean, sum above; or, with l2, the sum of squares
  for (auto& s : sums) s.assign(wide, 0);
  std::mutex mutex;
  for_blocks(rows_, [&](int64_t at, int64_t block) {
    std::vector<int64_t> part[3];
    for (auto& s : part) s.assign(wide, 0);
    if (options_.l2)
      k.norm_squares(codes + at, block, period_, part[0].data());
    else
      k.norm_sides(codes + at, block, period_, sides(), part[0].data(), part[1].data(), part[2].data());
    std::lock_guard<std::mutex> lock(mutex);
    for (int s = 0; s < 3; ++s)
      for (size_t i = 0; i < wide; ++i) sums[s][i] += part[s][i];
  });
  for (auto& s : sums) s = folded_sum(s, rows_.channels);
  deviation_.resize(c);
  sign_sum_.assign(c, 0);
  std::vector<float> spread(c);
  for (size_t i = 0; i < c; ++i) {
    const double step = step_, mu = centers[i];
    double value;
    if (options_.l2) {
      const double square = step * step * static_cast<double>(sums[0][i]) -
                            2.0 * mu * step * static_cast<double>(sum[i]) + n * mu * mu;
      value = std::sqrt(std::max(square / n, 0.0));
    } else {
      const int64_t at = (above[i] - below[i] > 1 ? below[i] + 1 : 0) * (rows_.rows - sums[0][i] - sums[1][i]);
      const int64_t sum_below = sum[i] - sums[2][i] - at;
      sign_sum_[i] = sums[1][i] - sums[0][i];
      value = (step * static_cast<double>(sums[2][i] - sum_below) - mu * static_cast<double>(sign_sum_[i])) / n *
              options_.factor;
    }
    deviation_[i] = static_cast<float>(value);
    const double wide = deviation_[i];
    spread[i] = options_.l2 ? static_cast<float>(std::sqrt(wide * wide + options_.eps))
                            : deviation_[i] + static_cast<float>(options_.eps);
  }
  const Symmetric grid(spread, bound);
  std::vector<float> inverse(c), gain(c), scale(c), offset(c);
  float top = 0;
  for (size_t i = 0; i < c; ++i) {
    inverse[i] = 1.0f / (std::max(grid.codes[i], 1.0f) * grid.step);
    for (int32_t code : {least[i], most[i]})
      top = larger(top, std::fabs((static_cast<float>(code) * step_ - centers[i]) * inverse[i]));
  }
  h_step_ = top / bound;
  if (h_step_ < kSmallestScale) h_step_ = 1;
  const float inverse_h = 1.0f / h_step_;
  const Symmetric weight(weight_, bound), bias(bias_, bound);
  for (size_t i = 0; i < c; ++i) {
    gain[i] = inverse[i] * inverse_h;
    scale[i] = weight_.empty() ? h_step_ : h_step_ * weight.value(i);
    offset[i] = bias_.empty() ? 0.0f : bias.value(i);
  }
  inverse_ = repeated(inverse, period_);
  gain_ = repeated(gain, period_);
  scale_ = repeated(scale, period_);
  offset_ = repeated(offset, period_);

  // Codes that a rectifier lets pass: results are monotone in the codes.
  std::vector<int32_t> first(c), last(c);
  for (size_t i = 0; i < c; ++i) {
    first[i] = -largest;
    last[i] = largest;
    while (first[i] <= largest && !(result(static_cast<int64_t>(i), first[i]) > 0)) ++first[i];
    while (last[i] >= first[i] && !(result(static_cast<int64_t>(i), last[i]) > 0)) --last[i];
  }
  first_ = repeated(first, period_);
  last_ = repeated(last, period_);
  all_first_.assign(wide, -largest);
  all_last_.assign(wide, largest);
  if (!options_.l2) return;
  h_sum_.assign(wide, 0);
  for_blocks(rows_, [&](int64_t at, int64_t block) {
    std::vector<int64_t> part(wide, 0);
    k.norm_h(codes + at, block, period_, affine(false), part.data());
    std::lock_guard<std::mutex> lock(mutex);
    for (size_t i = 0; i < wide; ++i) h_sum_[i] += part[i];
  });
  h_sum_ = folded_sum(h_sum_, rows_.channels);
}

float Norm::result(int64_t channel, int32_t code) const {
  const size_t i = static_cast<size_t>(channel);
  return std::nearbyintf((static_cast<float>(code) * step_ - center_[i]) * gain_[i]) * scale_[i] + offset_[i];
}

AffineArgs Norm::affine(bool rectify) const {
  return {step_,         center_.data(),  gain_.data(),
          scale_.data(), offset_.data(), rectify ? 0.0f : -std::numeric_limits<float>::infinity()};
}

PassArgs Norm::passes(bool rectify) const {
  return rectify ? PassArgs{first_.data(), last_.data()} : PassArgs{all_first_.data(), all_last_.data()};
}

ShiftGrid Norm::to_codes(const int8_t* codes, bool rectify, const ShiftFormat& f, const Noise* noise,
                         uint8_t* out) const {
  const Training& k = *rows_.kernels.training;
  std::vector<float> ranges(static_cast<size_t>(rows_.channels));
  for (int64_t i = 0; i < rows_.channels; ++i) {
    float top = 0;
    for (int32_t code : {least_[static_cast<size_t>(i)], most_[static_cast<size_t>(i)]}) {
      const float y = result(i, code);
      top = larger(top, rectify ? std::max(y, 0.0f) : std::fabs(y));
    }
    ranges[static_cast<size_t>(i)] = top;
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

bool Norm::backward(const RealTensor& gradient, const int8_t* codes, bool rectify, const Noise* noise, int8_t* out) {
  const Training& k = *rows_.kernels.training;
  const size_t wide = static_cast<size_t>(period_);
  const float bound = static_cast<float>((1 << (options_.bits - 1)) - 1);
  const PassArgs pass = passes(rectify);
  std::vector<float> scale;
  if (gradient.scale != nullptr)
    scale = repeated(std::vector<float>(gradient.scale, gradient.scale + rows_.channels), period_);
  const float* by = scale.empty() ? nullptr : scale.data();
  std::mutex mutex;
  float top = 0;
  for_blocks(rows_, [&](int64_t at, int64_t count) {
    std::vector<float> part(wide, 0.0f);
    if (gradient.i32 != nullptr)
      k.gradient_range_i32(gradient.i32 + at, codes + at, count, period_, by, pass, part.data());
    else
      k.gradient_range_f32(gradient.f32 + at, codes + at, count, period_, by, pass, part.data());
    std::lock_guard<std::mutex> lock(mutex);
    for (float v : part) top = larger(top, v);
  });
  if (!std::isfinite(top)) return false;
  float step = top / bound;
  if (step < kSmallestScale) step = 1;
  const float inverse = 1.0f / step;
  std::vector<int64_t> sums[2];
  for (auto& s : sums) s.assign(wide, 0);
  for (int e = 0; e < 6; ++e) extremes_[e].assign(wide, e % 2 == 0 ? INT32_MAX : INT32_MIN);
  for_blocks(rows_, [&](int64_t at, int64_t count) {
    std::vector<int64_t> part[2];
    for (auto& s : part) s.assign(wide, 0);
    std::vector<int32_t> ends[6];
    for (int e = 0; e < 6; ++e) ends[e].assign(wide, e % 2 == 0 ? INT32_MAX : INT32_MIN);
    const GradientSums to{part[0].data(), part[1].data(), ends[0].data(), ends[1].data(),
                          ends[2].data(), ends[3].data(), ends[4].data(), ends[5].data()};
    const Noise from = moved(noise, at);
    const Noise* with = noise ? &from : nullptr;
    if (gradient.i32 != nullptr)
      k.gradient_codes_i32(gradient.i32 + at, codes + at, count, period_, by, inverse, bound, with, affine(false), pass,
                           sides(), out + at, to);
    else
      k.gradient_codes_f32(gradient.f32 + at, codes + at, count, period_, by, inverse, bound, with, affine(false), pass,
                           sides(), out + at, to);
    std::lock_guard<std::mutex> lock(mutex);
    for (size_t i = 0; i < wide; ++i) {
      sums[0][i] += part[0][i];
      sums[1][i] += part[1][i];
      for (int e = 0; e < 6; ++e)
        extremes_[e][i] =
            e % 2 == 0 ? std::min(extremes_[e][i], ends[e][i]) : std::max(extremes_[e][i], ends[e][i]);
    }
  });
  for (int e = 0; e < 6; ++e)
    extremes_[e] = e % 2 == 0 ? folded_least(extremes_[e], rows_.channels) : folded_most(extremes_[e], rows_.channels);
  gradient_constants(step, folded_sum(sums[0], rows_.channels), folded_sum(sums[1], rows_.channels));
  return true;
}

void Norm::gradient_constants(float step, const std::vector<int64_t>& sum_g, const std::vector<int64_t>& sum_gh) {
  const size_t c = static_cast<size_t>(rows_.channels);
  const float bound = static_cast<float>((1 << (options_.bits - 1)) - 1);
  const double n = static_cast<double>(rows_.rows), h_step = h_step_;
  const Symmetric weight(weight_, bound);
  weight_gradient_.resize(c);
  bias_gradient_.resize(c);
  std::vector<float> coefficient(c), below(c), at(c), above(c), slope(c);
  for (size_t i = 0; i < c; ++i) {
    const double g = static_cast<double>(sum_g[i]), gh = static_cast<double>(sum_gh[i]), by = step;
    weight_gradient_[i] = static_cast<float>(gh * by * h_step);
    bias_gradient_[i] = static_cast<float>(g * by);
    const float unit = step * inverse_[i];
    coefficient[i] = weight_.empty() ? unit : unit * weight.value(i);
    const double a = coefficient[i];
    const double mean = a * g / n;                 // of the gradient of the normalized input, over its spread
    const double together = a * gh / n * h_step;  // of its product with the normalized input
    if (options_.l2) {
      at[i] = static_cast<float>(mean - static_cast<double>(h_sum_[i]) / n * h_step * together);
      slope[i] = static_cast<float>(h_step * together);
    } else {
      const double signs = static_cast<double>(sign_sum_[i]) / n;
      below[i] = static_cast<float>(mean + (-1.0 - signs) * options_.factor * together);
      at[i] = static_cast<float>(mean + (0.0 - signs) * options_.factor * together);
      above[i] = static_cast<float>(mean + (1.0 - signs) * options_.factor * together);
    }
  }
  coefficient_ = repeated(coefficient, period_);
  at_below_ = repeated(below, period_);
  at_mean_ = repeated(at, period_);
  at_above_ = repeated(above, period_);
  slope_ = repeated(slope, period_);
}

void Norm::gradient_f32(const int8_t* gradient, const int8_t* codes, float* out) const {
  const Training& k = *rows_.kernels.training;
  for_blocks(rows_, [&](int64_t at, int64_t count) {
    if (options_.l2)
      k.l2_gradient(gradient + at, codes + at, count, period_, {coefficient_.data(), at_mean_.data(), slope_.data()},
                    affine(false), out + at);
    else
      k.l1_gradient(gradient + at, codes + at, count, period_,
                    {coefficient_.data(), at_below_.data(), at_mean_.data(), at_above_.data()}, sides(), out + at);
  });
}

ShiftGrid Norm::gradient_codes(const int8_t* gradient, const int8_t* codes, const ShiftFormat& f, const Noise* noise,
                               uint8_t* out) const {
  const Training& k = *rows_.kernels.training;
  if (options_.l2) {  // its range is not in the sums: once through memory
    std::vector<float> x(static_cast<size_t>(rows_.elements()));
    gradient_f32(gradient, codes, x.data());
    RealTensor real;
    real.f32 = x.data();
    return shift_codes(rows_, real, f, noise, out);
  }
  const size_t c = static_cast<size_t>(rows_.channels);
  std::vector<float> ranges(c, 0.0f);
  const std::vector<float>* constants[3] = {&at_below_, &at_mean_, &at_above_};
  for (size_t i = 0; i < c; ++i)
    for (int e = 0; e < 6; ++e) {
      if (extremes_[e / 2 * 2][i] == INT32_MAX) continue;  // no code lies there
      const float dx = coefficient_[i] * static_cast<float>(extremes_[e][i]) - (*constants[e / 2])[i];
      ranges[i] = larger(ranges[i], std::fabs(dx));
    }
  const ShiftGrid grid = shift_grid(ranges, f);
  if (std::isnan(grid.scale)) return grid;
  const CodeTables tables(grid, f, period_);
  for_blocks(rows_, [&](int64_t at, int64_t count) {
    const Noise from = moved(noise, at);
    k.l1_gradient_codes(gradient + at, codes + at, count, period_,
                        {coefficient_.data(), at_below_.data(), at_mean_.data(), at_above_.data()}, sides(),
                        tables.args(noise ? &from : nullptr), out + at);
  });
  return grid;
}

}  // namespace bitstrata
