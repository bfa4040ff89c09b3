// The only place where Python meets the engine: arrays in and out, nothing else.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "bitstrata/dispatch.h"
#include "bitstrata/graph.h"
#include "bitstrata/guard.h"
#include "bitstrata/layout.h"
#include "products.h"
#include "profile.h"
#include "training.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using bitstrata::DType;
using bitstrata::Graph;
using bitstrata::Pair;
using bitstrata::Resources;
using bitstrata::Shape;
using bitstrata::Sides;
using bitstrata::Triple;
using bitstrata::Value;

template <typename T, size_t kDims>
using Array = nb::ndarray<const T, nb::ndim<kDims>, nb::c_contig, nb::device::cpu>;
using Batch = nb::ndarray<nb::ro, nb::ndim<4>, nb::c_contig, nb::device::cpu>;

DType parse_dtype(const std::string& name) {
  for (DType t : {DType::u8, DType::s8, DType::i32})
    if (name == bitstrata::name_of(t)) return t;
  throw std::invalid_argument("dtype '" + name + "' is not one of u8, s8, i32");
}

nb::dlpack::dtype dlpack_dtype(DType t) {
  if (t == DType::u8) return nb::dtype<uint8_t>();
  if (t == DType::s8) return nb::dtype<int8_t>();
  return nb::dtype<int32_t>();
}

Shape to_shape(const Triple& s) { return {s[0], s[1], s[2]}; }

int64_t length(const Array<int32_t, 1>& a) { return static_cast<int64_t>(a.shape(0)); }

int conv(Graph& g, const std::string& name, int x, Array<int8_t, 4> codes, int64_t mul, int64_t add, Pair stride,
         Sides padding, Pair dilation, int64_t groups, Array<int32_t, 1> pad_code, const std::string& kernel) {
  std::array<int64_t, 4> dims;
  for (size_t i = 0; i < 4; ++i) dims[i] = static_cast<int64_t>(codes.shape(i));
  return g.conv(
      name, x,
      {codes.data(), dims, pad_code.data(), length(pad_code), mul, add, stride, padding, dilation, groups, kernel});
}

int thresholds(Graph& g, const std::string& name, int x, Array<int32_t, 2> after, Array<int8_t, 1> sign,
               Array<int32_t, 1> base, const std::string& dtype) {
  if (sign.shape(0) != after.shape(1) || base.shape(0) != after.shape(1))
    throw std::invalid_argument("operation '" + name + "': after, sign and base differ in channels");
  return g.thresholds(name, x,
                      {after.data(), sign.data(), base.data(), static_cast<int64_t>(after.shape(0)),
                       static_cast<int64_t>(after.shape(1)), parse_dtype(dtype)});
}

int table(Graph& g, const std::string& name, int x, Array<int32_t, 2> entries, int32_t first,
          const std::string& dtype) {
  return g.table(name, x,
                 {entries.data(), static_cast<int64_t>(entries.shape(0)), static_cast<int64_t>(entries.shape(1)), first,
                  parse_dtype(dtype)});
}

int requant(Graph& g, const std::string& name, int x, Array<int32_t, 1> multiplier, Array<int64_t, 1> bias,
            Array<uint8_t, 1> shift, int64_t lo, int64_t hi, const std::string& dtype) {
  if (bias.shape(0) != multiplier.shape(0) || shift.shape(0) != multiplier.shape(0))
    throw std::invalid_argument("operation '" + name + "': multiplier, bias and shift differ in length");
  return g.requant(name, x,
                   {multiplier.data(), bias.data(), shift.data(), length(multiplier), lo, hi, parse_dtype(dtype)});
}

