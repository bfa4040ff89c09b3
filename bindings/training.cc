#include "training.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>

#include <optional>
#include <stdexcept>
#include <tuple>
#include <variant>

#include "bitstrata/dispatch.h"
#include "bitstrata/quantize.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using bitstrata::Noise;
using bitstrata::Norm;
using bitstrata::NormOptions;
using bitstrata::RealTensor;
using bitstrata::Rows;
using bitstrata::ShiftFormat;
using bitstrata::ShiftGrid;

template <typename T, size_t kDims>
using In = nb::ndarray<const T, nb::ndim<kDims>, nb::c_contig, nb::device::cpu>;
template <typename T, size_t kDims>
using Out = nb::ndarray<T, nb::ndim<kDims>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;  // rows, channels
using Vector = std::optional<In<float, 1>>;
using NoiseKey = std::optional<std::tuple<uint64_t, uint64_t>>;  // seed, stream
using Grid = std::tuple<float, nb::ndarray<nb::numpy, uint8_t>>;

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument(what); }

template <typename T>
nb::ndarray<nb::numpy, T> array(const std::vector<T>& values) {
  T* data = new T[values.size() + 1];
  std::copy(values.begin(), values.end(), data);
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  const size_t shape[1] = {values.size()};
  return nb::ndarray<nb::numpy, T>(data, 1, shape, owner);
}

Rows rows_of(const std::string& isa, int threads, const Matrix& x) {
  const Rows rows{bitstrata::select_kernels(isa), threads, static_cast<int64_t>(x.shape(0)),
                  static_cast<int64_t>(x.shape(1))};
  if (threads < 1) fail("threads must be at least 1, got " + std::to_string(threads));
  if (rows.rows < 1 || rows.channels < 1) fail("an array without elements has no range");
  return rows;
}

// float32, bfloat16 as int16, or int32 with `scale`.
RealTensor real(const Matrix& x, const Vector& scale) {
  RealTensor t;
  if (x.dtype() == nb::dtype<float>())
    t.f32 = static_cast<const float*>(x.data());
  else if (x.dtype() == nb::dtype<int16_t>())
    t.bf16 = static_cast<const uint16_t*>(x.data());
  else if (x.dtype() == nb::dtype<int32_t>())
    t.i32 = static_cast<const int32_t*>(x.data());
  else
    fail("an array must be float32, bfloat16 (as int16) or int32");
  if (scale.has_value()) {
    if (scale->shape(0) != x.shape(1)) fail("scale must have one element for each channel");
    t.scale = scale->data();
  }
  return t;
}

template <typename Array>
void check_size(const char* name, const Array& a, const Rows& r) {
  if (a.shape(0) != static_cast<size_t>(r.rows) || a.shape(1) != static_cast<size_t>(r.channels))
    fail(std::string(name) + " must have the shape of the tensor, (" + std::to_string(r.rows) + ", " +
         std::to_string(r.channels) + ")");
}

void check_bits(const Out<uint8_t, 1>& bits, const Rows& r) {
  if (bits.shape(0) != static_cast<size_t>((r.elements() + 7) / 8)) fail("bits must have one bit for each element");
}

ShiftFormat format(int bits, int groups, bool is_signed, bool absorb) {
  if (bits < 2 || bits > 8) fail("bits must be in 2..8, got " + std::to_string(bits));
  if (groups < 1 || groups > 8) fail("groups must be in 1..8, got " + std::to_string(groups));
  if (absorb && bits + groups - 1 > 8)
    fail("codes of " + std::to_string(bits) + " bits have no room for the shifts of " + std::to_string(groups) +
         " groups in 8 bits");
  return {bits, groups, is_signed, absorb};
}

std::optional<Noise> noise_of(const NoiseKey& key) {
  if (!key.has_value()) return std::nullopt;
  return Noise{std::get<0>(*key), std::get<1>(*key), 0};
}
const Noise* pointer(const std::optional<Noise>& noise) { return noise.has_value() ? &*noise : nullptr; }

Grid grid_of(const ShiftGrid& g) { return {g.scale, array(g.exponents)}; }

