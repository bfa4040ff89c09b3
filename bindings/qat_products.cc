// Products of floats in the backward pass of quantization-aware training, for Python.
#include "bitstrata/qat_products.h"

#include "arrays.h"
#include "training.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace bindings;

namespace {

using bitstrata::DType;
using bitstrata::ProductShape;
using Codes = nb::ndarray<nb::ro, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using Pair = std::tuple<int64_t, int64_t>;
using Range = std::tuple<int32_t, int32_t>;

// The convolution that reads `in` and has the result `out`, NHWC both. last: channels are last in the weight too.
template <typename In, typename Out, typename Weight>
ProductShape shape_of(const In& in, const Out& out, const Weight& weight, Pair stride, Pair dilation, Pair padding,
                      bool last = false) {
  const auto size = [](const auto& a, size_t d) { return static_cast<int64_t>(a.shape(d)); };
  ProductShape s{};
  std::tie(s.stride_h, s.stride_w) = stride;
  std::tie(s.dilation_h, s.dilation_w) = dilation;
  std::tie(s.pad_top, s.pad_left) = padding;
  s.pad_bottom = s.pad_top, s.pad_right = s.pad_left;
  s.batch = size(in, 0), s.in_h = size(in, 1), s.in_w = size(in, 2), s.in_c = size(in, 3);
  s.out_h = size(out, 1), s.out_w = size(out, 2), s.out_c = size(out, 3);
  s.kernel_h = size(weight, last ? 1 : 2), s.kernel_w = size(weight, last ? 2 : 3);
  if (size(out, 0) != s.batch) fail("input and output have different batches");
  if (size(weight, last ? 3 : 1) != s.in_c || size(weight, 0) != s.out_c)
    fail("the weight does not fit input and output");
  return s;
}

// g and out: bfloat16 as uint16.
void input_gradient(In<uint16_t, 4> g, In<int8_t, 4> high, std::optional<In<int8_t, 4>> low, Pair stride, Pair dilation,
                    Pair padding, Out<uint16_t, 4> out, const std::string& isa, int threads) {
  if (threads < 1) fail("threads must be at least 1, got " + std::to_string(threads));
  const ProductShape s = shape_of(out, g, high, stride, dilation, padding);
  for (size_t d = 0; low.has_value() && d < 4; ++d)
    if (low->shape(d) != high.shape(d)) fail("both parts of the weight must have the same shape");
  const bitstrata::Kernels& kernels = bitstrata::select_kernels(isa);
  nb::gil_scoped_release unlocked;
  bitstrata::qat_input_gradient(kernels, threads, s, g.data(), {high.data(), low.has_value() ? low->data() : nullptr},
                                out.data());
}

// x: codes within `range`; g: bfloat16 as uint16.
void weight_gradient(Codes x, Range range, In<uint16_t, 4> g, In<float, 1> factor, Pair stride, Pair dilation,
                     Pair padding, bool channels_last, Out<float, 4> out, const std::string& isa, int threads) {
  if (threads < 1) fail("threads must be at least 1, got " + std::to_string(threads));
  const ProductShape s = shape_of(x, g, out, stride, dilation, padding, channels_last);
  if (factor.shape(0) != g.shape(3)) fail("factor must have one element for each output channel");
  const bool is_signed = x.dtype() == nb::dtype<int8_t>();
  if (!is_signed && x.dtype() != nb::dtype<uint8_t>()) fail("codes must be int8 or uint8");
  const bitstrata::ProductCodes codes{x.data(), is_signed ? DType::s8 : DType::u8, std::get<0>(range),
                                      std::get<1>(range)};
  const bitstrata::Kernels& kernels = bitstrata::select_kernels(isa);
  nb::gil_scoped_release unlocked;
  bitstrata::qat_weight_gradient(kernels, threads, s, codes, g.data(), factor.data(), channels_last, out.data());
}

}  // namespace

void bind_qat_products(nb::module_& m) {
  m.def(
      "float_products",
      [](const std::string& isa) { return bitstrata::float_products_of(bitstrata::select_kernels(isa)).name; },
      "isa"_a);
  m.def("qat_input_gradient", &input_gradient, "g"_a.noconvert(), "high"_a.noconvert(), "low"_a.noconvert().none(),
        "stride"_a, "dilation"_a, "padding"_a, "out"_a.noconvert(), "isa"_a, "threads"_a);
  m.def("qat_weight_gradient", &weight_gradient, "x"_a.noconvert(), "range"_a, "g"_a.noconvert(),
        "factor"_a.noconvert(), "stride"_a, "dilation"_a, "padding"_a, "channels_last"_a, "out"_a.noconvert(), "isa"_a,
        "threads"_a);
}
