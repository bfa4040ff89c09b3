#include <cmath>
#include <mutex>

#include "bitstrata/quantize.h"
#include "norm_parts.h"

namespace bitstrata {

namespace {

// Rows first to last - 1 of a pooling's input as maps of their own, and the windows that reach into them.
struct Strip {
  Strip(const PoolMap& s, int64_t first, int64_t last) : map(s) {
    const int64_t before = first + s.pad_h - s.kernel_h + 1;  // from the first window to the first that is wanted
    windows = before > 0 ? (before + s.stride_h - 1) / s.stride_h : 0;
    const int64_t end = std::min((last - 1 + s.pad_h) / s.stride_h + 1, s.out_h);
    map.in_h = last - first;
    map.out_h = std::max<int64_t>(end - windows, 0);
    map.pad_h = s.pad_h + first - windows * s.stride_h;
  }
  PoolMap map;
  int64_t windows;  // the first
};

}  // namespace

template <typename Body>
void Norm::each_gradient(const RealTensor& g, const PooledGradient* pooled, const Body& body) const {
  if (pooled == nullptr) {
    for_blocks(rows_, [&](int64_t at, int64_t count) {
      RealTensor part = g;
      if (g.i32 != nullptr)
        part.i32 += at;
      else
        part.f32 += at;
      body(part, at, count);
    });
    return;
  }
  constexpr int64_t kElements = 1 << 15;  // of a strip: half of what a core's own cache holds
  const PoolMap& s = pooled->map;
  const int64_t row = s.in_w * s.channels, rows = std::max<int64_t>(kElements / row, 1);
  const int64_t strips = (s.in_h + rows - 1) / rows, images = rows_.rows / (s.in_h * s.in_w);
  parallel_for(rows_.threads, images * strips, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> made(static_cast<size_t>(std::min(rows, s.in_h) * row));
    RealTensor part;
    part.f32 = made.data();
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / strips, first = i % strips * rows, last = std::min(first + rows, s.in_h);
      const Strip strip(s, first, last);
      const int64_t from = image * s.out_size() + strip.windows * s.out_w * s.channels;
      rows_.kernels.training->max_pool_gradient(g.f32 + from, pooled->places + from, strip.map, made.data());
      body(part, image * s.in_size() + first * row, (last - first) * row);
    }
  });
}

float Norm::gradient_range(const RealTensor& g, const PooledGradient* pooled, const float* scale, const int8_t* codes,
                           bool rectify) const {
  const Training& k = *rows_.kernels.training;
  const PassArgs by = passes(rectify);
  std::mutex mutex;
  float top = 0;
  each_gradient(g, pooled, [&](const RealTensor& from, int64_t at, int64_t count) {
    std::vector<float> part(static_cast<size_t>(period_), 0.0f);
    if (from.i32 != nullptr)
      k.gradient_range_i32(from.i32, codes + at, count, period_, scale, by, part.data());
    else
      k.gradient_range_f32(from.f32, codes + at, count, period_, scale, by, part.data());
    std::lock_guard<std::mutex> lock(mutex);
    for (float v : part) top = larger(top, v);
  });
  return top;
}

bool Norm::backward(const RealTensor& gradient, const PooledGradient* pooled, const float* range, const int8_t* codes,
                    bool rectify, const Noise* noise, int8_t* out) {
  const Training& k = *rows_.kernels.training;
  const size_t wide = static_cast<size_t>(period_);
  const PassArgs by_code = passes(rectify);
  std::vector<float> scale;
  if (gradient.scale != nullptr)
    scale = repeated(std::vector<float>(gradient.scale, gradient.scale + rows_.channels), period_);
  const float* by = scale.empty() ? nullptr : scale.data();
  const float top = range ? *range : gradient_range(gradient, pooled, by, codes, rectify);
  if (!std::isfinite(top)) return false;
  const float step = Symmetric::step_of(top, bound()), inverse = 1.0f / step;
  std::vector<int64_t> sums[2];
  for (auto& s : sums) s.assign(wide, 0);
  for (int s = 0; s < 3; ++s) {
    least_g_[s].assign(wide, 127);
    most_g_[s].assign(wide, -128);
  }
  std::mutex mutex;
  each_gradient(gradient, pooled, [&](const RealTensor& g, int64_t at, int64_t count) {
    std::vector<int64_t> part[2];
    for (auto& s : part) s.assign(wide, 0);
    std::vector<int8_t> low[3], high[3];
    GradientSums to{part[0].data(), part[1].data(), {}, {}};
    for (int s = 0; s < 3; ++s) {
      low[s].assign(wide, 127);
      high[s].assign(wide, -128);
      to.least[s] = low[s].data();
      to.most[s] = high[s].data();
    }
    const Noise from = moved(noise, at);
    const Noise* with = noise ? &from : nullptr;
    if (g.i32 != nullptr)
      k.gradient_codes_i32(g.i32, codes + at, count, period_, by, inverse, bound(), with, by_code, out + at, to);
    else
      k.gradient_codes_f32(g.f32, codes + at, count, period_, by, inverse, bound(), with, by_code, out + at, to);
    std::lock_guard<std::mutex> lock(mutex);
    add_to(sums[0], part[0]);
    add_to(sums[1], part[1]);
    for (int s = 0; s < 3; ++s) {
      least_of(least_g_[s], low[s]);
      most_of(most_g_[s], high[s]);
    }
  });
  for (int s = 0; s < 3; ++s) {
    least_g_[s] = folded_least(least_g_[s], rows_.channels);
    most_g_[s] = folded_most(most_g_[s], rows_.channels);
  }
  gradient_constants(step, folded_sum(sums[0], rows_.channels), folded_sum(sums[1], rows_.channels));
  return true;
}

