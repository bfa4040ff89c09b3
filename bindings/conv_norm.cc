#include <limits>
#include <memory>
#include <optional>

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
using bitstrata::ProductShape;
using bitstrata::Status;
using bitstrata::WeightScales;

using Bytes = Out<uint8_t, 1>;
using Pooled = std::optional<std::tuple<In<uint8_t, 4>, PoolWindow>>;  // places of the maxima
using Maps = std::array<int64_t, 4>;                                   // batch, height, width, channels
using Codes = In<uint8_t, 4>;
using Pair = std::tuple<int64_t, int64_t>;

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

template <typename Array>
Maps maps_of(const Array& x) {
  Maps maps;
  for (size_t d = 0; d < 4; ++d) maps[d] = static_cast<int64_t>(x.shape(d));
  return maps;
}

// What a convolution reads, forward and backward; keeps what it refers to.
class Input {
 public:
  Input(Codes codes, float scale, In<uint8_t, 1> exponents, int bits, int groups, bool is_signed, bool absorb)
      : maps_(maps_of(codes)), codes_(codes) {
    input_.format = format(bits, groups, is_signed, absorb);
    if (exponents.shape(0) != codes.shape(3)) fail("exponents must have one element for each channel");
    grid_ = {scale, {exponents.data(), exponents.data() + exponents.shape(0)}};
    for (uint8_t e : grid_.exponents)
      if (e >= groups) fail("exponents must be below the number of groups");
    input_.codes = codes.data();
    input_.grid = &grid_;
  }
  Input(const Input&) = delete;
  Input& operator=(const Input&) = delete;

  Input(const BoundNorm& norm, In<int8_t, 4> normed, bool rectified, int bits, int groups, bool is_signed, bool absorb,
        float clip)
      : maps_(maps_of(normed)), normed_(normed) {
    const Rows& rows = norm.norm().rows();
    if (maps_[0] * maps_[1] * maps_[2] != rows.rows || maps_[3] != rows.channels)
      fail("normed must have the shape of what was normalized");
    input_.norm = &norm.norm();
    input_.normed = normed.data();
    input_.rectified = rectified;
    input_.format = format(bits, groups, is_signed, absorb, clip);
  }

  bool rests() const { return bitstrata::rests(input_.format); }
  // The codes go into `packed`, which from now on is what is read.
  void rest(Bytes packed, const std::string& isa, int threads) {
    if (input_.codes == nullptr || !rests()) fail("there are no codes of at most 4 bits");
    const int64_t pixels = maps_[0] * maps_[1] * maps_[2];
    const size_t bytes = static_cast<size_t>((pixels * maps_[3] * input_.format.bits + 7) / 8);
    if (packed.shape(0) != bytes) fail("packed must have " + std::to_string(bytes) + " bytes");
    const Rows rows{bitstrata::select_kernels(isa), threads, pixels, maps_[3]};
    {
      nb::gil_scoped_release unlocked;
      bitstrata::pack_codes(rows, input_.codes, grid_, input_.format, packed.data());
    }
    packed_ = packed;
    input_.packed = packed.data();
    input_.codes = nullptr;
    codes_.reset();
  }

  const Maps& maps() const { return maps_; }
  const bitstrata::ConvInput& get() const { return input_; }

 private:
  Maps maps_;
  bitstrata::ConvInput input_;
  bitstrata::ShiftGrid grid_;
  std::optional<Codes> codes_;
  std::optional<Bytes> packed_;
  std::optional<In<int8_t, 4>> normed_;
};