Grid shift_codes(Matrix x, int bits, int groups, bool is_signed, bool absorb, NoiseKey key, Out<uint8_t, 2> out,
                 const std::string& isa, int threads) {
  const Rows rows = rows_of(isa, threads, x);
  const ShiftFormat f = format(bits, groups, is_signed, absorb);
  check_size("out", out, rows);
  const RealTensor t = real(x, std::nullopt);
  if (t.i32 != nullptr) fail("the tensor must be float32 or bfloat16");
  const auto noise = noise_of(key);
  ShiftGrid grid;
  {
    nb::gil_scoped_release unlocked;
    grid = bitstrata::shift_codes(rows, t, f, pointer(noise), out.data());
  }
  return grid_of(grid);
}

bool weight_codes(In<float, 3> weight, int64_t groups, int bits, bool by_output, Out<int8_t, 3> codes,
                  Out<float, 1> scale, const std::string& isa, int threads) {
  const bitstrata::WeightShape s{static_cast<int64_t>(weight.shape(0)), static_cast<int64_t>(weight.shape(1)),
                                 static_cast<int64_t>(weight.shape(2)), groups};
  format(bits, 1, true, false);
  if (s.elements() < 1) fail("a weight without elements has no range");
  if (groups < 1 || s.out % groups != 0)
    fail("groups " + std::to_string(groups) + " does not divide the " + std::to_string(s.out) + " output channels");
  for (size_t d = 0; d < 3; ++d)
    if (codes.shape(d) != weight.shape(d)) fail("codes must have the shape of the weight");
  if (scale.shape(0) != static_cast<size_t>(by_output ? s.out : s.in * groups))
    fail("scale must have one element for each channel");
  const bitstrata::Kernels& kernels = bitstrata::select_kernels(isa);
  nb::gil_scoped_release unlocked;
  return bitstrata::weight_codes(kernels, threads, weight.data(), s, bits, by_output, codes.data(), scale.data());
}

nb::ndarray<nb::numpy, float> channel_ranges(Matrix x, const std::string& isa, int threads) {
  const Rows rows = rows_of(isa, threads, x);
  const RealTensor t = real(x, std::nullopt);
  if (t.i32 != nullptr) fail("the tensor must be float32 or bfloat16");
  std::vector<float> ranges;
  {
    nb::gil_scoped_release unlocked;
    ranges = bitstrata::channel_ranges(rows, t);
  }
  return array(ranges);
}

nb::ndarray<nb::numpy, float> join(Matrix x, Vector scale, std::optional<In<float, 2>> add,
                                   std::optional<Out<uint8_t, 1>> bits, Out<float, 2> out, const std::string& isa,
                                   int threads) {
  const Rows rows = rows_of(isa, threads, x);
  const RealTensor t = real(x, scale);
  if (t.bf16 != nullptr) fail("the tensor must be float32 or int32");
  check_size("out", out, rows);
  if (add.has_value()) check_size("add", *add, rows);
  if (bits.has_value()) check_bits(*bits, rows);
  std::vector<float> ranges;
  {
    nb::gil_scoped_release unlocked;
    ranges = bitstrata::join(rows, t, add.has_value() ? add->data() : nullptr,
                             bits.has_value() ? bits->data() : nullptr, out.data());
  }
  return array(ranges);
}

const float* channels_or_null(const char* name, const Vector& v, size_t channels) {
  if (!v.has_value()) return nullptr;
  if (v->shape(0) != channels) fail(std::string(name) + " must have one element for each channel");
  return v->data();
}

// Keeps what Norm refers to; arrays of codes stay with the caller.
class BoundNorm {
 public:
  BoundNorm(int64_t rows, int64_t channels, int bits, bool l2, double eps, double factor, Vector weight, Vector bias,
            const std::string& isa, int threads)
      : norm_(make(rows, channels, bits, l2, eps, factor, weight, bias, isa, threads)) {}