// uint8 images (N, C, H, W) as (N, H, W, C).
nb::ndarray<nb::numpy, uint8_t> channels_last(Array<uint8_t, 4> x) {
  const size_t shape[4] = {x.shape(0), x.shape(2), x.shape(3), x.shape(1)};
  uint8_t* data = new uint8_t[x.size() > 0 ? x.size() : 1];
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<uint8_t*>(p); });
  const size_t image = shape[1] * shape[2] * shape[3];
  for (size_t i = 0; i < shape[0]; ++i)
    bitstrata::channels_last(x.data() + i * image, static_cast<int64_t>(shape[3]),
                             static_cast<int64_t>(shape[1] * shape[2]), data + i * image);
  return nb::ndarray<nb::numpy, uint8_t>(data, 4, shape, owner);
}

// An array of its own for `batch` images of a value.
nb::ndarray<nb::numpy> allocate(const Value& v, int64_t batch) {
  const int64_t bytes = batch * v.bytes();
  auto memory = std::make_unique<bitstrata::Memory>(bitstrata::allocate(bytes, bitstrata::size_of(v.dtype)));
  uint8_t* data = memory->get();
  nb::capsule owner(memory.get(), [](void* p) noexcept { delete static_cast<bitstrata::Memory*>(p); });
  memory.release();
  const size_t shape[4] = {static_cast<size_t>(batch), static_cast<size_t>(v.shape.h), static_cast<size_t>(v.shape.w),
                           static_cast<size_t>(v.shape.c)};
  return nb::ndarray<nb::numpy>(data, 4, shape, owner, nullptr, dlpack_dtype(v.dtype));
}

void check_batch(const Graph& g, const Batch& x) {
  const Value& v = g.value(0);
  const Shape shape{static_cast<int64_t>(x.shape(1)), static_cast<int64_t>(x.shape(2)),
                    static_cast<int64_t>(x.shape(3))};
  if (x.dtype() != dlpack_dtype(v.dtype) || shape != v.shape)
    throw std::invalid_argument("run: the input must be a " + std::string(bitstrata::name_of(v.dtype)) +
                                " array of shape (N, " + std::to_string(v.shape.h) + ", " + std::to_string(v.shape.w) +
                                ", " + std::to_string(v.shape.c) + ")");
}

// The values of `wanted`, computed for a batch.
std::vector<nb::ndarray<nb::numpy>> run(const Graph& g, Batch x, const std::vector<int>& wanted) {
  check_batch(g, x);
  const int64_t batch = static_cast<int64_t>(x.shape(0));
  std::vector<nb::ndarray<nb::numpy>> results;
  std::vector<void*> destinations(static_cast<size_t>(g.values()), nullptr);
  for (int v : wanted) {
    const Value& value = g.value(v);
    void*& destination = destinations[static_cast<size_t>(v)];
    if (destination != nullptr) throw std::invalid_argument("run: value " + std::to_string(v) + " is wanted twice");
    results.push_back(allocate(value, batch));
    destination = results.back().data();
  }
  {
    nb::gil_scoped_release unlocked;
    g.run(x.data(), batch, destinations);
  }
  return results;
}

}  // namespace

