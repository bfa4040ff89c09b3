// What is proved of integers before anything runs.
#pragma once

#include <cstdint>
#include <vector>

#include "bitstrata/kernels.h"

namespace bitstrata {

// Both included.
struct Bounds {
  int64_t lo, hi;
};

// Of a convolution's sums as int32, for each output channel, whatever the input within the shape's bounds is.
// codes: as of ConvKernel::pack.
std::vector<Bounds> sum_bounds(const ConvShape& s, const int8_t* codes);

}  // namespace bitstrata
