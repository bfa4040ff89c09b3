// Weights and inputs as kernels by bit-planes see them: unsigned codes from 0 up. See pointwise.h for the unnamed
// namespace.
//
// With u = code - code_lo and v = input - input_lo, a sum of weight * input over a window of `taps` inputs is
//   mul * sum(u v) + base * sum(v) + input_lo * (mul * sum(u) + base * taps),   base = mul * code_lo + add,
// modulo 2^32, where sum(u v) comes from the planes, sum(v) from the input alone and the rest from the weights alone.
#pragma once

#include <cstdint>

#include "bitstrata/kernels.h"

namespace bitstrata {
namespace {

// Bits of the codes 0 to `largest`, at least one.
inline int bits_of(int32_t largest) {
  int bits = 1;
  while (largest >> bits != 0) ++bits;
  return bits;
}

struct CodePlanes {
  explicit CodePlanes(const ConvShape& s)
      : weight_bits(bits_of(s.code_hi - s.code_lo)),
        input_bits(bits_of(s.input_hi - s.input_lo)),
        base(s.mul * s.code_lo + s.add) {}

  // What is added to every result of an output channel, whose codes' u have the sum `u_sum`.
  int32_t correction(const ConvShape& s, int64_t u_sum) const {
    const int64_t taps = s.group_in() * s.kernel_h * s.kernel_w;
    const uint32_t weights = static_cast<uint32_t>(s.mul) * static_cast<uint32_t>(u_sum) +
                             static_cast<uint32_t>(base) * static_cast<uint32_t>(taps);
    return static_cast<int32_t>(static_cast<uint32_t>(s.input_lo) * weights);
  }

  int weight_bits, input_bits;
  int32_t base;
};

}  // namespace
}  // namespace bitstrata