NB_MODULE(_engine, m) {
  m.doc() = "Integer graph executor; see bitstrata_runtime.engine for its use.";
  bind_products(m);
  bind_training(m);
  bind_conv_norm(m);
  bind_layer_norm(m);
  bind_layer_step(m);
  bind_fake_quantize(m);
  bind_qat(m);
  bind_qat_products(m);
  m.def("channels_last", &channels_last, "x"_a.noconvert());
  m.def("available_isas", &bitstrata::available_isas);
  m.def("emulated_isas", &bitstrata::emulated_isas);
  m.def("kernel_table", [] {
    nb::list rows;
    for (const bitstrata::KernelRow& row : bitstrata::kernel_table())
      rows.append(nb::make_tuple(row.isa, row.emulated, row.lacks));
    return rows;
  });
  m.def("chosen_isa", [](const std::string& isa) { return bitstrata::select_kernels(isa).isa; }, "isa"_a);
  nb::class_<Resources>(m, "Resources")
      .def(nb::init<int, int>(), "threads"_a, "callers"_a)
      .def("set_threads", &Resources::set_threads, "threads"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("trim", &Resources::trim, "bytes"_a)
      .def_prop_ro("threads", &Resources::threads)
      .def_prop_ro("callers", &Resources::callers)
      .def_prop_ro("bytes", &Resources::bytes);
  m.def("guard_memory", &bitstrata::guard_memory, "on"_a);
  nb::class_<Graph>(m, "Graph")
      .def(nb::init<const std::string&, std::shared_ptr<Resources>>(), "isa"_a, "resources"_a)
      .def("input", [](Graph& g, Triple shape, const std::string& dtype, int64_t lo,
                       int64_t hi) { return g.input(to_shape(shape), parse_dtype(dtype), lo, hi); })
      .def("conv", &conv, "name"_a, "x"_a, "codes"_a.noconvert(), "mul"_a, "add"_a, "stride"_a, "padding"_a,
           "dilation"_a, "groups"_a, "pad_code"_a.noconvert(), "kernel"_a = "")
      .def("requant", &requant, "name"_a, "x"_a, "multiplier"_a.noconvert(), "bias"_a.noconvert(),
           "shift"_a.noconvert(), "lo"_a, "hi"_a, "dtype"_a)
      .def("thresholds", &thresholds, "name"_a, "x"_a, "after"_a.noconvert(), "sign"_a.noconvert(),
           "base"_a.noconvert(), "dtype"_a)
      .def("table", &table, "name"_a, "x"_a, "entries"_a.noconvert(), "first"_a, "dtype"_a)
      .def("add", &Graph::add, "name"_a, "a"_a, "b"_a, "shift_a"_a, "shift_b"_a)
      .def("clip", &Graph::clip, "name"_a, "x"_a, "lo"_a, "hi"_a)
      .def(
          "max_pool",
          [](Graph& g, const std::string& name, int x, Pair kernel, Pair stride, Sides padding) {
            return g.max_pool(name, x, {kernel, stride, padding});
          },
          "name"_a, "x"_a, "kernel"_a, "stride"_a, "padding"_a)
      .def(
          "sum_pool",
          [](Graph& g, const std::string& name, int x, Pair kernel, Pair stride, Sides padding, int64_t shift) {
            return g.sum_pool(name, x, {kernel, stride, padding}, shift);
          },
          "name"_a, "x"_a, "kernel"_a, "stride"_a, "padding"_a, "shift"_a)
      .def(
          "sum_codes",
          [](Graph& g, const std::string& name, int x, Pair kernel, Pair stride, Sides padding) {
            return g.sum_codes(name, x, {kernel, stride, padding});
          },
          "name"_a, "x"_a, "kernel"_a, "stride"_a, "padding"_a)
      .def("slice", &Graph::slice, "name"_a, "x"_a, "h"_a, "w"_a, "c"_a)
      .def("pad", &Graph::pad, "name"_a, "x"_a, "h"_a, "w"_a, "c"_a)
      .def("flatten", &Graph::flatten, "name"_a, "x"_a)
      .def("tile_bytes", &Graph::tile_bytes, "bytes"_a)
      .def("conv_kernels", &Graph::conv_kernels, "value"_a)
      .def("finish", &Graph::finish, "output"_a)
      .def("run", &run, "x"_a.noconvert(), "wanted"_a)
      .def("shape",
           [](const Graph& g, int v) {
             const Shape& s = g.value(v).shape;
             return nb::make_tuple(s.h, s.w, s.c);
           })
      .def("dtype", [](const Graph& g, int v) { return bitstrata::name_of(g.value(v).dtype); })
      .def("kernel", &Graph::kernel)
      .def_prop_ro("isa", &Graph::isa)
      .def_prop_ro("chunk", &Graph::chunk)
      .def_prop_ro("arena_bytes", &Graph::arena_bytes)
      .def_prop_ro("run_bytes", &Graph::run_bytes)
      .def_prop_ro("constant_bytes", &Graph::constant_bytes);
  bind_profile(m);
}
