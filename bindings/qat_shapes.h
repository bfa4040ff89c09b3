// Arrays of a convolution of quantization-aware training as the engine takes them; anything that does not fit throws.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "arrays.h"
#include "bitstrata/products.h"
#include "bitstrata/qat.h"

namespace bindings {

using Codes = nb::ndarray<nb::ro, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using Pair = std::tuple<int64_t, int64_t>;
using Range = std::tuple<int32_t, int32_t>;

struct Window {
  Pair stride, dilation, padding;
  int64_t groups = 1;
};

// The convolution that reads `in` and has the result `out`, NHWC both. last: channels are last in the weight too.
template <typename In, typename Out, typename Weight>
bitstrata::ProductShape shape_of(const In& in, const Out& out, const Weight& weight, const Window& window,
                                 bool last = false) {
  const auto size = [](const auto& a, size_t d) { return static_cast<int64_t>(a.shape(d)); };
  bitstrata::ProductShape s{};
  std::tie(s.stride_h, s.stride_w) = window.stride;
  std::tie(s.dilation_h, s.dilation_w) = window.dilation;
  std::tie(s.pad_top, s.pad_left) = window.padding;
  s.pad_bottom = s.pad_top, s.pad_right = s.pad_left;
  s.groups = window.groups;
  s.batch = size(in, 0), s.in_h = size(in, 1), s.in_w = size(in, 2), s.in_c = size(in, 3);
  s.out_h = size(out, 1), s.out_w = size(out, 2), s.out_c = size(out, 3);
  s.kernel_h = size(weight, last ? 1 : 2), s.kernel_w = size(weight, last ? 2 : 3);
  if (s.groups < 1) fail("groups must be at least 1, got " + std::to_string(s.groups));
  if (size(out, 0) != s.batch) fail("input and output have different batches");
  if (size(weight, last ? 3 : 1) * s.groups != s.in_c || size(weight, 0) != s.out_c)
    fail("the weight does not fit input and output");
  return s;
}

inline bitstrata::QatWeight weight_of(const In<int8_t, 4>& high, const std::optional<In<int8_t, 4>>& low) {
  for (size_t d = 0; low.has_value() && d < 4; ++d)
    if (low->shape(d) != high.shape(d)) fail("both parts of the weight must have the same shape");
  return {high.data(), low.has_value() ? low->data() : nullptr};
}

inline bitstrata::ProductCodes codes_of(const Codes& x, const Range& range) {
  const bool is_signed = x.dtype() == nb::dtype<int8_t>();
  if (!is_signed && x.dtype() != nb::dtype<uint8_t>()) fail("codes must be int8 or uint8");
  return {x.data(), is_signed ? bitstrata::DType::s8 : bitstrata::DType::u8, std::get<0>(range), std::get<1>(range)};
}

}  // namespace bindings
