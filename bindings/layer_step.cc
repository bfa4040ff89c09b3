// A layer's training step for Python: arrays in, results written into arrays that are passed in.
#include "bitstrata/layer_step.h"

#include "arrays.h"
#include "training.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace bindings;

namespace {

using bitstrata::ConvWeight;
using bitstrata::ProductShape;
using bitstrata::StepStatus;
using bitstrata::WeightScales;

using Pair = std::tuple<int64_t, int64_t>;
using Real = nb::ndarray<nb::ro, nb::ndim<4>, nb::c_contig, nb::device::cpu>;  // float32, or bfloat16 as int16
using Sizes = std::array<int64_t, 4>;                                          // batch, height, width, channels
using Known = std::optional<std::tuple<In<int8_t, 4>, In<float, 1>>>;          // a weight's codes and scales
using Forwarded = std::tuple<std::string, float, nb::ndarray<nb::numpy, uint8_t>>;
using Kept = std::tuple<In<uint8_t, 1>, In<uint8_t, 1>, float, bool>;  // packed, exponents, scale, signed

const char* text_of(StepStatus s) {
  switch (s) {
    case StepStatus::kDone:
      return "";
    case StepStatus::kWeight:
      return "weight";
    default:
      return "real";
  }
}

template <typename Array>
Sizes sizes_of(const Array& x) {
  Sizes sizes;
  for (size_t d = 0; d < 4; ++d) sizes[d] = static_cast<int64_t>(x.shape(d));
  return sizes;
}

RealTensor real_of(const char* name, const Real& x) {
  RealTensor t;
  if (x.dtype() == nb::dtype<float>())
    t.f32 = static_cast<const float*>(x.data());
  else if (x.dtype() == nb::dtype<int16_t>())
    t.bf16 = static_cast<const uint16_t*>(x.data());
  else
    fail(std::string(name) + " must be float32 or bfloat16 (as int16)");
  return t;
}

template <typename Array>
auto data_or_null(const std::optional<Array>& a) -> decltype(a->data()) {
  return a.has_value() ? a->data() : nullptr;
}

template <typename Array>
void check_bytes(const char* name, const Array& a, int64_t bytes) {
  if (static_cast<int64_t>(a.shape(0)) != bytes)
    fail(std::string(name) + " must have " + std::to_string(bytes) + " bytes, got " + std::to_string(a.shape(0)));
}

// One layer's geometry and widths, whatever the batch.
class LayerStep {
 public:
  LayerStep(Pair stride, Pair dilation, Pair padding, int64_t groups, int weight_bits, bool one_scale, int bits,
            int code_groups, float clip, int gradient_bits, int gradient_groups, bool powers)
      : weight_bits_(weight_bits),
        scales_(one_scale ? WeightScales::kTensor : WeightScales::kChannel),
        input_(format(bits, code_groups, true, false, clip)),
        gradient_(format(gradient_bits, gradient_groups, true, gradient_bits + gradient_groups <= 9, 1, powers)) {
    format(weight_bits, 1, true, false);
    if (groups < 1) fail("groups must be at least 1, got " + std::to_string(groups));
    std::tie(shape_.stride_h, shape_.stride_w) = stride;
    std::tie(shape_.dilation_h, shape_.dilation_w) = dilation;
    std::tie(shape_.pad_top, shape_.pad_left) = padding;
    shape_.pad_bottom = shape_.pad_top, shape_.pad_right = shape_.pad_left;
    shape_.groups = groups;
  }

  // A weight's codes for the forward product, or, if not `by_output`, the input gradient's; False if it is not finite.
  bool weight_codes(In<float, 4> weight, bool by_output, Out<int8_t, 4> codes, Out<float, 1> scale,
                    const std::string& isa, int threads) const {
    const Sizes n = sizes_of(weight);
    const bitstrata::WeightShape s{n[0], n[1], n[2] * n[3], shape_.groups};
    if (threads < 1) fail("threads must be at least 1, got " + std::to_string(threads));
    if (s.elements() < 1 || s.out % s.groups != 0) fail("the weight does not divide into groups");
    if (sizes_of(codes) != n) fail("codes must have the shape of the weight");
    check_scale(scale, by_output ? s.out : s.in * s.groups);
    const bitstrata::Kernels& kernels = bitstrata::select_kernels(isa);
    nb::gil_scoped_release unlocked;
    return bitstrata::weight_codes(kernels, threads, weight.data(), s, weight_bits_, by_output, scales_, codes.data(),
                                   scale.data());
  }