  bool forward(Matrix x, Vector scale, std::optional<In<int32_t, 1>> least, std::optional<In<int32_t, 1>> most,
               Out<int8_t, 2> codes) {
    const Rows& r = norm_.rows();
    check_size("x", x, r);
    check_size("codes", codes, r);
    const RealTensor t = real(x, scale);
    if (t.bf16 != nullptr) fail("the tensor must be float32 or int32");
    if (t.i32 != nullptr && !(least.has_value() && most.has_value() && scale.has_value()))
      fail("int32 needs scale, least and most");
    for (const auto* v : {&least, &most})
      if (v->has_value() && (*v)->shape(0) != static_cast<size_t>(r.channels)) fail("one bound for each channel");
    nb::gil_scoped_release unlocked;
    ready_ = norm_.forward(t, least.has_value() ? least->data() : nullptr, most.has_value() ? most->data() : nullptr,
                           codes.data());
    return ready_;
  }

  Grid to_codes(In<int8_t, 2> codes, bool rectify, int bits, int groups, bool is_signed, bool absorb, NoiseKey key,
                Out<uint8_t, 2> out) const {
    check(codes);
    check_size("out", out, norm_.rows());
    const ShiftFormat f = format(bits, groups, is_signed, absorb);
    const auto noise = noise_of(key);
    ShiftGrid grid;
    {
      nb::gil_scoped_release unlocked;
      grid = norm_.to_codes(codes.data(), rectify, f, pointer(noise), out.data());
    }
    return grid_of(grid);
  }

  nb::ndarray<nb::numpy, float> to_f32(In<int8_t, 2> codes, bool rectify, std::optional<In<float, 2>> add,
                                       Out<float, 2> out, std::optional<Out<uint8_t, 1>> bits) const {
    check(codes);
    check_size("out", out, norm_.rows());
    if (add.has_value()) check_size("add", *add, norm_.rows());
    if (bits.has_value()) check_bits(*bits, norm_.rows());
    std::vector<float> ranges;
    {
      nb::gil_scoped_release unlocked;
      ranges = norm_.to_f32(codes.data(), rectify, add.has_value() ? add->data() : nullptr, out.data(),
                            bits.has_value() ? bits->data() : nullptr);
    }
    return array(ranges);
  }

  bool backward(Matrix gradient, Vector scale, std::optional<float> range, In<int8_t, 2> codes, bool rectify, NoiseKey key, Out<int8_t, 2> out) {
    check(codes);
    check_size("gradient", gradient, norm_.rows());
    check_size("out", out, norm_.rows());
    const RealTensor t = real(gradient, scale);
    if (t.bf16 != nullptr) fail("the gradient must be float32 or int32");
    const auto noise = noise_of(key);
    nb::gil_scoped_release unlocked;
    differentiated_ = norm_.backward(t, range.has_value() ? &*range : nullptr, codes.data(), rectify, pointer(noise), out.data());
    return differentiated_;
  }

  void gradient_f32(In<int8_t, 2> gradient, In<int8_t, 2> codes, Out<float, 2> out) const {
    check_gradient(gradient, codes);
    check_size("out", out, norm_.rows());
    nb::gil_scoped_release unlocked;
    norm_.gradient_f32(gradient.data(), codes.data(), out.data());
  }

  Grid gradient_codes(In<int8_t, 2> gradient, In<int8_t, 2> codes, int bits, int groups, bool absorb, NoiseKey key,
                      Out<uint8_t, 2> out) const {
    check_gradient(gradient, codes);
    check_size("out", out, norm_.rows());
    const ShiftFormat f = format(bits, groups, true, absorb);
    const auto noise = noise_of(key);
    ShiftGrid grid;
    {
      nb::gil_scoped_release unlocked;
      grid = norm_.gradient_codes(gradient.data(), codes.data(), f, pointer(noise), out.data());
    }
    return grid_of(grid);
  }

  const Norm& norm() const { return norm_; }

 private:
  static Norm make(int64_t rows, int64_t channels, int bits, bool l2, double eps, double factor, const Vector& weight,
                   const Vector& bias, const std::string& isa, int threads) {
    if (rows < 1 || channels < 1) fail("a normalization needs at least one row and one channel");
    if (bits < 2 || bits > 8) fail("bits must be in 2..8, got " + std::to_string(bits));
    if (threads < 1) fail("threads must be at least 1, got " + std::to_string(threads));
    NormOptions options;
    options.bits = bits;
    options.l2 = l2;
    options.eps = eps;
    options.factor = factor;
    const size_t c = static_cast<size_t>(channels);
    return Norm({bitstrata::select_kernels(isa), threads, rows, channels}, options,
                channels_or_null("weight", weight, c), channels_or_null("bias", bias, c));
  }

