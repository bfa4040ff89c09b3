#include "bounds.h"

#include <algorithm>
#include <limits>

namespace bitstrata {
namespace {

constexpr int64_t kTogether = 1 << 15;  // weights, which are int16, that an int32 can sum
constexpr Bounds kInt32 = {std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max()};

// The sums of the weights of either sign.
struct Signed {
  int64_t positive = 0, negative = 0;
  void add(const ConvShape& s, const int8_t* codes, int64_t count) {
    int32_t above = 0, below = 0;  // a loop that compilers vectorize
    for (int64_t i = 0; i < count; ++i) {
      const int16_t weight = static_cast<int16_t>(s.mul * codes[i] + s.add);
      above += std::max<int16_t>(weight, 0);
      below += std::min<int16_t>(weight, 0);
    }
    positive += above, negative += below;
  }
};

}  // namespace

std::vector<Bounds> sum_bounds(const ConvShape& s, const int8_t* codes) {
  std::vector<Bounds> bounds(static_cast<size_t>(s.out_c));
  const int64_t weights = s.group_in() * s.kernel_h * s.kernel_w;
  for (Bounds& b : bounds) {
    Signed sums;
    for (int64_t i = 0; i < weights; i += kTogether) sums.add(s, codes + i, std::min(kTogether, weights - i));
    codes += weights;
    b = {sums.positive * s.input_lo + sums.negative * s.input_hi,
         sums.positive * s.input_hi + sums.negative * s.input_lo};
    if (b.lo < kInt32.lo || b.hi > kInt32.hi) b = kInt32;  // the sums may wrap
  }
  return bounds;
}

}  // namespace bitstrata
