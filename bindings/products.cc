// The integer products of a training step for Python: arrays in, results written into arrays that are passed in.
#include "products.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <stdexcept>

#include "bitstrata/dispatch.h"
#include "bitstrata/products.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using bitstrata::DType;
using bitstrata::ProductCodes;
using bitstrata::ProductShape;

template <typename T, size_t kDims>
using In = nb::ndarray<const T, nb::ndim<kDims>, nb::c_contig, nb::device::cpu>;
template <typename T, size_t kDims>
using Out = nb::ndarray<T, nb::ndim<kDims>, nb::c_contig, nb::device::cpu>;
using Codes = nb::ndarray<nb::ro, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using Range = std::tuple<int32_t, int32_t>;
using Pair = std::tuple<int64_t, int64_t>;
using Sides = std::tuple<int64_t, int64_t, int64_t, int64_t>;

// Of one call: which operation, on what, and how the convolution is laid out.
struct Call {
  const char* op;
  const bitstrata::Kernels& kernels;
  int threads;
  ProductShape shape;
};

[[noreturn]] void fail(const char* op, const std::string& message) {
  throw std::invalid_argument("operation '" + std::string(op) + "': " + message);
}

std::string text(const int64_t* dims, size_t count) {
  std::string all;
  for (size_t i = 0; i < count; ++i) all += (i == 0 ? "(" : ", ") + std::to_string(dims[i]);
  return all + ")";
}

template <typename Array>
void expect(const char* op, const char* name, const Array& array, std::initializer_list<int64_t> shape) {
  int64_t found[8] = {};
  bool same = array.ndim() == shape.size();
  for (size_t i = 0; i < array.ndim() && i < 8; ++i) {
    found[i] = static_cast<int64_t>(array.shape(i));
    same = same && found[i] == shape.begin()[i];
  }
  if (!same)
    fail(op, std::string(name) + " has shape " + text(found, array.ndim()) + ", must be " +
                 text(shape.begin(), shape.size()));
}

DType dtype_of(const char* op, const char* name, const Codes& x) {
  if (x.dtype() == nb::dtype<int8_t>()) return DType::s8;
  if (x.dtype() == nb::dtype<uint8_t>()) return DType::u8;
  fail(op, std::string(name) + " must be int8 or uint8");
}

template <typename Array>
int64_t size(const Array& array, size_t i) {
  return static_cast<int64_t>(array.shape(i));
}

// Shapes of x (batch, in_h, in_w, in_c), y (batch, out_h, out_w, out_c) and w (out_c, in_c / groups, kernel_h,
// kernel_w); of each only what the others do not give is believed, the rest is checked.
template <typename X, typename Y, typename W>
Call make_call(const char* op, const std::string& isa, int threads, const X& x, const Y& y, const W& w, Pair stride,
               Pair dilation, Sides padding, int64_t groups) {
  if (threads < 1) fail(op, "threads is " + std::to_string(threads) + ", must be at least 1");
  if (groups < 1) fail(op, "groups is " + std::to_string(groups) + ", must be at least 1");
  ProductShape s{};
  s.batch = size(x, 0), s.in_h = size(x, 1), s.in_w = size(x, 2), s.in_c = size(x, 3);
  s.out_h = size(y, 1), s.out_w = size(y, 2), s.out_c = size(y, 3);
  s.kernel_h = size(w, 2), s.kernel_w = size(w, 3);
  std::tie(s.stride_h, s.stride_w) = stride;
  std::tie(s.dilation_h, s.dilation_w) = dilation;
  std::tie(s.pad_top, s.pad_left, s.pad_bottom, s.pad_right) = padding;
  s.groups = groups;
  if (size(y, 0) != s.batch)
    fail(op, "input and output have batches of " + std::to_string(s.batch) + " and " + std::to_string(size(y, 0)));
  if (size(w, 1) * groups != s.in_c)
    fail(op, "the weight takes " + std::to_string(size(w, 1)) + " channels in each of " + std::to_string(groups) +
                 " groups, the input has " + std::to_string(s.in_c));
  if (size(w, 0) != s.out_c)
    fail(op,
         "the weight has " + std::to_string(size(w, 0)) + " output channels, the output " + std::to_string(s.out_c));
  return {op, bitstrata::select_kernels(isa), threads, s};
}

