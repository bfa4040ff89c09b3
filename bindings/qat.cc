// Quantization-aware training on integer sums, for Python: arrays in, results written into arrays that are passed in.
#include "bitstrata/qat.h"

#include "arrays.h"
#include "qat_shapes.h"
#include "training.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace bindings;

namespace {

using bitstrata::PoolMap;
using bitstrata::QatGradient;
using bitstrata::QatLevels;
using bitstrata::QatRule;
using bitstrata::QatTensor;
using bitstrata::QatType;

using Maps = nb::ndarray<nb::ro, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using Real = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>;  // float32, or bfloat16 as uint16
// Least and largest code, the interval in which gradients pass (first, last), the factor inside of it.
using Rule = std::optional<std::tuple<float, float, float, float, float>>;

QatType type_of(const char* name, nb::dlpack::dtype t) {
  if (t == nb::dtype<int16_t>()) return QatType::i16;
  if (t == nb::dtype<int32_t>()) return QatType::i32;
  if (t == nb::dtype<float>()) return QatType::f32;
  if (t == nb::dtype<uint16_t>()) return QatType::bf16;
  fail(std::string(name) + " must be int16, int32, float32, or bfloat16 as uint16");
}

template <typename Array>
QatType real_of(const char* name, const Array& a) {
  const QatType t = type_of(name, a.dtype());
  if (!is_real(t)) fail(std::string(name) + " must be float32, or bfloat16 as uint16");
  return t;
}

// Rows of elements and what they stand for.
struct Tensor {
  Tensor(const Matrix& x, const In<float, 1>& scale, const In<float, 1>& offset, bool rectified, const std::string& isa,
         int threads)
      : rows(rows_of(isa, threads, x)),
        tensor{x.data(), type_of("x", x.dtype()), scale.data(), offset.data(), rectified ? 0.0f : -INFINITY} {
    if (scale.shape(0) != x.shape(1) || offset.shape(0) != x.shape(1))
      fail("scale and offset must have one element for each channel");
  }
  QatType check(const char* name, const Real& a) const {
    check_size(name, a, rows);
    return real_of(name, a);
  }
  // Gradients of the type of g.
  QatGradient gradients(const Matrix& g, const std::optional<Matrix>& add) const {
    check_size("g", g, rows);
    const QatType t = real_of("g", g);
    if (add.has_value()) {
      check_size("add", *add, rows);
      if (real_of("add", *add) != t) fail("g and add must have the same type");
    }
    return {g.data(), add.has_value() ? add->data() : nullptr};
  }
  void same_channels(const char* name, const In<float, 1>& a) const {
    if (a.shape(0) != static_cast<size_t>(rows.channels))
      fail(std::string(name) + " must have one element for each channel");
  }