  void check(const In<int8_t, 2>& codes) const {
    if (!ready_) fail("forward comes first");
    check_size("codes", codes, norm_.rows());
  }
  void check_gradient(const In<int8_t, 2>& gradient, const In<int8_t, 2>& codes) const {
    if (!differentiated_) fail("backward comes first");
    check(codes);
    check_size("gradient", gradient, norm_.rows());
  }

  Norm norm_;
  bool ready_ = false, differentiated_ = false;
};

}  // namespace

void bind_training(nb::module_& m) {
  nb::set_leak_warnings(false);  // a graph of gradients that outlives the interpreter holds a Norm
  m.def("channel_ranges", &channel_ranges, "x"_a.noconvert(), "isa"_a, "threads"_a);
  m.def("weight_codes", &weight_codes, "weight"_a.noconvert(), "groups"_a, "bits"_a, "by_output"_a,
        "codes"_a.noconvert(), "scale"_a.noconvert(), "isa"_a, "threads"_a);
  m.def("shift_codes", &shift_codes, "x"_a.noconvert(), "bits"_a, "groups"_a, "signed"_a, "absorb"_a,
        "noise"_a.none(), "out"_a.noconvert(), "isa"_a, "threads"_a);
  m.def("join", &join, "x"_a.noconvert(), "scale"_a.noconvert().none(), "add"_a.noconvert().none(),
        "bits"_a.noconvert().none(), "out"_a.noconvert(), "isa"_a, "threads"_a);
  nb::class_<BoundNorm>(m, "Norm")
      .def(nb::init<int64_t, int64_t, int, bool, double, double, Vector, Vector, const std::string&, int>(), "rows"_a,
           "channels"_a, "bits"_a, "l2"_a, "eps"_a, "factor"_a, "weight"_a.noconvert().none(),
           "bias"_a.noconvert().none(), "isa"_a, "threads"_a)
      .def("forward", &BoundNorm::forward, "x"_a.noconvert(), "scale"_a.noconvert().none(),
           "least"_a.noconvert().none(), "most"_a.noconvert().none(), "codes"_a.noconvert())
      .def("to_codes", &BoundNorm::to_codes, "codes"_a.noconvert(), "rectify"_a, "bits"_a, "groups"_a, "signed"_a,
           "absorb"_a, "noise"_a.none(), "out"_a.noconvert())
      .def("to_f32", &BoundNorm::to_f32, "codes"_a.noconvert(), "rectify"_a, "add"_a.noconvert().none(),
           "out"_a.noconvert(), "bits"_a.noconvert().none())
      .def("backward", &BoundNorm::backward, "gradient"_a.noconvert(), "scale"_a.noconvert().none(),
           "range"_a.none(), "codes"_a.noconvert(), "rectify"_a, "noise"_a.none(), "out"_a.noconvert())
      .def("gradient_f32", &BoundNorm::gradient_f32, "gradient"_a.noconvert(), "codes"_a.noconvert(),
           "out"_a.noconvert())
      .def("gradient_codes", &BoundNorm::gradient_codes, "gradient"_a.noconvert(), "codes"_a.noconvert(), "bits"_a,
           "groups"_a, "absorb"_a, "noise"_a.none(), "out"_a.noconvert())
      .def_prop_ro("mean", [](const BoundNorm& n) { return array(n.norm().mean()); },
                   nb::rv_policy::move)
      .def_prop_ro("deviation", [](const BoundNorm& n) { return array(n.norm().deviation()); },
                   nb::rv_policy::move)
      .def_prop_ro("weight_gradient", [](const BoundNorm& n) { return array(n.norm().weight_gradient()); },
                   nb::rv_policy::move)
      .def_prop_ro("bias_gradient", [](const BoundNorm& n) { return array(n.norm().bias_gradient()); },
                   nb::rv_policy::move);
}
