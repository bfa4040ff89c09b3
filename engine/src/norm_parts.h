// What the quantized normalization's forward and backward passes share.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "quantize_rows.h"

namespace bitstrata {

// A vector as codes of a symmetric grid over all of it.
struct Symmetric {
  Symmetric(const std::vector<float>& x, float bound) {
    float top = 0;
    for (float v : x) top = larger(top, std::fabs(v));
    step = step_of(top, bound);
    const float inverse = 1.0f / step;
    for (float v : x) codes.push_back(std::min(std::max(std::nearbyintf(v * inverse), -bound), bound));
  }
  static float step_of(float top, float bound) {
    const float step = top / bound;
    return step < kSmallestScale ? 1.0f : step;
  }
  float value(size_t i) const { return codes[i] * step; }

  float step;
  std::vector<float> codes;
};

// The first of the codes -largest to largest for which `holds`, which then holds for all that follow; largest + 1 if
// there is none. The search begins near `guess`, whatever that is.
template <typename Holds>
inline int32_t first_code(int32_t largest, float guess, const Holds& holds) {
  const float inside = std::min(std::max(guess, static_cast<float>(-largest)), static_cast<float>(largest));
  int32_t code = inside == inside ? static_cast<int32_t>(inside) : 0;
  while (code > -largest && holds(code - 1)) --code;
  while (code <= largest && !holds(code)) ++code;
  return code;
}

inline std::vector<float> copied(const float* x, int64_t count) {
  return x ? std::vector<float>(x, x + count) : std::vector<float>();
}

template <typename T>
inline void add_to(std::vector<T>& sum, const std::vector<T>& part) {
  for (size_t i = 0; i < sum.size(); ++i) sum[i] += part[i];
}
template <typename T>
inline void least_of(std::vector<T>& all, const std::vector<T>& part) {
  for (size_t i = 0; i < all.size(); ++i) all[i] = std::min(all[i], part[i]);
}
template <typename T>
inline void most_of(std::vector<T>& all, const std::vector<T>& part) {
  for (size_t i = 0; i < all.size(); ++i) all[i] = std::max(all[i], part[i]);
}

}  // namespace bitstrata
