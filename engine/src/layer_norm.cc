#include "bitstrata/layer_norm.h"

#include <algorithm>
#include <cmath>
#include <mutex>

#include "layer_rows.h"
#include "parallel.h"
#include "quantize_rows.h"

namespace bitstrata {
namespace {

// To nearest, ties to even, for |x| < 2^22: in a loop it becomes vector code everywhere, which a library call does not.
float round_small(float x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  return (x + kMagic) - kMagic;
}

float step_of(float top, float bound) {
  const float step = top / bound;
  return step < kSmallestScale ? 1.0f : step;
}

size_t size_of(int64_t count) { return static_cast<size_t>(count); }

}  // namespace

LayerNorm::LayerNorm(const Rows& rows, const NormOptions& options, const float* weight, const float* bias)
    : rows_(rows),
      options_(options),
      weight_(on_grid(weight, weight ? rows.channels : 0)),
      bias_(on_grid(bias, bias ? rows.channels : 0)),
      weight_codes_(size_of(rows.channels), 1) {
  if (weight_.finite)
    for (size_t i = 0; i < weight_.codes.size(); ++i) weight_codes_[i] = static_cast<int8_t>(weight_.codes[i]);
}

LayerNorm::Vector LayerNorm::on_grid(const float* x, int64_t count) const {
  const float top = rows_.kernels.training->layer.range(x, count), most = bound();
  Vector out;
  out.codes.resize(size_of(count));
  out.finite = std::isfinite(top);
  if (!out.finite) return out;
  out.step = step_of(top, most);
  const float inverse = 1.0f / out.step;
  for (size_t i = 0; i < out.codes.size(); ++i)
    out.codes[i] = std::min(std::max(round_small(x[i] * inverse), -most), most);
  return out;
}

float LayerNorm::range(const float* x) const {
  std::mutex mutex;
  float top = 0;
  for_row_blocks(rows_, [&](int64_t first, int64_t last) {
    const int64_t n = rows_.channels;
    const float part = rows_.kernels.training->layer.range(x + first * n, (last - first) * n);
    std::lock_guard<std::mutex> lock(mutex);
    top = larger(part, top);
  });
  return top;
}

bool LayerNorm::forward(const float* x, int8_t* codes, float* out) {
  const float top = range(x);
  if (!std::isfinite(top) || !weight_.finite || !bias_.finite) return false;
  step_ = step_of(top, bound());
  const Sums sums = input_codes(x, codes);
  const std::vector<float> mean = means(sums);
  set_inverses(options_.l2 ? l2_spreads(sums, mean) : l1_spreads(codes, sums, mean));
  set_range(sums, mean);
  result(mean, codes, out);
  return true;
}

LayerNorm::Sums LayerNorm::input_codes(const float* x, int8_t* codes) const {
  const LayerKernels& k = rows_.kernels.training->layer;
  const int64_t n = rows_.channels;
  const size_t rows = size_of(rows_.rows);
  Sums s{std::vector<int64_t>(rows), std::vector<int64_t>(options_.l2 ? rows : 0), std::vector<int8_t>(rows),
         std::vector<int8_t>(rows)};
  const float inverse = 1.0f / step_;
  for_row_blocks(rows_, [&](int64_t first, int64_t last) {
    for_cached_rows(first, last, n, [&](int64_t r, int64_t count) {
      k.codes(x + r * n, count * n, inverse, bound(), nullptr, codes + r * n);
      k.sums(codes + r * n, count, n,
             {s.sum.data() + r, options_.l2 ? s.squares.data() + r : nullptr, s.least.data() + r, s.most.data() + r});
    });
  });
  return s;
}

// Of the rows, on their grid.
std::vector<float> LayerNorm::means(const Sums& s) const {
  std::vector<float> mean(s.sum.size());
  const float n = static_cast<float>(rows_.channels);
  for (size_t r = 0; r < mean.size(); ++r) mean[r] = static_cast<float>(s.sum[r]) / n * step_;
  Vector grid = on_grid(mean.data(), rows_.rows);
  for (float& code : grid.codes) code *= grid.step;
  return std::move(grid.codes);
}

std::vector<float> LayerNorm::l1_spreads(const int8_t* codes, const Sums& s, const std::vector<float>& mean) const {
  const size_t rows = mean.size();
  std::vector<int8_t> below(rows), up_to(rows);  // codes under the mean, and not over it
  for (size_t r = 0; r < rows; ++r) {
    const CodesBeside beside(mean[r], step_, static_cast<int32_t>(bound()));
    below[r] = beside.below;
    up_to[r] = beside.up_to;
  }
  std::vector<int64_t> fewer(rows), more(rows), sum_more(rows);
  const int64_t n = rows_.channels;
  for_row_blocks(rows_, [&](int64_t first, int64_t last) {
    rows_.kernels.training->layer.sides(codes + first * n, last - first, n,
                                        {below.data() + first, up_to.data() + first}, fewer.data() + first,
                                        more.data() + first, sum_more.data() + first);
  });
  const double step = step_, count = static_cast<double>(n);
  const float eps = static_cast<float>(options_.eps);
  std::vector<float> spread(rows);
  for (size_t r = 0; r < rows; ++r) {
    const int64_t sum_at_mean = (n - fewer[r] - more[r]) * up_to[r];  // all of one code, if any
    const int64_t sum_fewer = s.sum[r] - sum_more[r] - sum_at_mean;
    const double far = step * static_cast<double>(sum_more[r] - sum_fewer);
    const double near = static_cast<double>(mean[r]) * static_cast<double>(more[r] - fewer[r]);
    spread[r] = static_cast<float>((far - near) / count * options_.factor) + eps;
  }
  return spread;
}

std::vector<float> LayerNorm::l2_spreads(const Sums& s, const std::vector<float>& mean) const {
  const double step = step_, count = static_cast<double>(rows_.channels);
  std::vector<float> spread(mean.size());
  for (size_t r = 0; r < spread.size(); ++r) {
    const double mu = mean[r];
    const double square = step * step * static_cast<double>(s.squares[r]) -
                          2.0 * mu * step * static_cast<double>(s.sum[r]) + count * mu * mu;
    const double deviation = static_cast<float>(std::sqrt(std::max(square / count, 0.0)));
    spread[r] = static_cast<float>(std::sqrt(deviation * deviation + options_.eps));
  }
  return spread;
}

void LayerNorm::set_inverses(const std::vector<float>& spread) {
  Vector grid = on_grid(spread.data(), rows_.rows);
  for (float& code : grid.codes) code = 1.0f / (std::max(code, 1.0f) * grid.step);
  inverse_ = std::move(grid.codes);
}

// The range of the normalized input, from the least and the largest code of each row.
void LayerNorm::set_range(const Sums& s, const std::vector<float>& mean) {
  float top = 0;
  for (size_t r = 0; r < mean.size(); ++r) {
    const float low = (static_cast<float>(s.least[r]) * step_ - mean[r]) * inverse_[r];
    const float high = (static_cast<float>(s.most[r]) * step_ - mean[r]) * inverse_[r];
    top = std::max(top, std::max(std::fabs(low), std::fabs(high)));
  }
  h_step_ = step_of(top, bound());
}

void LayerNorm::result(const std::vector<float>& mean, int8_t* codes, float* out) const {
  const size_t n = size_of(rows_.channels);
  std::vector<float> gain(mean.size()), scale(n, h_step_), offset(n, 0.0f);
  const float inverse = 1.0f / h_step_;
  for (size_t r = 0; r < gain.size(); ++r) gain[r] = inverse_[r] * inverse;
  for (size_t f = 0; f < weight_.codes.size(); ++f) scale[f] = h_step_ * (weight_.codes[f] * weight_.step);
  for (size_t f = 0; f < bias_.codes.size(); ++f) offset[f] = bias_.codes[f] * bias_.step;
  for_row_blocks(rows_, [&](int64_t first, int64_t last) {
    const int64_t at = first * rows_.channels;
    rows_.kernels.training->layer.result(codes + at, last - first, rows_.channels,
                                         {step_, mean.data() + first, gain.data() + first, scale.data(), offset.data()},
                                         out + at);
  });
}

bool LayerNorm::backward(const float* gradient, const int8_t* codes, const Noise* noise, float* out) {
  const float top = range(gradient);
  if (!std::isfinite(top)) return false;
  const float step = step_of(top, bound());
  const size_t n = size_of(rows_.channels);
  std::vector<int64_t> sums(2 * n, 0);  // of g, then of g * h, for each feature
  std::mutex mutex;
  for_row_blocks(rows_, [&](int64_t first, int64_t last) {
    std::vector<int64_t> part(2 * n, 0);
    gradient_rows(first, last, gradient, codes, noise, step, out, part.data());
    std::lock_guard<std::mutex> lock(mutex);
    for (size_t i = 0; i < sums.size(); ++i) sums[i] += part[i];
  });
  weight_gradient_.resize(n);
  bias_gradient_.resize(n);
  const double by = step, h_step = h_step_;
  for (size_t f = 0; f < n; ++f) {
    bias_gradient_[f] = static_cast<float>(static_cast<double>(sums[f]) * by);
    weight_gradient_[f] = static_cast<float>(static_cast<double>(sums[n + f]) * by * h_step);
  }
  return true;
}

void LayerNorm::gradient_rows(int64_t first, int64_t last, const float* gradient, const int8_t* codes,
                              const Noise* noise, float step, float* out, int64_t* feature_sums) const {
  const LayerKernels& k = rows_.kernels.training->layer;
  const int64_t n = rows_.channels, most = std::min(cached_rows(n), last - first);
  std::vector<int8_t> g(size_of(most * n));
  GradientRows constants(most);
  std::vector<float> weight(weight_codes_.begin(), weight_codes_.end());
  const GradientRows::Factors factors{step, weight_.codes.empty() ? 1.0f : weight_.step, h_step_, options_.l2,
                                      options_.factor};
  for_cached_rows(first, last, n, [&](int64_t r, int64_t count) {
    const int64_t at = r * n;
    const Noise from = moved(noise, at);
    k.codes(gradient + at, count * n, 1.0f / step, bound(), noise ? &from : nullptr, g.data());
    k.gradient_sums(g.data(), codes + at, count, n,
                    constants.sums(weight_codes_.data(), !options_.l2, feature_sums, feature_sums + n));
    constants.set(count, n, inverse_.data() + r, factors);
    (options_.l2 ? k.l2_gradient : k.l1_gradient)(g.data(), codes + at, count, n, constants.args(weight.data()),
                                                  out + at);
  });
}

}  // namespace bitstrata
