// How kernels that multiply u8 by s8 see weights and inputs. See pointwise.h for the unnamed namespace.
#pragma once

#include <cstdint>

#include "bitstrata/kernels.h"

namespace bitstrata {
namespace {

// Weights mul * c + add are packed as they are where all fit s8, else as codes.
struct WeightForm {
  explicit WeightForm(const ConvShape& s) {
    const int32_t p = s.mul * s.code_lo + s.add, q = s.mul * s.code_hi + s.add;
    whole = (p < q ? p : q) >= INT8_MIN && (p < q ? q : p) <= INT8_MAX;
    pack_mul = whole ? s.mul : 1;
    pack_add = whole ? s.add : 0;
    mul = whole ? 1 : s.mul;
    add = whole ? 0 : s.add;
    offset = s.input_lo >= 0 ? 0 : -s.input_lo;
  }
  bool whole;                  // weights are packed as they are
  int32_t pack_mul, pack_add;  // packed weight = pack_mul * c + pack_add
  int32_t mul, add;            // weight = mul * packed + add
  int32_t offset;              // staged activation = a + offset, not negative
};

}  // namespace
}  // namespace bitstrata