using Shift = std::optional<In<uint8_t, 1>>;
using Sums = std::optional<Out<int32_t, 4>>;
using Bounds = std::optional<Out<int32_t, 1>>;
using Values = std::optional<Out<float, 4>>;
using Factor = std::optional<In<float, 1>>;

// The optional results and arguments of the two products that have the same ones.
struct Options {
  Shift shift;
  Sums acc;
  Bounds lo, hi;
  Values values;
  Factor factor;
};

ProductCodes to_codes(const Call& call, const char* name, const Codes& x, Range range, const Shift& shift) {
  ProductCodes codes{x.data(), dtype_of(call.op, name, x), std::get<0>(range), std::get<1>(range)};
  if (shift) {
    expect(call.op, "shift", *shift, {size(x, 3)});
    codes.shift = shift->data();
  }
  return codes;
}

bitstrata::ProductResult to_result(const Call& call, int64_t h, int64_t w, int64_t c, const Options& o) {
  bitstrata::ProductResult result;
  if (!o.acc && !o.values) fail(call.op, "neither acc nor values is given, so there is no result");
  if (o.acc) {
    expect(call.op, "acc", *o.acc, {call.shape.batch, h, w, c});
    result.acc = o.acc->data();
  }
  if (o.lo) {
    expect(call.op, "lo", *o.lo, {c});
    result.lo = o.lo->data();
  }
  if (o.hi) {
    expect(call.op, "hi", *o.hi, {c});
    result.hi = o.hi->data();
  }
  if (o.values.has_value() != o.factor.has_value()) fail(call.op, "values and factor must be given together");
  if (o.values) {
    expect(call.op, "values", *o.values, {call.shape.batch, h, w, c});
    expect(call.op, "factor", *o.factor, {c});
    result.values = o.values->data();
    result.factor = o.factor->data();
  }
  return result;
}

// f(acc) or f(values), whichever is given, for their shape.
template <typename F>
void with_result(const char* op, const Options& o, const F& f) {
  if (o.acc)
    f(*o.acc);
  else if (o.values)
    f(*o.values);
  else
    fail(op, "neither acc nor values is given, so there is no result");
}

void conv_forward(Codes x, Range range, In<int8_t, 4> w, Pair stride, Pair dilation, Sides padding, int64_t groups,
                  const std::string& isa, int threads, Shift shift, Sums acc, Bounds lo, Bounds hi, Values values,
                  Factor factor) {
  const Options options{shift, acc, lo, hi, values, factor};
  with_result("conv_forward", options, [&](const auto& y) {
    const Call call = make_call("conv_forward", isa, threads, x, y, w, stride, dilation, padding, groups);
    const ProductShape& s = call.shape;
    const ProductCodes codes = to_codes(call, "x", x, range, shift);
    const bitstrata::ProductResult result = to_result(call, s.out_h, s.out_w, s.out_c, options);
    nb::gil_scoped_release unlocked;
    bitstrata::conv_forward(call.kernels, threads, s, codes, w.data(), result);
  });
}

void conv_input_grad(Codes g, Range range, In<int8_t, 4> w, Pair stride, Pair dilation, Sides padding, int64_t groups,
                     const std::string& isa, int threads, Shift shift, Sums acc, Bounds lo, Bounds hi, Values values,
                     Factor factor) {
  const Options options{shift, acc, lo, hi, values, factor};
  with_result("conv_input_grad", options, [&](const auto& x) {
    const Call call = make_call("conv_input_grad", isa, threads, x, g, w, stride, dilation, padding, groups);
    const ProductShape& s = call.shape;
    const ProductCodes codes = to_codes(call, "g", g, range, shift);
    const bitstrata::ProductResult result = to_result(call, s.in_h, s.in_w, s.in_c, options);
    nb::gil_scoped_release unlocked;
    bitstrata::conv_input_grad(call.kernels, threads, s, codes, w.data(), result);
  });
}

