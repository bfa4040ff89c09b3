#include "bitstrata/layer_norm.h"

#include "arrays.h"
#include "training.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace bindings;

namespace {

using bitstrata::LayerNorm;

// Codes stay with the caller.
class BoundLayerNorm {
 public:
  BoundLayerNorm(int64_t rows, int64_t features, int bits, bool l2, double eps, double factor, Vector weight,
                 Vector bias, const std::string& isa, int threads)
      : norm_(make(rows, features, bits, l2, eps, factor, weight, bias, isa, threads)) {}

  bool forward(In<float, 2> x, Out<int8_t, 2> codes, Out<float, 2> out) {
    check_size("x", x, norm_.rows());
    check_size("codes", codes, norm_.rows());
    check_size("out", out, norm_.rows());
    nb::gil_scoped_release unlocked;
    ready_ = norm_.forward(x.data(), codes.data(), out.data());
    return ready_;
  }

  bool backward(In<float, 2> gradient, In<int8_t, 2> codes, NoiseKey key, Out<float, 2> out) {
    if (!ready_) fail("forward comes first");
    check_size("gradient", gradient, norm_.rows());
    check_size("codes", codes, norm_.rows());
    check_size("out", out, norm_.rows());
    const auto noise = noise_of(key);
    nb::gil_scoped_release unlocked;
    return norm_.backward(gradient.data(), codes.data(), pointer(noise), out.data());
  }

  const LayerNorm& norm() const { return norm_; }

 private:
  static LayerNorm make(int64_t rows, int64_t features, int bits, bool l2, double eps, double factor,
                        const Vector& weight, const Vector& bias, const std::string& isa, int threads) {
    if (rows < 1 || features < 1) fail("a normalization needs at least one row and one feature");
    if (bits < 2 || bits > 8) fail("bits must be in 2..8, got " + std::to_string(bits));
    if (threads < 1) fail("threads must be at least 1, got " + std::to_string(threads));
    for (const auto* v : {&weight, &bias})
      if (v->has_value() && (*v)->shape(0) != static_cast<size_t>(features))
        fail(std::string(v == &weight ? "weight" : "bias") + " must have one element for each feature");
    bitstrata::NormOptions options;
    options.bits = bits;
    options.l2 = l2;
    options.eps = eps;
    options.factor = factor;
    return LayerNorm({bitstrata::select_kernels(isa), threads, rows, features}, options,
                     weight.has_value() ? weight->data() : nullptr, bias.has_value() ? bias->data() : nullptr);
  }

  LayerNorm norm_;
  bool ready_ = false;
};

}  // namespace

void bind_layer_norm(nb::module_& m) {
  nb::class_<BoundLayerNorm>(m, "LayerNorm")
      .def(nb::init<int64_t, int64_t, int, bool, double, double, Vector, Vector, const std::string&, int>(), "rows"_a,
           "features"_a, "bits"_a, "l2"_a, "eps"_a, "factor"_a, "weight"_a.noconvert().none(),
           "bias"_a.noconvert().none(), "isa"_a, "threads"_a)
      .def("forward", &BoundLayerNorm::forward, "x"_a.noconvert(), "codes"_a.noconvert(), "out"_a.noconvert())
      .def("backward", &BoundLayerNorm::backward, "gradient"_a.noconvert(), "codes"_a.noconvert(), "noise"_a.none(),
           "out"_a.noconvert())
      .def_prop_ro(
          "weight_gradient", [](const BoundLayerNorm& n) { return array(n.norm().weight_gradient()); },
          nb::rv_policy::move)
      .def_prop_ro(
          "bias_gradient", [](const BoundLayerNorm& n) { return array(n.norm().bias_gradient()); },
          nb::rv_policy::move);
}