void Norm::gradient_constants(float step, const std::vector<int64_t>& sum_g, const std::vector<int64_t>& sum_gh) {
  const size_t c = static_cast<size_t>(rows_.channels);
  const double n = static_cast<double>(rows_.rows), h_step = h_step_, by = step;
  const Symmetric weight(weight_, bound());
  weight_gradient_.resize(c);
  bias_gradient_.resize(c);
  std::vector<float> coefficient(c), slope(c), constant[3];
  for (auto& v : constant) v.resize(c);
  for (size_t i = 0; i < c; ++i) {
    const double g = static_cast<double>(sum_g[i]), gh = static_cast<double>(sum_gh[i]);
    weight_gradient_[i] = static_cast<float>(gh * by * h_step);
    bias_gradient_[i] = static_cast<float>(g * by);
    const float unit = step * inverse_[i];
    coefficient[i] = weight_.empty() ? unit : unit * weight.value(i);
    const double a = coefficient[i];
    const double mean = a * g / n;                // of the gradient of the normalized input, over its spread
    const double together = a * gh / n * h_step;  // of its product with the normalized input
    const double of_h = static_cast<double>(h_sum_[i]) / n;
    if (options_.l2) {
      constant[1][i] = static_cast<float>(mean - of_h * h_step * together);
      slope[i] = static_cast<float>(h_step * together);
    } else {
      for (int s = 0; s < 3; ++s)
        constant[s][i] = static_cast<float>(mean + (s - 1.0 - of_h) * options_.factor * together);
    }
  }
  coefficient_ = repeated(coefficient, period_);
  slope_ = repeated(slope, period_);
  for (int s = 0; s < 3; ++s) constant_[s] = repeated(constant[s], period_);
}

void Norm::gradient_f32(const int8_t* gradient, const int8_t* codes, float* out) const {
  const Training& k = *rows_.kernels.training;
  for_blocks(rows_, [&](int64_t at, int64_t count) {
    if (options_.l2)
      k.l2_gradient(gradient + at, codes + at, count, period_,
                    {coefficient_.data(), constant_[1].data(), slope_.data()}, out + at);
    else
      k.l1_gradient(gradient + at, codes + at, count, period_,
                    {coefficient_.data(), {constant_[0].data(), constant_[1].data(), constant_[2].data()}}, out + at);
  });
}

ShiftGrid Norm::gradient_codes(const int8_t* gradient, const int8_t* codes, const ShiftFormat& f, const Noise* noise,
                               uint8_t* out) const {
  const Training& k = *rows_.kernels.training;
  if (options_.l2) {  // its range does not follow from the sums: once through memory
    std::vector<float> x(static_cast<size_t>(rows_.elements()));
    gradient_f32(gradient, codes, x.data());
    RealTensor real;
    real.f32 = x.data();
    return shift_codes(rows_, real, f, noise, out);
  }
  std::vector<float> ranges(static_cast<size_t>(rows_.channels), 0.0f);
  for (size_t i = 0; i < ranges.size(); ++i)
    for (int s = 0; s < 3; ++s) {
      if (most_g_[s][i] == -128) continue;  // no h of this sign
      for (int8_t g : {least_g_[s][i], most_g_[s][i]})
        ranges[i] = larger(ranges[i], std::fabs(coefficient_[i] * static_cast<float>(g) - constant_[s][i]));
    }
  const ShiftGrid grid = shift_grid(ranges, f);
  if (std::isnan(grid.scale)) return grid;
  const CodeTables tables(grid, f, period_);
  for_blocks(rows_, [&](int64_t at, int64_t count) {
    const Noise from = moved(noise, at);
    k.l1_gradient_codes(gradient + at, codes + at, count, period_,
                        {coefficient_.data(), {constant_[0].data(), constant_[1].data(), constant_[2].data()}},
                        tables.args(noise ? &from : nullptr), out + at);
  });
  return grid;
}

}  // namespace bitstrata