void conv_weight_grad(In<int8_t, 4> g, Range g_range, Codes x, Range x_range, Pair stride, Pair dilation, Sides padding,
                      int64_t groups, const std::string& isa, int threads, std::optional<Out<int64_t, 4>> gw,
                      Values values, std::optional<In<double, 1>> out_factor, std::optional<In<double, 1>> in_factor) {
  const char* op = "conv_weight_grad";
  bitstrata::WeightGradResult result;
  const auto run = [&](const auto& w) {
    const Call call = make_call(op, isa, threads, x, g, w, stride, dilation, padding, groups);
    const ProductShape& s = call.shape;
    if (gw) {
      expect(op, "gw", *gw, {s.out_c, size(w, 1), s.kernel_h, s.kernel_w});
      result.gw = gw->data();
    }
    if (values) {
      if (!out_factor || !in_factor) fail(op, "values needs out_factor and in_factor");
      expect(op, "values", *values, {s.out_c, size(w, 1), s.kernel_h, s.kernel_w});
      expect(op, "out_factor", *out_factor, {s.out_c});
      expect(op, "in_factor", *in_factor, {s.in_c});
      result.values = values->data();
      result.out_factor = out_factor->data();
      result.in_factor = in_factor->data();
    }
    const ProductCodes codes = to_codes(call, "x", x, x_range, {});
    const ProductCodes gradient{g.data(), DType::s8, std::get<0>(g_range), std::get<1>(g_range)};
    nb::gil_scoped_release unlocked;
    bitstrata::conv_weight_grad(call.kernels, threads, s, gradient, codes, result);
  };
  if (gw)
    run(*gw);
  else if (values)
    run(*values);
  else
    fail(op, "neither gw nor values is given, so there is no result");
}

std::tuple<std::string, std::string> product_kernels(const std::string& isa, Pair size, Pair channels, Pair kernel,
                                                     int64_t groups, Range range, Range weights) {
  ProductShape s{};
  s.batch = 1;
  std::tie(s.in_h, s.in_w) = size;
  std::tie(s.in_c, s.out_c) = channels;
  std::tie(s.kernel_h, s.kernel_w) = kernel;
  s.groups = groups;
  s.out_h = s.in_h - s.kernel_h + 1, s.out_w = s.in_w - s.kernel_w + 1;
  bitstrata::check_product("product_kernels", s);
  const bitstrata::Kernels& row = bitstrata::select_kernels(isa);
  const DType dtype = std::get<0>(range) < 0 ? DType::s8 : DType::u8;
  return {bitstrata::forward_kernel(row, s, dtype, std::get<0>(range), std::get<1>(range), std::get<0>(weights),
                                    std::get<1>(weights)),
          bitstrata::weight_grad_kernel(row, s, dtype, std::get<0>(range), std::get<1>(range), std::get<0>(weights),
                                        std::get<1>(weights))};
}

}  // namespace

void bind_products(nb::module_& m) {
  m.def("conv_forward", &conv_forward, "x"_a.noconvert(), "range"_a, "w"_a.noconvert(), "stride"_a, "dilation"_a,
        "padding"_a, "groups"_a, "isa"_a, "threads"_a, nb::kw_only(), "shift"_a.noconvert() = nb::none(),
        "acc"_a.noconvert() = nb::none(), "lo"_a.noconvert() = nb::none(), "hi"_a.noconvert() = nb::none(),
        "values"_a.noconvert() = nb::none(), "factor"_a.noconvert() = nb::none());
  m.def("conv_input_grad", &conv_input_grad, "g"_a.noconvert(), "range"_a, "w"_a.noconvert(), "stride"_a, "dilation"_a,
        "padding"_a, "groups"_a, "isa"_a, "threads"_a, nb::kw_only(), "shift"_a.noconvert() = nb::none(),
        "acc"_a.noconvert() = nb::none(), "lo"_a.noconvert() = nb::none(), "hi"_a.noconvert() = nb::none(),
        "values"_a.noconvert() = nb::none(), "factor"_a.noconvert() = nb::none());
  m.def("conv_weight_grad", &conv_weight_grad, "g"_a.noconvert(), "g_range"_a, "x"_a.noconvert(), "x_range"_a,
        "stride"_a, "dilation"_a, "padding"_a, "groups"_a, "isa"_a, "threads"_a, nb::kw_only(),
        "gw"_a.noconvert() = nb::none(), "values"_a.noconvert() = nb::none(), "out_factor"_a.noconvert() = nb::none(),
        "in_factor"_a.noconvert() = nb::none());
  m.def("product_kernels", &product_kernels, "isa"_a, "size"_a, "channels"_a, "kernel"_a, "groups"_a, "range"_a,
        "weights"_a);
}