  // (what was not finite, the scale of the input's codes, their exponents, packed)
  Forwarded forward(Real x, bool is_signed, NoiseKey key, In<float, 4> weight, const Known& known, Vector bias,
                    Out<float, 4> y, std::optional<Out<uint8_t, 1>> packed, const std::string& isa, int threads) const {
    const ProductShape s = shape(sizes_of(x), sizes_of(y), sizes_of(weight), threads);
    ShiftFormat f = input_;
    f.is_signed = is_signed;
    check_bias(bias, s);
    if (packed.has_value()) check_bytes("packed", *packed, packed_bytes(s));
    const ConvWeight w = this->weight(weight.data(), sizes_of(weight), known, s.out_c);
    const RealTensor t = real_of("x", x);
    const auto noise = noise_of(key);
    const bitstrata::Kernels& kernels = bitstrata::select_kernels(isa);
    ShiftGrid grid;
    StepStatus status;
    {
      nb::gil_scoped_release unlocked;
      status = bitstrata::layer_forward(kernels, threads, s, t, f, pointer(noise), w, data_or_null(bias), y.data(),
                                        data_or_null(packed), &grid);
    }
    return {text_of(status), grid.scale, array(bitstrata::pack_exponents(grid.exponents, f.groups))};
  }

  // What was not finite. kept: of the input, whose sizes these are.
  std::string again(const Sizes& sizes, const Kept& kept, In<float, 4> weight, const Known& known, Vector bias,
                    Out<float, 4> y, const std::string& isa, int threads) const {
    const ProductShape s = shape(sizes, sizes_of(y), sizes_of(weight), threads);
    check_bias(bias, s);
    const bitstrata::KeptCodes codes = kept_codes(kept, s);
    const ConvWeight w = this->weight(weight.data(), sizes_of(weight), known, s.out_c);
    const bitstrata::Kernels& kernels = bitstrata::select_kernels(isa);
    nb::gil_scoped_release unlocked;
    return text_of(bitstrata::layer_again(kernels, threads, s, codes, w, data_or_null(bias), y.data()));
  }

  // What was not finite. kept: of the input, whose sizes these are; None if the weight's gradient is not asked for, as
  // weight if the input's is not.
  std::string backward(Real gradient, NoiseKey key, const Sizes& sizes, const std::optional<Kept>& kept,
                       const Sizes& weight_sizes, std::optional<In<float, 4>> weight, const Known& known,
                       std::optional<Out<float, 4>> of_input, std::optional<Out<float, 4>> of_weight,
                       std::optional<Out<float, 1>> of_bias, const std::string& isa, int threads) const {
    const ProductShape s = shape(sizes, sizes_of(gradient), weight_sizes, threads);
    bitstrata::KeptCodes codes{};
    if (of_weight.has_value()) {
      if (!kept.has_value()) fail("the weight's gradient needs the input's codes");
      codes = kept_codes(*kept, s);
      if (sizes_of(*of_weight) != weight_sizes) fail("the weight's gradient must have the weight's shape");
    }
    if (weight.has_value() && sizes_of(*weight) != weight_sizes) fail("weight must have the sizes that are given");
    const ConvWeight w = this->weight(data_or_null(weight), weight_sizes, known, s.in_c);
    if (of_input.has_value() && !weight.has_value()) fail("the input's gradient needs the weight");
    if (of_input.has_value() && sizes_of(*of_input) != sizes) fail("the input's gradient must have the input's shape");
    if (of_bias.has_value() && static_cast<int64_t>(of_bias->shape(0)) != s.out_c)
      fail("the bias' gradient must have one element for each output channel");
    const RealTensor t = real_of("gradient", gradient);
    const auto noise = noise_of(key);
    const bitstrata::Kernels& kernels = bitstrata::select_kernels(isa);
    const bitstrata::LayerGradients out{data_or_null(of_input), data_or_null(of_weight), data_or_null(of_bias)};
    StepStatus status;
    {
      nb::gil_scoped_release unlocked;
      status = bitstrata::layer_backward(kernels, threads, s, t, gradient_, pointer(noise), &codes, w, out);
    }
    return text_of(status);
  }

