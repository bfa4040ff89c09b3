#include <memory>

#include "bitstrata/conv_norm.h"
#include "norm.h"
#include "training.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace bindings;

namespace {

using bitstrata::ConvNormGradient;
using bitstrata::ConvNormResult;
using bitstrata::ConvWeight;
using bitstrata::DType;
using bitstrata::ProductShape;
using bitstrata::ScaledCodes;
using bitstrata::Status;
using bitstrata::WeightScales;

using Codes = nb::ndarray<nb::ro, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using Pair = std::tuple<int64_t, int64_t>;
using Range = std::tuple<int32_t, int32_t>;
using Shift = std::optional<In<uint8_t, 1>>;

const char* text_of(Status s) {
  switch (s) {
    case Status::kDone:
      return "";
    case Status::kWeight:
      return "weight";
    case Status::kNorm:
      return "norm";
    default:
      return "product";
  }
}

// One convolution with its normalization, whatever the batch.
class ConvNorm {
 public:
  ConvNorm(Pair stride, Pair dilation, Pair padding, int64_t groups, int weight_bits, bool one_scale, int norm_bits,
           bool l2, double eps, double factor)
      : groups_(groups),
        weight_bits_(weight_bits),
        scales_(one_scale ? WeightScales::kTensor : WeightScales::kChannel) {
    std::tie(shape_.stride_h, shape_.stride_w) = stride;
    std::tie(shape_.dilation_h, shape_.dilation_w) = dilation;
    std::tie(shape_.pad_top, shape_.pad_left) = padding;
    shape_.pad_bottom = shape_.pad_top, shape_.pad_right = shape_.pad_left;
    shape_.groups = groups;
    format(weight_bits, 1, true, false);
    format(norm_bits, 1, true, false);
    options_.bits = norm_bits;
    options_.l2 = l2;
    options_.eps = eps;
    options_.factor = factor;
  }

  // (the normalization, or None; what was not finite)
  std::tuple<nb::object, std::string> forward(Codes x, Range range, double unit, Shift shift, In<float, 4> weight,
                                              Vector gamma, Vector beta, Out<int32_t, 4> acc, Out<int8_t, 2> codes,
                                              const std::string& isa, int threads) {
    const ProductShape s = shape(x, acc, weight);
    const Rows rows{bitstrata::select_kernels(isa), threads, s.batch * s.out_h * s.out_w, s.out_c};
    check_size("codes", codes, rows);
    const size_t c = static_cast<size_t>(s.out_c);
    const float *g = channels_or_null("gamma", gamma, c), *b = channels_or_null("beta", beta, c);
    const ScaledCodes in{product_codes(x, range, shift), unit, nullptr};
    std::unique_ptr<Norm> norm;
    Status status;
    {
      nb::gil_scoped_release unlocked;
      norm = bitstrata::conv_norm_forward(rows.kernels, threads, s, in, this->weight(weight), options_, g, b,
                                          acc.data(), codes.data(), &status);
    }
    if (!norm) return {nb::none(), text_of(status)};
    return {nb::cast(new BoundNorm(std::move(norm)), nb::rv_policy::take_ownership), ""};
  }

  std::string backward(BoundNorm& norm, In<int8_t, 2> codes, Matrix gradient, Vector scale, std::optional<float> range,
                       bool rectified, NoiseKey noise, int bits, int groups, bool absorb, NoiseKey product_noise,
                       Codes x, Range x_range, Shift x_shift, In<double, 1> x_channel, In<float, 4> weight,
                       Out<int8_t, 2> scratch, Out<uint8_t, 4> product_scratch, std::optional<Out<int32_t, 4>> input,
                       std::optional<Out<float, 1>> input_factor, std::optional<Out<float, 4>> weight_gradient,
                       const std::string& isa, int threads) {
    const ProductShape s = shape(x, product_scratch, weight);
    const Rows& rows = norm.norm().rows();
    if (rows.rows != s.batch * s.out_h * s.out_w || rows.channels != s.out_c)
      fail("the normalization is of another batch");
    check_size("codes", codes, rows);
    check_size("gradient", gradient, rows);
    check_size("scratch", scratch, rows);
    if (x_channel.shape(0) != static_cast<size_t>(s.in_c))
      fail("x_channel must have one element for each input channel");
    if (input.has_value() != input_factor.has_value()) fail("input and input_factor must be given together");
    if (input.has_value())
      for (size_t d = 0; d < 4; ++d)
        if (input->shape(d) != x.shape(d)) fail("input must have the shape of x");
    if (input_factor.has_value() && input_factor->shape(0) != static_cast<size_t>(s.in_c))
      fail("input_factor must have one element for each input channel");
    if (weight_gradient.has_value())
      for (size_t d = 0; d < 4; ++d)
        if (weight_gradient->shape(d) != weight.shape(d)) fail("weight_gradient must have the shape of the weight");
    const auto first = noise_of(noise), second = noise_of(product_noise);
    const RealTensor real = bindings::real(gradient, scale);
    if (real.bf16 != nullptr) fail("the gradient must be float32 or int32");
    const ConvNormGradient g{real,           range.has_value() ? &*range : nullptr, rectified,
                             pointer(first), format(bits, groups, true, absorb),    pointer(second)};
    const ScaledCodes in{product_codes(x, x_range, x_shift), 0.0, x_channel.data()};
    const ConvNormResult out{scratch.data(), product_scratch.data(), input.has_value() ? input->data() : nullptr,
                             input_factor.has_value() ? input_factor->data() : nullptr,
                             weight_gradient.has_value() ? weight_gradient->data() : nullptr};
    const bitstrata::Kernels& kernels = bitstrata::select_kernels(isa);
    nb::gil_scoped_release unlocked;
    return text_of(bitstrata::conv_norm_backward(kernels, threads, s, norm.norm(), codes.data(), g, in,
                                                 this->weight(weight), out));
  }

