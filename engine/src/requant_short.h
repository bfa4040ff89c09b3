// Requantization in 32 bits: for results of few levels, a 32-bit multiplication gives the same integers as the 64-bit
// one, and takes a fraction of the time.
#pragma once

#include <cstdint>
#include <vector>

#include "bitstrata/kernels.h"

namespace bitstrata {

// Constants of `RequantArgs::from` and the like.
//
// The exact function of x is monotonic and changes only between its first step and its last, so x may be clamped to
// there. What is left has far fewer bits than x, and both functions agree on every int32 x if they agree on both sides
// of each of the exact one's steps. The addend is taken from the interval that gives this, if there is one; sixteen
// channels that do not all have one are left to the 64-bit arithmetic.
struct ShortRequant {
  ShortRequant() = default;
  explicit ShortRequant(const RequantArgs& args);
  int64_t bytes() const { return static_cast<int64_t>(from.size() * 5 * sizeof(int32_t) + in_short.size()); }
  std::vector<int32_t> from, to, multiplier, addend, shift;
  std::vector<uint8_t> in_short;
};

}  // namespace bitstrata
