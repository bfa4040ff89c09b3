// Forms of requantization that take a fraction of the time of 64-bit arithmetic and give the same integers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "bitstrata/kernels.h"
#include "bounds.h"

namespace bitstrata {

// Constants of `RequantArgs::form` and the like.
//
// low: the exact function of x is monotonic and changes only between its first step and its last, so x may be clamped
// to there. What is left has far fewer bits than x, and both functions agree on every int32 x if they agree on both
// sides of each of the exact one's steps. The addend is taken from the interval that gives this, if there is one; for
// many levels, whose steps lie close, there seldom is.
// high: a shift by 32 and more takes nothing from the lower 32 bits of x * multiplier + bias, and what it takes from
// the upper ones is an int32, which is clamped in 32 bits.
// narrow: bounds of x show that the result of a smaller shift is an int32, so that its upper bits need no look.
struct RequantForms {
  RequantForms() = default;
  RequantForms(const RequantArgs& args, const std::vector<Bounds>& x);  // of each channel
  void give(RequantArgs* args) const;
  bool in_registers() const;  // a convolution can do this: all channels have the low or all the high form
  int64_t bytes() const;

  std::vector<RequantForm> form;
  std::vector<int32_t> from, to, factor, addend, places;

 private:
  bool set_low(const RequantArgs& args, std::size_t first, std::size_t last);
  bool set_high(const RequantArgs& args, std::size_t first, std::size_t last);
  bool set_narrow(const RequantArgs& args, const std::vector<Bounds>& x, std::size_t first, std::size_t last);
};

}  // namespace bitstrata
