// How kernels that multiply s8 by s8 see weights and inputs. See ../common/pointwise.h for the unnamed namespace.
#pragma once

#include "../common/weight_form.h"

namespace bitstrata {
namespace {

// Staged activations are a + offset, from -128 to 127: what does not fit begins at -128.
inline WeightForm signed_form(const ConvShape& s) {
  WeightForm form(s);
  form.offset = s.input_hi > INT8_MAX ? INT8_MIN - s.input_lo : 0;
  return form;
}

// The largest magnitude of a product of a packed weight and a staged activation.
inline int32_t largest_product(const ConvShape& s, const WeightForm& form) {
  const auto magnitude = [](int32_t a, int32_t b) {
    a = a < 0 ? -a : a, b = b < 0 ? -b : b;
    return a < b ? b : a;
  };
  return magnitude(form.pack_mul * s.code_lo + form.pack_add, form.pack_mul * s.code_hi + form.pack_add) *
         magnitude(s.input_lo + form.offset, s.input_hi + form.offset);
}

// How many products an int16 holds, at least one.
inline int64_t products_in_int16(const ConvShape& s, const WeightForm& form) {
  const int32_t product = largest_product(s, form);
  return INT16_MAX / (product > 0 ? product : 1);
}

}  // namespace
}  // namespace bitstrata