 private:
  template <typename Y>
  ProductShape shape(const Codes& x, const Y& y, const In<float, 4>& w) const {
    const auto size = [](const auto& a, size_t d) { return static_cast<int64_t>(a.shape(d)); };
    ProductShape s = shape_;
    s.batch = size(x, 0), s.in_h = size(x, 1), s.in_w = size(x, 2), s.in_c = size(x, 3);
    s.out_h = size(y, 1), s.out_w = size(y, 2), s.out_c = size(y, 3);
    s.kernel_h = size(w, 2), s.kernel_w = size(w, 3);
    if (size(y, 0) != s.batch) fail("input and output have different batches");
    if (size(w, 1) * groups_ != s.in_c || size(w, 0) != s.out_c) fail("the weight does not fit input and output");
    return s;
  }

  static bitstrata::ProductCodes product_codes(const Codes& x, Range range, const Shift& shift) {
    const bool is_signed = x.dtype() == nb::dtype<int8_t>();
    if (!is_signed && x.dtype() != nb::dtype<uint8_t>()) fail("codes must be int8 or uint8");
    if (shift.has_value() && shift->shape(0) != x.shape(3)) fail("shift must have one element for each channel");
    return {x.data(), is_signed ? DType::s8 : DType::u8, std::get<0>(range), std::get<1>(range),
            shift.has_value() ? shift->data() : nullptr};
  }

  ConvWeight weight(const In<float, 4>& w) const { return {w.data(), weight_bits_, scales_}; }

  ProductShape shape_{};
  int64_t groups_;
  int weight_bits_;
  WeightScales scales_;
  bitstrata::NormOptions options_;
};

}  // namespace

void bind_conv_norm(nb::module_& m) {
  nb::class_<ConvNorm>(m, "ConvNorm")
      .def(nb::init<Pair, Pair, Pair, int64_t, int, bool, int, bool, double, double>(), "stride"_a, "dilation"_a,
           "padding"_a, "groups"_a, "weight_bits"_a, "one_scale"_a, "norm_bits"_a, "l2"_a, "eps"_a, "factor"_a)
      .def("forward", &ConvNorm::forward, "x"_a.noconvert(), "range"_a, "unit"_a, "shift"_a.noconvert().none(),
           "weight"_a.noconvert(), "gamma"_a.noconvert().none(), "beta"_a.noconvert().none(), "acc"_a.noconvert(),
           "codes"_a.noconvert(), "isa"_a, "threads"_a)
      .def("backward", &ConvNorm::backward, "norm"_a, "codes"_a.noconvert(), "gradient"_a.noconvert(),
           "scale"_a.noconvert().none(), "range"_a.none(), "rectified"_a, "noise"_a.none(), "bits"_a, "groups"_a,
           "absorb"_a, "product_noise"_a.none(), "x"_a.noconvert(), "x_range"_a, "x_shift"_a.noconvert().none(),
           "x_channel"_a.noconvert(), "weight"_a.noconvert(), "scratch"_a.noconvert(), "product_scratch"_a.noconvert(),
           "input"_a.noconvert().none(), "input_factor"_a.noconvert().none(), "weight_gradient"_a.noconvert().none(),
           "isa"_a, "threads"_a);
}
