// Products of floats in the backward pass of quantization-aware training, for Python.
#include "bitstrata/qat_products.h"

#include "qat_shapes.h"
#include "training.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace bindings;

namespace {

// g and out: bfloat16 as uint16.
void input_gradient(In<uint16_t, 4> g, In<int8_t, 4> high, std::optional<In<int8_t, 4>> low, Pair stride, Pair dilation,
                    Pair padding, Out<uint16_t, 4> out, const std::string& isa, int threads) {
  if (threads < 1) fail("threads must be at least 1, got " + std::to_string(threads));
  const bitstrata::ProductShape s = shape_of(out, g, high, {stride, dilation, padding});
  const bitstrata::QatWeight weight = weight_of(high, low);
  const bitstrata::Kernels& kernels = bitstrata::select_kernels(isa);
  nb::gil_scoped_release unlocked;
  bitstrata::qat_input_gradient(kernels, threads, s, g.data(), weight, out.data());
}

// x: codes within `range`; g: bfloat16 as uint16.
void weight_gradient(Codes x, Range range, In<uint16_t, 4> g, In<float, 1> factor, Pair stride, Pair dilation,
                     Pair padding, bool channels_last, Out<float, 4> out, const std::string& isa, int threads) {
  if (threads < 1) fail("threads must be at least 1, got " + std::to_string(threads));
  const bitstrata::ProductShape s = shape_of(x, g, out, {stride, dilation, padding}, channels_last);
  if (factor.shape(0) != g.shape(3)) fail("factor must have one element for each output channel");
  const bitstrata::ProductCodes codes = codes_of(x, range);
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