// One convolution with its normalization, whatever the batch.
class ConvNorm {
 public:
  ConvNorm(Pair stride, Pair dilation, Pair padding, int64_t groups, int weight_bits, bool one_scale, int norm_bits,
           bool l2, double eps, double factor, int gradient_bits, int gradient_groups, bool absorb, bool powers)
      : groups_(groups),
        weight_bits_(weight_bits),
        scales_(one_scale ? WeightScales::kTensor : WeightScales::kChannel),
        gradient_(format(gradient_bits, gradient_groups, true, absorb, 1, powers)) {
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

  // Bytes of scratch memory, forward and backward.
  std::tuple<size_t, size_t> scratch(const Input& x, In<float, 4> weight, const Maps& result) const {
    const ProductShape s = shape(x, result, weight);
    return {bitstrata::conv_norm_forward_scratch(s, x.get()), bitstrata::conv_norm_backward_scratch(s, x.get())};
  }

  // (the normalization, or None; what was not finite)
  std::tuple<nb::object, std::string> forward(const Input& x, In<float, 4> weight, Vector gamma, Vector beta,
                                              Bytes scratch, Out<int8_t, 4> codes, const std::string& isa,
                                              int threads) {
    const ProductShape s = shape(x, maps_of(codes), weight);
    const size_t c = static_cast<size_t>(s.out_c);
    const float *g = channels_or_null("gamma", gamma, c), *b = channels_or_null("beta", beta, c);
    check_scratch(scratch, bitstrata::conv_norm_forward_scratch(s, x.get()));
    const bitstrata::Kernels& kernels = bitstrata::select_kernels(isa);
    std::unique_ptr<Norm> norm;
    Status status;
    {
      nb::gil_scoped_release unlocked;
      norm = bitstrata::conv_norm_forward(kernels, threads, s, x.get(), this->weight(weight), options_, g, b,
                                          scratch.data(), codes.data(), &status);
    }
    if (!norm) return {nb::none(), text_of(status)};
    return {nb::cast(new BoundNorm(std::move(norm)), nb::rv_policy::take_ownership), ""};
  }

  // (what was not finite, the input gradient's range where it passes the input's normalization or None)
  std::tuple<std::string, std::optional<float>> backward(
      BoundNorm& norm, In<int8_t, 4> codes, Matrix gradient, Pooled pooled, Vector scale, std::optional<float> range,
      bool rectified, NoiseKey noise, NoiseKey product_noise, const Input& x, In<float, 4> weight, Bytes scratch,
      std::optional<Out<int32_t, 4>> input, std::optional<Out<float, 1>> input_factor,
      std::optional<Out<float, 4>> of_weight, std::optional<Out<float, 1>> of_gamma,
      std::optional<Out<float, 1>> of_beta, const std::string& isa, int threads) {
    const ProductShape s = shape(x, maps_of(codes), weight);
    const Rows& rows = norm.norm().rows();
    if (rows.rows != s.batch * s.out_h * s.out_w || rows.channels != s.out_c)
      fail("the normalization is of another batch");
    std::optional<bitstrata::PooledGradient> pooling;
    if (pooled.has_value())
      pooling = pooled_gradient(*pooled, s, gradient);
    else
      check_size("gradient", gradient, rows);
    check_scratch(scratch, bitstrata::conv_norm_backward_scratch(s, x.get()));
    const bool dense = !input.has_value() || maps_of(*input) == x.maps();
    if (!dense) check_pixels_read(s, x, maps_of(*input));
    if (input.has_value() != input_factor.has_value()) fail("input and input_factor must be given together");
    for (size_t d = 0; d < 4; ++d) {
      if (of_weight.has_value() && of_weight->shape(d) != weight.shape(d))
        fail("of_weight must have the shape of the weight");
    }
    if (input_factor.has_value() && static_cast<int64_t>(input_factor->shape(0)) != s.in_c)
      fail("input_factor must have one element for each input channel");
    for (const auto* v : {&of_gamma, &of_beta})
      if (v->has_value() && static_cast<int64_t>((*v)->shape(0)) != s.out_c)
        fail("of_gamma and of_beta must have one element for each output channel");
    const auto first = noise_of(noise), second = noise_of(product_noise);
    const RealTensor real = bindings::real(gradient, scale);
    if (real.bf16 != nullptr) fail("the gradient must be float32 or int32");
    const ConvNormGradient g{real,
                             pooling.has_value() ? &*pooling : nullptr,
                             range.has_value() ? &*range : nullptr,
                             rectified,
                             pointer(first),
                             gradient_,
                             pointer(second)};
    float passed = std::numeric_limits<float>::quiet_NaN();
    const ConvNormResult out{scratch.data(),     data_of(input),    dense,           data_of(input_factor), &passed,
                             data_of(of_weight), data_of(of_gamma), data_of(of_beta)};
    const bitstrata::Kernels& kernels = bitstrata::select_kernels(isa);
    Status status;
    {
      nb::gil_scoped_release unlocked;
      status = bitstrata::conv_norm_backward(kernels, threads, s, norm.norm(), codes.data(), g, x.get(),
                                             this->weight(weight), out);
    }
    const bool known = input.has_value() && x.get().norm != nullptr && status == Status::kDone;
    return {text_of(status), known ? std::optional<float>(passed) : std::nullopt};
  }

 private:
  ProductShape shape(const Input& x, const Maps& out, const In<float, 4>& w) const {
    const auto size = [&](size_t d) { return static_cast<int64_t>(w.shape(d)); };
    const Maps& in = x.maps();
    ProductShape s = shape_;
    s.batch = in[0], s.in_h = in[1], s.in_w = in[2], s.in_c = in[3];
    s.out_h = out[1], s.out_w = out[2], s.out_c = out[3];
    s.kernel_h = size(2), s.kernel_w = size(3);
    if (out[0] != s.batch) fail("input and output have different batches");
    if (size(1) * groups_ != s.in_c || size(0) != s.out_c) fail("the weight does not fit input and output");
    return s;
  }

  static bitstrata::PooledGradient pooled_gradient(const std::tuple<In<uint8_t, 4>, PoolWindow>& pooled,
                                                   const ProductShape& s, const Matrix& gradient) {
    const auto& [places, window] = pooled;
    const bitstrata::PooledGradient out{pool_map(window, places), places.data()};
    const bitstrata::PoolMap& m = out.map;
    const auto size = [](const auto& a, size_t d) { return static_cast<int64_t>(a.shape(d)); };
    if (size(places, 0) != s.batch || m.in_h != s.out_h || m.in_w != s.out_w || m.channels != s.out_c)
      fail("places must be of the pooling of the result");
    if (gradient.dtype() != nb::dtype<float>() || size(gradient, 0) != s.batch * m.out_h * m.out_w ||
        size(gradient, 1) != m.channels)
      fail("the gradient of a pooling must be float32, of the shape of places");
    return out;
  }

  static void check_pixels_read(const ProductShape& s, const Input& x, const Maps& input) {
    const bool points = s.kernel_h == 1 && s.kernel_w == 1 && s.pad_top == 0 && s.pad_left == 0;
    if (x.get().norm != nullptr || !points || input != Maps{s.batch, s.out_h, s.out_w, s.in_c})
      fail("input must have the shape of what the convolution reads, or of what a 1x1 kernel without padding does");
  }

  static void check_scratch(const Bytes& scratch, size_t bytes) {
    if (scratch.shape(0) < bytes || reinterpret_cast<uintptr_t>(scratch.data()) % bitstrata::kScratchAlignment != 0)
      fail("scratch must hold " + std::to_string(bytes) + " bytes, aligned to " +
           std::to_string(bitstrata::kScratchAlignment));
  }

  template <typename Array>
  static auto data_of(const std::optional<Array>& a) -> decltype(a->data()) {
    return a.has_value() ? a->data() : nullptr;
  }

  ConvWeight weight(const In<float, 4>& w) const { return {w.data(), weight_bits_, scales_}; }

  ProductShape shape_{};
  int64_t groups_;
  int weight_bits_;
  WeightScales scales_;
  bitstrata::NormOptions options_;
  bitstrata::ShiftFormat gradient_;
};

}  // namespace

