#include "training.h"

#include <nanobind/stl/tuple.h>

#include "arrays.h"
#include "bitstrata/threads.h"
#include "norm.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace bindings;

namespace {

Grid shift_codes(Matrix x, int bits, int groups, bool is_signed, bool absorb, float clip, NoiseKey key,
                 Out<uint8_t, 2> out, Vector ranges, const std::string& isa, int threads, bool powers) {
  const Rows rows = rows_of(isa, threads, x);
  const float* known = channels_or_null("ranges", ranges, x.shape(1));
  const ShiftFormat f = format(bits, groups, is_signed, absorb, clip, powers);
  check_size("out", out, rows);
  const RealTensor t = real(x, std::nullopt);
  if (t.i32 != nullptr) fail("the tensor must be float32 or bfloat16");
  const auto noise = noise_of(key);
  ShiftGrid grid;
  {
    nb::gil_scoped_release unlocked;
    grid = bitstrata::shift_codes(rows, t, f, pointer(noise), out.data(), known);
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
  return bitstrata::weight_codes(kernels, threads, weight.data(), s, bits, by_output, bitstrata::WeightScales::kChannel,
                                 codes.data(), scale.data());
}

void check_pack(size_t codes, size_t packed, int width, int threads) {
  if (width < 2 || width > 8) fail("width must be in 2..8, got " + std::to_string(width));
  if (threads < 1) fail("threads must be at least 1, got " + std::to_string(threads));
  if (packed != (codes * static_cast<size_t>(width) + 7) / 8)
    fail(std::to_string(codes) + " codes of " + std::to_string(width) + " bits do not take " + std::to_string(packed) +
         " bytes");
}

void pack_codes(In<uint8_t, 1> codes, int width, Out<uint8_t, 1> out, const std::string& isa, int threads) {
  check_pack(codes.shape(0), out.shape(0), width, threads);
  const bitstrata::Kernels& kernels = bitstrata::select_kernels(isa);
  nb::gil_scoped_release unlocked;
  bitstrata::pack_codes(kernels, threads, codes.data(), static_cast<int64_t>(codes.shape(0)), width, out.data());
}

void unpack_codes(In<uint8_t, 1> packed, int width, bool is_signed, Out<uint8_t, 1> out, const std::string& isa,
                  int threads) {
  check_pack(out.shape(0), packed.shape(0), width, threads);
  const bitstrata::Kernels& kernels = bitstrata::select_kernels(isa);
  nb::gil_scoped_release unlocked;
  bitstrata::unpack_codes(kernels, threads, packed.data(), static_cast<int64_t>(out.shape(0)), width, is_signed,
                          out.data());
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

nb::ndarray<nb::numpy, int64_t> code_sums(In<int8_t, 2> codes, const std::string& isa, int threads) {
  const Rows rows = rows_of(isa, threads, codes);
  std::vector<int64_t> sums;
  {
    nb::gil_scoped_release unlocked;
    sums = bitstrata::code_sums(rows, codes.data());
  }
  return array(sums);
}

void max_pool_gradient(In<float, 4> gradient, In<uint8_t, 4> places, const PoolWindow& window, Out<float, 4> out,
                       const std::string& isa, int threads) {
  const bitstrata::PoolMap s = pool_map(window, gradient);
  check_same_shape("places", places, gradient);
  if (out.shape(0) != gradient.shape(0) || static_cast<int64_t>(out.shape(1)) != s.in_h ||
      static_cast<int64_t>(out.shape(2)) != s.in_w || out.shape(3) != gradient.shape(3))
    fail("out must be of the pooling's input");
  const bitstrata::Kernels& kernels = bitstrata::select_kernels(isa);
  nb::gil_scoped_release unlocked;
  bitstrata::max_pool_gradient(kernels, threads, static_cast<int64_t>(out.shape(0)), s, gradient.data(), places.data(),
                               out.data());
}

// Checks the arguments of both directions.
template <typename Codes, typename Maxima, typename Signs>
bitstrata::PoolMap maxima_map(const Codes& codes, In<uint8_t, 4> places, const PoolWindow& window, const Maxima& maxima,
                              const Signs& signs) {
  const bitstrata::PoolMap s = pool_map(window, places);
  check_same_shape("maxima", maxima, places);
  if (codes.shape(0) != places.shape(0) || static_cast<int64_t>(codes.shape(1)) != s.in_h ||
      static_cast<int64_t>(codes.shape(2)) != s.in_w || codes.shape(3) != places.shape(3))
    fail("codes must be of the pooling's input");
  if (signs.shape(0) != codes.shape(0) || static_cast<int64_t>(signs.shape(1)) != s.sign_bytes())
    fail("signs must have a byte for four codes of an image");
  return s;
}

void keep_maxima(In<int8_t, 4> codes, In<uint8_t, 4> places, const PoolWindow& window, Out<int8_t, 4> maxima,
                 Out<uint8_t, 2> signs, const std::string& isa, int threads) {
  const bitstrata::PoolMap s = maxima_map(codes, places, window, maxima, signs);
  const bitstrata::Kernels& kernels = bitstrata::select_kernels(isa);
  nb::gil_scoped_release unlocked;
  bitstrata::keep_maxima(kernels, threads, static_cast<int64_t>(codes.shape(0)), s, codes.data(), places.data(),
                         maxima.data(), signs.data());
}

void put_maxima(In<int8_t, 4> maxima, In<uint8_t, 2> signs, In<uint8_t, 4> places, const PoolWindow& window,
                Out<int8_t, 4> codes, const std::string& isa, int threads) {
  const bitstrata::PoolMap s = maxima_map(codes, places, window, maxima, signs);
  const bitstrata::Kernels& kernels = bitstrata::select_kernels(isa);
  nb::gil_scoped_release unlocked;
  bitstrata::put_maxima(kernels, threads, static_cast<int64_t>(codes.shape(0)), s, maxima.data(), signs.data(),
                        places.data(), codes.data());
}

float join(Matrix x, Vector scale, std::optional<In<float, 2>> add, std::optional<Out<uint8_t, 1>> bits,
           Out<float, 2> out, const std::string& isa, int threads) {
  const Rows rows = rows_of(isa, threads, x);
  const RealTensor t = real(x, scale);
  if (t.bf16 != nullptr) fail("the tensor must be float32 or int32");
  check_size("out", out, rows);
  if (add.has_value()) check_size("add", *add, rows);
  if (bits.has_value()) check_bits(*bits, rows);
  nb::gil_scoped_release unlocked;
  return bitstrata::join(rows, t, add.has_value() ? add->data() : nullptr, bits.has_value() ? bits->data() : nullptr,
                         out.data());
}

float join_strided(Matrix x, Vector scale, std::array<int64_t, 2> map, std::array<int64_t, 2> stride,
                   In<int32_t, 4> add, In<float, 1> add_scale, std::optional<Out<uint8_t, 1>> bits, Out<float, 2> out,
                   const std::string& isa, int threads) {
  const Rows rows = rows_of(isa, threads, x);
  const RealTensor t = real(x, scale);
  if (t.bf16 != nullptr) fail("the tensor must be float32 or int32");
  check_size("out", out, rows);
  if (bits.has_value()) check_bits(*bits, rows);
  for (size_t d = 0; d < 2; ++d)
    if (map[d] < 1 || stride[d] < 1) fail("map and stride must be at least 1");
  bitstrata::StridedTensor s{{}, map[0], map[1], stride[0], stride[1]};
  s.rows.i32 = add.data(), s.rows.scale = add_scale.data();
  const auto size = [&](size_t d) { return static_cast<int64_t>(add.shape(d)); };
  if (size(0) * map[0] * map[1] != rows.rows || size(1) != s.out_h() || size(2) != s.out_w() ||
      size(3) != rows.channels || add_scale.shape(0) != add.shape(3))
    fail("add must have every stride-th pixel of the tensor's maps, and a scale for each channel");
  nb::gil_scoped_release unlocked;
  return bitstrata::join(rows, t, s, bits.has_value() ? bits->data() : nullptr, out.data());
}

}  // namespace

void bind_training(nb::module_& m) {
  nb::set_leak_warnings(false);  // a graph of gradients that outlives the interpreter holds a Norm
  m.def("use_openmp", &bitstrata::use_openmp, "library"_a);
  m.def("channel_ranges", &channel_ranges, "x"_a.noconvert(), "isa"_a, "threads"_a);
  m.def("code_sums", &code_sums, "codes"_a.noconvert(), "isa"_a, "threads"_a);
  m.def("max_pool_gradient", &max_pool_gradient, "gradient"_a.noconvert(), "places"_a.noconvert(), "window"_a,
        "out"_a.noconvert(), "isa"_a, "threads"_a);
  m.def("keep_maxima", &keep_maxima, "codes"_a.noconvert(), "places"_a.noconvert(), "window"_a, "maxima"_a.noconvert(),
        "signs"_a.noconvert(), "isa"_a, "threads"_a);
  m.def("put_maxima", &put_maxima, "maxima"_a.noconvert(), "signs"_a.noconvert(), "places"_a.noconvert(), "window"_a,
        "codes"_a.noconvert(), "isa"_a, "threads"_a);
  m.def("pack_codes", &pack_codes, "codes"_a.noconvert(), "width"_a, "out"_a.noconvert(), "isa"_a, "threads"_a);
  m.def("unpack_codes", &unpack_codes, "packed"_a.noconvert(), "width"_a, "signed"_a, "out"_a.noconvert(), "isa"_a,
        "threads"_a);
  m.def("weight_codes", &weight_codes, "weight"_a.noconvert(), "groups"_a, "bits"_a, "by_output"_a,
        "codes"_a.noconvert(), "scale"_a.noconvert(), "isa"_a, "threads"_a);
  m.def("shift_codes", &shift_codes, "x"_a.noconvert(), "bits"_a, "groups"_a, "signed"_a, "absorb"_a, "clip"_a,
        "noise"_a.none(), "out"_a.noconvert(), "ranges"_a.noconvert().none(), "isa"_a, "threads"_a, "powers"_a = false);
  m.def("join_strided", &join_strided, "x"_a.noconvert(), "scale"_a.noconvert().none(), "map"_a, "stride"_a,
        "add"_a.noconvert(), "add_scale"_a.noconvert(), "bits"_a.noconvert().none(), "out"_a.noconvert(), "isa"_a,
        "threads"_a);
  m.def("join", &join, "x"_a.noconvert(), "scale"_a.noconvert().none(), "add"_a.noconvert().none(),
        "bits"_a.noconvert().none(), "out"_a.noconvert(), "isa"_a, "threads"_a);
  nb::class_<BoundNorm>(m, "Norm")
      .def(nb::init<int64_t, int64_t, int, bool, double, double, Vector, Vector, const std::string&, int>(), "rows"_a,
           "channels"_a, "bits"_a, "l2"_a, "eps"_a, "factor"_a, "weight"_a.noconvert().none(),
           "bias"_a.noconvert().none(), "isa"_a, "threads"_a)
      .def("forward", &BoundNorm::forward, "x"_a.noconvert(), "scale"_a.noconvert().none(),
           "least"_a.noconvert().none(), "most"_a.noconvert().none(), "codes"_a.noconvert())
      .def("to_codes", &BoundNorm::to_codes, "codes"_a.noconvert(), "rectify"_a, "bits"_a, "groups"_a, "signed"_a,
           "absorb"_a, "clip"_a, "noise"_a.none(), "out"_a.noconvert())
      .def("max_pool", &BoundNorm::max_pool, "codes"_a.noconvert(), "rectify"_a, "window"_a, "out"_a.noconvert(),
           "places"_a.noconvert())
      .def("to_f32", &BoundNorm::to_f32, "codes"_a.noconvert(), "rectify"_a, "add"_a.noconvert().none(),
           "out"_a.noconvert(), "bits"_a.noconvert().none())
      .def("backward", &BoundNorm::backward, "gradient"_a.noconvert(), "scale"_a.noconvert().none(), "range"_a.none(),
           "codes"_a.noconvert(), "rectify"_a, "noise"_a.none(), "out"_a.noconvert())
      .def("gradient_f32", &BoundNorm::gradient_f32, "gradient"_a.noconvert(), "codes"_a.noconvert(),
           "out"_a.noconvert())
      .def("gradient_codes", &BoundNorm::gradient_codes, "gradient"_a.noconvert(), "codes"_a.noconvert(), "bits"_a,
           "groups"_a, "absorb"_a, "noise"_a.none(), "out"_a.noconvert(), "powers"_a = false)
      .def("track", &BoundNorm::track, "mean"_a.noconvert(), "deviation"_a.noconvert(), "share"_a)
      .def_prop_ro(
          "mean", [](const BoundNorm& n) { return array(n.norm().mean()); }, nb::rv_policy::move)
      .def_prop_ro(
          "deviation", [](const BoundNorm& n) { return array(n.norm().deviation()); }, nb::rv_policy::move)
      .def_prop_ro(
          "weight_gradient", [](const BoundNorm& n) { return array(n.norm().weight_gradient()); }, nb::rv_policy::move)
      .def_prop_ro(
          "bias_gradient", [](const BoundNorm& n) { return array(n.norm().bias_gradient()); }, nb::rv_policy::move);
}
