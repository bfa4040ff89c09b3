#include "intervals.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <optional>

#include "bitstrata/error.h"

namespace bitstrata {
namespace {

constexpr double kTwo31 = 2147483648.0, kTwo63 = 9223372036854775808.0;
constexpr int64_t kBlock = 128;  // products below 2^15 * 2^8 whose sum stays within int32

// floor(value + 1/2), saturated far beyond every limit that it is compared with.
int64_t round_half_up(double value) {
  const double r = std::floor(value + 0.5);
  return r >= kTwo63 / 2 ? INT64_MAX / 2 : r <= -kTwo63 / 2 ? INT64_MIN / 2 : static_cast<int64_t>(r);
}

struct Ends {
  int64_t lo, hi;
};

// Bounds of one output: its row of `count` weights, whose inputs lie in [lo[i], hi[i]]. Split by sign, the sum of
// min(w * lo, w * hi) is that of w+ * lo + w- * hi.
Ends row_bounds(const IntegerWeights& w, const int8_t* codes, const int16_t* lo, const int16_t* hi, int64_t count) {
  const auto mul = static_cast<int16_t>(w.mul), add = static_cast<int16_t>(w.add);
  const int shift = w.shift;
  Ends ends{0, 0};
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, count);
    int32_t least = 0, most = 0;
    for (int64_t i = begin; i < end; ++i) {
      const auto weight = static_cast<int16_t>((codes[i] >> shift) * mul + add);
      const auto up = std::max<int16_t>(weight, 0), down = std::min<int16_t>(weight, 0);
      least += up * lo[i] + down * hi[i];
      most += up * hi[i] + down * lo[i];
    }
    ends.lo += least;
    ends.hi += most;
  }
  return ends;
}

struct Constant {
  int64_t multiplier, bias;
};

// M and B at one shift, if they fit. Every comparison is exact.
std::optional<Constant> constant_at(double scale, double offset, int64_t largest, int shift) {
  const int64_t half = (int64_t{1} << shift) >> 1;
  const double m = std::nearbyint(std::ldexp(scale, shift));
  double b = std::nearbyint(std::ldexp(offset, shift));
  // Below -2^63 float64 is a multiple of 2^11: adding half first is exact wherever the sum comes back into range.
  const bool below = b < -kTwo63;
  if (below) b += static_cast<double>(half);
  if (!(std::fabs(m) < kTwo31 && b >= -kTwo63 && b < kTwo63)) return std::nullopt;  // NaN too
  const int64_t left = below ? 0 : half;
  const auto multiplier = static_cast<int64_t>(m);
  auto bias = static_cast<int64_t>(b);
  if (bias > INT64_MAX - left) return std::nullopt;
  bias += left;
  if (bias == INT64_MIN || std::abs(bias) > INT64_MAX - largest * std::abs(multiplier)) return std::nullopt;
  return Constant{multiplier, bias};
}

// |scale| >= 2^(e-1), so at shifts above 32 - e the multiplier reaches 2^31; only 0 starts at 62.
int first_shift(double scale) {
  int exponent = -30;
  if (std::isfinite(scale) && scale != 0) std::frexp(scale, &exponent);
  return std::min(62, 32 - exponent);
}

}  // namespace

std::string str(double v) {
  char text[32];
  const auto end = std::to_chars(text, text + sizeof text, v).ptr;
  return std::string(text, end);
}

void refuse(const std::string& where, const std::string& message) {
  throw ArtifactError(ArtifactError::Kind::program, "", where + ": " + message);
}

int64_t Bounds::least() const { return *std::min_element(lo.begin(), lo.end()); }
int64_t Bounds::most() const { return *std::max_element(hi.begin(), hi.end()); }

Bounds join(Bounds bounds, int64_t value) {
  for (int64_t& lo : bounds.lo) lo = std::min(lo, value);
  for (int64_t& hi : bounds.hi) hi = std::max(hi, value);
  return bounds;
}

int64_t magnitude(const Bounds& bounds, size_t channel) {
  return std::max(std::abs(bounds.lo[channel]), std::abs(bounds.hi[channel]));
}