void bind_conv_norm(nb::module_& m) {
  nb::class_<Input>(m, "ConvInput")
      .def(nb::init<Codes, float, In<uint8_t, 1>, int, int, bool, bool>(), "codes"_a.noconvert(), "scale"_a,
           "exponents"_a.noconvert(), "bits"_a, "groups"_a, "signed"_a, "absorb"_a)
      .def_prop_ro("rests", &Input::rests)
      .def("rest", &Input::rest, "packed"_a.noconvert(), "isa"_a, "threads"_a)
      .def(nb::init<const BoundNorm&, In<int8_t, 4>, bool, int, int, bool, bool, float>(), nb::keep_alive<1, 2>(),
           "norm"_a, "normed"_a.noconvert(), "rectified"_a, "bits"_a, "groups"_a, "signed"_a, "absorb"_a, "clip"_a);
  nb::class_<ConvNorm>(m, "ConvNorm")
      .def(nb::init<Pair, Pair, Pair, int64_t, int, bool, int, bool, double, double, int, int, bool, bool>(),
           "stride"_a, "dilation"_a, "padding"_a, "groups"_a, "weight_bits"_a, "one_scale"_a, "norm_bits"_a, "l2"_a,
           "eps"_a, "factor"_a, "gradient_bits"_a, "gradient_groups"_a, "absorb"_a, "powers"_a)
      .def("scratch", &ConvNorm::scratch, "x"_a, "weight"_a.noconvert(), "result"_a)
      .def("forward", &ConvNorm::forward, "x"_a, "weight"_a.noconvert(), "gamma"_a.noconvert().none(),
           "beta"_a.noconvert().none(), "scratch"_a.noconvert(), "codes"_a.noconvert(), "isa"_a, "threads"_a)
      .def("backward", &ConvNorm::backward, "norm"_a, "codes"_a.noconvert(), "gradient"_a.noconvert(),
           "pooled"_a.none(), "scale"_a.noconvert().none(), "range"_a.none(), "rectified"_a, "noise"_a.none(),
           "product_noise"_a.none(), "x"_a, "weight"_a.noconvert(), "scratch"_a.noconvert(),
           "input"_a.noconvert().none(), "input_factor"_a.noconvert().none(), "of_weight"_a.noconvert().none(),
           "of_gamma"_a.noconvert().none(), "of_beta"_a.noconvert().none(), "isa"_a, "threads"_a);
}
