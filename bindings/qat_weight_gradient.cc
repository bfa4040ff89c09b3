// The weight gradient of a quantization-aware step, for Python.
#include "bitstrata/qat_weight_gradient.h"

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

// Shapes of x (batch, in_h, in_w, in_c), g (batch, out_h, out_w, out_c) and out (out_c, in_c, kernel_h, kernel_w).
void weight_gradient(Codes x, Range range, In<uint16_t, 4> g, In<float, 1> factor, Pair stride, Pair dilation, Pair padding,
                     Out<float, 4> out, const std::string& isa, int threads) {
  const auto size = [](const auto& a, size_t d) { return static_cast<int64_t>(a.shape(d)); };
  ProductShape s{};
  std::tie(s.stride_h, s.stride_w) = stride;
  std::tie(s.dilation_h, s.dilation_w) = dilation;
  std::tie(s.pad_top, s.pad_left) = padding;
  s.pad_bottom = s.pad_top, s.pad_right = s.pad_left;
  s.batch = size(x, 0), s.in_h = size(x, 1), s.in_w = size(x, 2), s.in_c = size(x, 3);
  s.out_h = size(g, 1), s.out_w = size(g, 2), s.out_c = size(g, 3);
  s.kernel_h = size(out, 2), s.kernel_w = size(out, 3);
  if (threads < 1) fail("threads must be at least 1, got " + std::to_string(threads));
  if (size(g, 0) != s.batch) fail("codes and gradient have different batches");
  if (size(out, 0) != s.out_c || size(out, 1) != s.in_c) fail("the weight does not fit codes and gradient");
  if (size(factor, 0) != s.out_c) fail("factor must have one element for each output channel");
  const bool is_signed = x.dtype() == nb::dtype<int8_t>();
  if (!is_signed && x.dtype() != nb::dtype<uint8_t>()) fail("codes must be int8 or uint8");
  const bitstrata::Kernels& kernels = bitstrata::select_kernels(isa);
  const bitstrata::ProductCodes codes{x.data(), is_signed ? DType::s8 : DType::u8, std::get<0>(range),
                                      std::get<1>(range)};
  nb::gil_scoped_release unlocked;
  bitstrata::qat_weight_gradient(kernels, threads, s, codes, g.data(),
                                 factor.data(), out.data());
}

}  // namespace

void bind_qat_weight_gradient(nb::module_& m) {
  m.def("qat_weight_gradient", &weight_gradient, "x"_a.noconvert(), "range"_a, "g"_a.noconvert(), "factor"_a.noconvert(),
        "stride"_a, "dilation"_a, "padding"_a, "out"_a.noconvert(), "isa"_a, "threads"_a);
}
