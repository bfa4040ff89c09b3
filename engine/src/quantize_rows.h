// Rows of channels in blocks shared by threads, and what belongs to channels repeated to a period.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "bitstrata/quantize.h"
#include "parallel.h"

namespace bitstrata {

// Whole pixels; about `wanted` elements where a pixel has fewer.
inline int64_t period_of(int64_t channels, int64_t wanted = kLongPeriod) {
  return channels >= wanted ? channels : channels * (wanted / channels);
}

template <typename T>
std::vector<T> repeated(const std::vector<T>& channels, int64_t period) {
  std::vector<T> out(static_cast<size_t>(period));
  for (auto at = out.begin(); at != out.end();) at = std::copy(channels.begin(), channels.end(), at);
  return out;
}

// Back from a period to channels: combine(a, b) of all repetitions.
template <typename T, typename Combine>
std::vector<T> folded(const std::vector<T>& wide, int64_t channels, const Combine& combine) {
  std::vector<T> out(wide.begin(), wide.begin() + channels);
  for (size_t i = out.size(); i < wide.size(); ++i) {
    T& to = out[i % out.size()];
    to = combine(to, wide[i]);
  }
  return out;
}

inline float larger(float a, float b) { return a > b || a != a ? a : b; }  // NaN is the largest
template <typename T>
std::vector<T> folded_sum(const std::vector<T>& wide, int64_t channels) {
  return folded(wide, channels, [](T a, T b) { return a + b; });
}
template <typename T>
std::vector<T> folded_least(const std::vector<T>& wide, int64_t channels) {
  return folded(wide, channels, [](T a, T b) { return std::min(a, b); });
}
template <typename T>
std::vector<T> folded_most(const std::vector<T>& wide, int64_t channels) {
  return folded(wide, channels, [](T a, T b) { return std::max(a, b); });
}
inline std::vector<float> folded_range(const std::vector<float>& wide, int64_t channels) {
  return folded(wide, channels, larger);
}

constexpr float kSmallestScale = 0x1p-118f;  // so that 2^7 / scale is finite

inline Noise moved(const Noise* noise, int64_t start) {
  return noise ? Noise{noise->seed, noise->stream, start} : Noise{};
}

// What codes of a grid are made with.
struct CodeTables {
  CodeTables(const ShiftGrid& grid, const ShiftFormat& f, int64_t period) {
    const float inverse = grid.scale > 0 ? 1.0f / grid.scale : 0.0f;
    const size_t c = grid.exponents.size();
    std::vector<float> factors(c);
    std::vector<int32_t> shifts(c);
    for (size_t i = 0; i < c; ++i) {
      const int e = grid.exponents[i];
      factors[i] = inverse * static_cast<float>(1 << e);
      shifts[i] = f.absorb ? f.groups - 1 - e : 0;
    }
    factor = repeated(factors, period);
    shift = repeated(shifts, period);
    hi = static_cast<float>(f.largest());
    lo = f.is_signed ? -hi : 0.0f;
    powers = f.powers;
  }
  CodeArgs args(const Noise* noise) const { return {factor.data(), shift.data(), lo, hi, noise, powers}; }

  std::vector<float> factor;
  std::vector<int32_t> shift;
  float lo, hi;
  bool powers;
};

// Rows that a cache holds, which begin at whole bytes of bits.
inline int64_t block_rows(int64_t channels) {
  constexpr int64_t kElements = 1 << 15;
  return std::max<int64_t>(kElements / channels / 8, 1) * 8;
}

// Calls body(first element, number of elements) for some blocks of rows at a time.
inline void for_blocks(const Rows& r, const std::function<void(int64_t, int64_t)>& body) {
  const int64_t block = block_rows(r.channels);
  const int64_t blocks = (r.rows + block - 1) / block;
  parallel_for(r.threads, blocks, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * block, last = std::min(r.rows, end * block);
    body(first * r.channels, (last - first) * r.channels);
  });
}

}  // namespace bitstrata