Bounds conv_bounds(const IntegerWeights& w, const Bounds& bounds) {
  const int64_t row = w.per_group * w.positions, outs = w.out / w.groups;
  std::vector<int16_t> lo(static_cast<size_t>(row)), hi(static_cast<size_t>(row));
  Bounds result;
  for (int64_t group = 0; group < w.groups; ++group) {
    for (int64_t i = 0; i < w.per_group; ++i) {
      const auto channel = static_cast<size_t>(group * w.per_group + i);
      std::fill_n(lo.begin() + i * w.positions, w.positions, static_cast<int16_t>(bounds.lo[channel]));
      std::fill_n(hi.begin() + i * w.positions, w.positions, static_cast<int16_t>(bounds.hi[channel]));
    }
    for (int64_t o = group * outs; o < (group + 1) * outs; ++o) {
      const Ends ends = row_bounds(w, w.codes + o * row, lo.data(), hi.data(), row);
      result.lo.push_back(ends.lo);
      result.hi.push_back(ends.hi);
    }
  }
  return result;
}

int64_t align_value(int64_t value, int64_t shift) {
  if (shift > 0) return (value + (int64_t{1} << (shift - 1))) >> shift;
  return static_cast<int64_t>(static_cast<uint64_t>(value) << -shift);
}

Bounds align_bounds(Bounds bounds, int64_t shift) {
  for (int64_t& lo : bounds.lo) lo = align_value(lo, shift);
  for (int64_t& hi : bounds.hi) hi = align_value(hi, shift);
  return bounds;
}

Bounds clamp_bounds(Bounds bounds, Interval limits) {
  for (int64_t& lo : bounds.lo) lo = std::clamp(lo, limits.lo, limits.hi);
  for (int64_t& hi : bounds.hi) hi = std::clamp(hi, limits.lo, limits.hi);
  return bounds;
}

Interval clamp_range(const RealClip& clip, double unit, Interval limits, const std::string& where) {
  if (clip.has_low) limits.lo = std::max(limits.lo, round_half_up(clip.low / unit));
  if (clip.has_high) limits.hi = std::min(limits.hi, round_half_up(clip.high / unit));
  if (limits.lo > limits.hi)
    refuse(where, "clip (" + (clip.has_low ? str(clip.low) : "none") + ", " +
                      (clip.has_high ? str(clip.high) : "none") + ") in units of " + str(unit) +
                      " leaves no integer: [" + std::to_string(limits.lo) + ", " + std::to_string(limits.hi) + "]");
  return limits;
}

Interval code_clamp(const RealClip& clip, double step, double offset, Interval range) {
  const auto code = [&](double bound) {
    return std::min(std::max(round_half_up(bound / step - offset), range.lo), range.hi);
  };
  return {clip.has_low ? code(clip.low) : range.lo, clip.has_high ? code(clip.high) : range.hi};
}

RequantConstants requant_constants(const std::vector<double>& scale, const std::vector<double>& offset,
                                   const Bounds& bounds, const std::string& where) {
  RequantConstants found;
  for (size_t c = 0; c < scale.size(); ++c) {
    std::optional<Constant> constant;
    int shift = first_shift(scale[c]) + 1;
    while (!constant && shift > 0) constant = constant_at(scale[c], offset[c], magnitude(bounds, c), --shift);
    if (!constant)
      refuse(where, "channel " + std::to_string(c) + ": no requantization constants: one input unit is " +
                        str(scale[c]) + " output units, the offset " + str(offset[c]) +
                        "; the multiplier must stay below 2^31, x*M + B below 2^63");
    found.multiplier.push_back(static_cast<int32_t>(constant->multiplier));
    found.bias.push_back(constant->bias);
    found.shift.push_back(static_cast<uint8_t>(shift));
  }
  return found;
}

Bounds requant_image(const RequantConstants& k, const Bounds& bounds, Interval limits) {
  Bounds result = bounds;
  for (size_t c = 0; c < bounds.channels(); ++c) {
    const auto at = [&](int64_t x) {
      return std::clamp((x * k.multiplier[c] + k.bias[c]) >> k.shift[c], limits.lo, limits.hi);
    };
    const int64_t a = at(bounds.lo[c]), b = at(bounds.hi[c]);
    result.lo[c] = std::min(a, b);
    result.hi[c] = std::max(a, b);
  }
  return result;
}

int fraction_bits(double bound, const std::string& where) {
  for (int f = 30; f >= 0; --f)
    if (std::ldexp(bound, f) <= kFixedLimit) return f;
  refuse(where, "values up to " + str(bound) + " do not fit 32-bit fixed point");
}

}  // namespace bitstrata