 private:
  ProductShape shape(const Sizes& in, const Sizes& out, const Sizes& kernel, int threads) const {
    ProductShape s = shape_;
    s.batch = in[0], s.in_h = in[1], s.in_w = in[2], s.in_c = in[3];
    s.out_h = out[1], s.out_w = out[2], s.out_c = out[3];
    s.kernel_h = kernel[2], s.kernel_w = kernel[3];
    if (threads < 1) fail("threads must be at least 1, got " + std::to_string(threads));
    if (out[0] != s.batch) fail("input and output have different batches");
    if (kernel[1] * s.groups != s.in_c || kernel[0] != s.out_c) fail("the weight does not fit input and output");
    bitstrata::check_product("layer step", s);
    return s;
  }

  bitstrata::KeptCodes kept_codes(const Kept& kept, const ProductShape& s) const {
    const auto& [packed, exponents, scale, is_signed] = kept;
    check_bytes("packed", packed, packed_bytes(s));
    const std::vector<uint8_t> none(static_cast<size_t>(s.in_c), 0);
    check_bytes("exponents", exponents, static_cast<int64_t>(bitstrata::pack_exponents(none, input_.groups).size()));
    bitstrata::KeptCodes codes{packed.data(), exponents.data(), scale, input_};
    codes.format.is_signed = is_signed;
    return codes;
  }

  static void check_bias(const Vector& bias, const ProductShape& s) {
    if (bias.has_value() && static_cast<int64_t>(bias->shape(0)) != s.out_c)
      fail("bias must have one element for each output channel");
  }

  int64_t packed_bytes(const ProductShape& s) const {
    return (s.batch * s.in_h * s.in_w * s.in_c * input_.bits + 7) / 8;
  }

  ConvWeight weight(const float* data, const Sizes& sizes, const Known& known, int64_t channels) const {
    ConvWeight w{data, weight_bits_, scales_};
    if (!known.has_value()) return w;
    const auto& [codes, scale] = *known;
    if (sizes_of(codes) != sizes) fail("the weight's codes must have its shape");
    check_scale(scale, channels);
    w.codes = codes.data(), w.scale = scale.data();
    return w;
  }

  template <typename Array>
  static void check_scale(const Array& scale, int64_t channels) {
    if (static_cast<int64_t>(scale.shape(0)) != channels) fail("scale must have one element for each channel");
  }

  ProductShape shape_{};
  int weight_bits_;
  WeightScales scales_;
  ShiftFormat input_, gradient_;
};

}  // namespace

void bind_layer_step(nb::module_& m) {
  nb::class_<LayerStep>(m, "LayerStep")
      .def(nb::init<Pair, Pair, Pair, int64_t, int, bool, int, int, float, int, int, bool>(), "stride"_a, "dilation"_a,
           "padding"_a, "groups"_a, "weight_bits"_a, "one_scale"_a, "bits"_a, "code_groups"_a, "clip"_a,
           "gradient_bits"_a, "gradient_groups"_a, "powers"_a)
      .def("weight_codes", &LayerStep::weight_codes, "weight"_a.noconvert(), "by_output"_a, "codes"_a.noconvert(),
           "scale"_a.noconvert(), "isa"_a, "threads"_a)
      .def("forward", &LayerStep::forward, "x"_a.noconvert(), "signed"_a, "noise"_a.none(), "weight"_a.noconvert(),
           "known"_a.none(), "bias"_a.noconvert().none(), "y"_a.noconvert(), "packed"_a.noconvert().none(), "isa"_a,
           "threads"_a)
      .def("again", &LayerStep::again, "sizes"_a, "kept"_a, "weight"_a.noconvert(), "known"_a.none(),
           "bias"_a.noconvert().none(), "y"_a.noconvert(), "isa"_a, "threads"_a)
      .def("backward", &LayerStep::backward, "gradient"_a.noconvert(), "noise"_a.none(), "sizes"_a, "kept"_a.none(),
           "weight_sizes"_a, "weight"_a.noconvert().none(), "known"_a.none(), "of_input"_a.noconvert().none(),
           "of_weight"_a.noconvert().none(), "of_bias"_a.noconvert().none(), "isa"_a, "threads"_a);
}
