// Interval arithmetic of the integer program, and the integer constants that the intervals allow (spec/numerics.md,
// whose sections the comments name). float64 operations are single and in the order written there.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "bitstrata/program.h"

namespace bitstrata {

constexpr int64_t kInt32Max = INT32_MAX;
constexpr double kFixedLimit = 2147483648.0 - 1024.0;  // what a fixed-point bound may reach; the rest is for roundings

// Proved bounds of a value's integers, a channel.
struct Bounds {
  std::vector<int64_t> lo, hi;
  size_t channels() const { return lo.size(); }
  int64_t least() const;
  int64_t most() const;
};

struct Interval {
  int64_t lo, hi;
};

// Weights mul * (code >> shift) + add of a convolution; codes: (out, per_group, positions).
struct IntegerWeights {
  const int8_t* codes;
  int shift;
  int64_t mul, add;
  int64_t out, per_group, positions, groups;
};

// Section 3: out = (x * multiplier + bias) >> shift, a channel.
struct RequantConstants {
  std::vector<int32_t> multiplier;
  std::vector<int64_t> bias;
  std::vector<uint8_t> shift;
};

// The smallest interval that holds [lo, hi] and `value`, in every channel.
Bounds join(Bounds bounds, int64_t value);

// Ends a derivation: the message is "where: message".
[[noreturn]] void refuse(const std::string& where, const std::string& message);

int64_t magnitude(const Bounds& bounds, size_t channel);

// Section 2: bounds of the accumulators over inputs within `bounds`, which lie within int16.
Bounds conv_bounds(const IntegerWeights& weights, const Bounds& bounds);

// Section 4: value * 2^-shift; a right shift rounds half up.
int64_t align_value(int64_t value, int64_t shift);
Bounds align_bounds(Bounds bounds, int64_t shift);
Bounds clamp_bounds(Bounds bounds, Interval limits);

// Section 3: [low, high] narrowed by real clip bounds rounded to `unit`s. Throws ArtifactError (program) if nothing is
// left.
Interval clamp_range(const RealClip& clip, double unit, Interval limits, const std::string& where);

// Section 3: the codes of real clip bounds on the grid step * (code + offset), themselves clamped to its range.
Interval code_clamp(const RealClip& clip, double step, double offset, Interval range);

// Section 3: the finest constants a channel for code = floor(scale * x + offset + 1/2) with x within `bounds`, whose
// magnitudes are below 2^31. ArtifactError (program) names a channel for which no shift keeps them within their types.
RequantConstants requant_constants(const std::vector<double>& scale, const std::vector<double>& offset,
                                   const Bounds& bounds, const std::string& where);

// The results' interval: the formula is monotone in x, so the end points suffice.
Bounds requant_image(const RequantConstants& constants, const Bounds& bounds, Interval limits);

// Section 4: the largest f <= 30 with bound * 2^f <= 2^31 - 2^10. ArtifactError (program) if f would be negative.
int fraction_bits(double bound, const std::string& where);

// A number in messages: the shortest decimal form that reads back as the same.
std::string str(double v);

}  // namespace bitstrata