  Rows rows;
  QatTensor tensor;
};

QatRule rule_of(const Rule& rule, float keep) {
  QatRule r{};
  r.keep = keep;
  r.quantized = rule.has_value();
  if (rule.has_value()) std::tie(r.levels.lo, r.levels.hi, r.first, r.last, r.inner) = *rule;
  return r;
}

bool integers(In<float, 4> values, bool channels_last, In<double, 1> unit, Out<int8_t, 4> high,
              std::optional<Out<int8_t, 4>> low, int threads) {
  if (threads < 1) fail("threads must be at least 1, got " + std::to_string(threads));
  if (values.size() == 0) fail("a weight without elements has no integers");
  const size_t in = channels_last ? 3 : 1, height = channels_last ? 1 : 2;
  if (high.shape(0) != values.shape(0) || high.shape(1) != values.shape(in) || high.shape(2) != values.shape(height) ||
      high.shape(3) != values.shape(height + 1))
    fail("high must have the shape of values, input channels second");
  if (low.has_value()) check_same_shape("low", *low, high);
  if (unit.shape(0) != values.shape(0)) fail("unit must have one element for each output channel");
  const int64_t out = static_cast<int64_t>(high.shape(0)), inputs = static_cast<int64_t>(high.shape(1));
  const int64_t taps = static_cast<int64_t>(high.shape(2) * high.shape(3));
  nb::gil_scoped_release unlocked;
  return bitstrata::qat_integers(threads, values.data(), out, inputs, taps, channels_last, unit.data(), high.data(),
                                 low.has_value() ? low->data() : nullptr);
}

using Moments = std::tuple<nb::ndarray<nb::numpy, double>, nb::ndarray<nb::numpy, double>>;

// (whether all sums fit, mean, variance); out: int16 or int32.
std::tuple<bool, nb::object> convolution(Codes x, Range range, In<int8_t, 4> high, std::optional<In<int8_t, 4>> low,
                                         Pair stride, Pair dilation, Pair padding, int64_t groups,
                                         nb::ndarray<nb::ndim<4>, nb::c_contig, nb::device::cpu> out, bool moments,
                                         const std::string& isa, int threads) {
  if (threads < 1) fail("threads must be at least 1, got " + std::to_string(threads));
  const bitstrata::ProductShape s = shape_of(x, out, high, {stride, dilation, padding, groups});
  const bitstrata::QatWeight weight = weight_of(high, low);
  const bitstrata::ProductCodes x_codes = codes_of(x, range);
  const QatType type = type_of("out", out.dtype());
  if (is_real(type)) fail("out must be int16 or int32");
  const bitstrata::Kernels& kernels = bitstrata::select_kernels(isa);
  bitstrata::QatMoments found;
  bool fits;
  {
    nb::gil_scoped_release unlocked;
    fits = bitstrata::qat_convolution(kernels, threads, s, x_codes, weight,
                                      type == QatType::i16 ? static_cast<int16_t*>(out.data()) : nullptr,
                                      type == QatType::i32 ? static_cast<int32_t*>(out.data()) : nullptr, &found);
  }
  if (!moments) return {fits, nb::none()};
  return {fits, nb::cast(Moments{array(found.mean), array(found.variance)})};
}

void codes(Matrix x, In<float, 1> scale, In<float, 1> offset, bool rectified, std::tuple<float, float> levels,
           Out<uint8_t, 2> out, const std::string& isa, int threads) {
  const Tensor t(x, scale, offset, rectified, isa, threads);
  check_size("out", out, t.rows);
  nb::gil_scoped_release unlocked;
  bitstrata::qat_codes(t.rows, t.tensor, {std::get<0>(levels), std::get<1>(levels)}, out.data());
}

void code_values(Matrix x, In<float, 1> scale, In<float, 1> offset, bool rectified, std::tuple<float, float> levels,
                 Real out, const std::string& isa, int threads) {
  const Tensor t(x, scale, offset, rectified, isa, threads);
  const QatType real = t.check("out", out);
  nb::gil_scoped_release unlocked;
  bitstrata::qat_code_values(t.rows, t.tensor, {std::get<0>(levels), std::get<1>(levels)}, real, out.data());
}

void values(Matrix x, In<float, 1> scale, In<float, 1> offset, bool rectified, std::optional<Matrix> add, Real out,
            const std::string& isa, int threads) {
  const Tensor t(x, scale, offset, rectified, isa, threads);
  const QatType real = t.check("out", out);
  if (add.has_value()) {
    check_size("add", *add, t.rows);
    if (real_of("add", *add) != real) fail("add and out must have the same type");
  }
  nb::gil_scoped_release unlocked;
  bitstrata::qat_values(t.rows, t.tensor, real, add.has_value() ? add->data() : nullptr, out.data());
}

// (sums, moments, the step's sum)
std::tuple<nb::ndarray<nb::numpy, double>, nb::ndarray<nb::numpy, double>, double> gradient_sums(
    Matrix x, In<float, 1> scale, In<float, 1> offset, bool rectified, Rule rule, float keep, Matrix g,
    std::optional<Matrix> add, In<float, 1> center, const std::string& isa, int threads) {
  const Tensor t(x, scale, offset, rectified, isa, threads);
  const QatGradient in = t.gradients(g, add);
  t.same_channels("center", center);
  const QatType real = real_of("g", g);
  bitstrata::QatChannelSums s;
  {
    nb::gil_scoped_release unlocked;
    s = bitstrata::qat_gradient_sums(t.rows, t.tensor, rule_of(rule, keep), real, in, center.data());
  }
  return {array(s.sum), array(s.moment), s.step};
}

void gradient(Matrix x, In<float, 1> scale, In<float, 1> offset, bool rectified, Rule rule, float keep, Matrix g,
              std::optional<Matrix> add, In<float, 2> line, Real out, const std::string& isa, int threads) {
  const Tensor t(x, scale, offset, rectified, isa, threads);
  const QatGradient in = t.gradients(g, add);
  const QatType real = t.check("out", out);
  if (real_of("g", g) != real) fail("g and out must have the same type");
  if (line.shape(0) != 4 || line.shape(1) != x.shape(1)) fail("line must be (4, channels)");
  const float* l = line.data();
  const int64_t c = t.rows.channels;
  nb::gil_scoped_release unlocked;
  bitstrata::qat_gradient(t.rows, t.tensor, rule_of(rule, keep), real, in, {l, l + c, l + 2 * c, l + 3 * c},
                          out.data());
}

double pass(Matrix x, In<float, 1> scale, In<float, 1> offset, bool rectified, Rule rule, float keep, Matrix g,
            std::optional<Matrix> add, Real out, const std::string& isa, int threads) {
  const Tensor t(x, scale, offset, rectified, isa, threads);
  const QatGradient in = t.gradients(g, add);
  const QatType real = t.check("out", out);
  if (real_of("g", g) != real) fail("g and out must have the same type");
  nb::gil_scoped_release unlocked;
  return bitstrata::qat_pass(t.rows, t.tensor, rule_of(rule, keep), real, in, out.data());
}

void max_pool(Matrix x, In<float, 1> scale, In<float, 1> offset, bool rectified, PoolWindow window,
              nb::ndarray<nb::ndim<4>, nb::c_contig, nb::device::cpu> out, Out<uint8_t, 4> places,
              const std::string& isa, int threads) {
  const Tensor t(x, scale, offset, rectified, isa, threads);
  const PoolMap s = pool_map(window, places);
  const QatType real = real_of("out", out);
  check_same_shape("out", out, places);
  const int64_t images = static_cast<int64_t>(out.shape(0));
  if (s.channels != t.rows.channels || images * s.in_h * s.in_w != t.rows.rows) fail("x must have the map's shape");
  nb::gil_scoped_release unlocked;
  bitstrata::qat_max_pool(t.rows, t.tensor, s, images, real, out.data(), places.data());
}

void max_pool_gradient(Maps g, In<uint8_t, 4> places, PoolWindow window, Real out, const std::string& isa,
                       int threads) {
  if (threads < 1) fail("threads must be at least 1, got " + std::to_string(threads));
  check_same_shape("g", g, places);
  const PoolMap s = pool_map(window, places);
  const QatType real = real_of("g", g);
  const int64_t images = static_cast<int64_t>(g.shape(0));
  if (real_of("out", out) != real) fail("g and out must have the same type");
  if (static_cast<int64_t>(out.shape(1)) != s.channels ||
      static_cast<int64_t>(out.shape(0)) != images * s.in_h * s.in_w)
    fail("out must have the map's shape");
  const bitstrata::Kernels& kernels = bitstrata::select_kernels(isa);
  nb::gil_scoped_release unlocked;
  bitstrata::qat_max_pool_gradient(kernels, threads, s, images, real, g.data(), places.data(), out.data());
}

}  // namespace

void bind_qat(nb::module_& m) {
  m.def("qat_integers", &integers, "values"_a.noconvert(), "channels_last"_a, "unit"_a.noconvert(),
        "high"_a.noconvert(), "low"_a.noconvert().none(), "threads"_a);
  m.def("qat_convolution", &convolution, "x"_a.noconvert(), "range"_a, "high"_a.noconvert(), "low"_a.noconvert().none(),
        "stride"_a, "dilation"_a, "padding"_a, "groups"_a, "out"_a.noconvert(), "moments"_a, "isa"_a, "threads"_a);
  m.def("qat_codes", &codes, "x"_a.noconvert(), "scale"_a.noconvert(), "offset"_a.noconvert(), "rectified"_a,
        "levels"_a, "out"_a.noconvert(), "isa"_a, "threads"_a);
  m.def("qat_code_values", &code_values, "x"_a.noconvert(), "scale"_a.noconvert(), "offset"_a.noconvert(),
        "rectified"_a, "levels"_a, "out"_a.noconvert(), "isa"_a, "threads"_a);
  m.def("qat_values", &values, "x"_a.noconvert(), "scale"_a.noconvert(), "offset"_a.noconvert(), "rectified"_a,
        "add"_a.noconvert().none(), "out"_a.noconvert(), "isa"_a, "threads"_a);
  m.def("qat_gradient_sums", &gradient_sums, "x"_a.noconvert(), "scale"_a.noconvert(), "offset"_a.noconvert(),
        "rectified"_a, "rule"_a.none(), "keep"_a, "g"_a.noconvert(), "add"_a.noconvert().none(), "center"_a.noconvert(),
        "isa"_a, "threads"_a);
  m.def("qat_gradient", &gradient, "x"_a.noconvert(), "scale"_a.noconvert(), "offset"_a.noconvert(), "rectified"_a,
        "rule"_a.none(), "keep"_a, "g"_a.noconvert(), "add"_a.noconvert().none(), "line"_a.noconvert(),
        "out"_a.noconvert(), "isa"_a, "threads"_a);
  m.def("qat_pass", &pass, "x"_a.noconvert(), "scale"_a.noconvert(), "offset"_a.noconvert(), "rectified"_a,
        "rule"_a.none(), "keep"_a, "g"_a.noconvert(), "add"_a.noconvert().none(), "out"_a.noconvert(), "isa"_a,
        "threads"_a);
  m.def("qat_max_pool", &max_pool, "x"_a.noconvert(), "scale"_a.noconvert(), "offset"_a.noconvert(), "rectified"_a,
        "window"_a, "out"_a.noconvert(), "places"_a.noconvert(), "isa"_a, "threads"_a);
  m.def("qat_max_pool_gradient", &max_pool_gradient, "g"_a.noconvert(), "places"_a.noconvert(), "window"_a,
        "out"_a.noconvert(), "isa"_a, "threads"_a);
}
