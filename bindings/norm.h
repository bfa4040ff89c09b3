// The engine's normalization of one batch as Python sees it.
#pragma once

#include <memory>

#include "arrays.h"

namespace bindings {

using bitstrata::Norm;
using bitstrata::NormOptions;

inline const float* channels_or_null(const char* name, const Vector& v, size_t channels) {
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

  Grid to_codes(In<int8_t, 2> codes, bool rectify, int bits, int groups, bool is_signed, bool absorb, float clip,
                NoiseKey key, Out<uint8_t, 2> out) const {
    check(codes);
    check_size("out", out, norm_.rows());
    const ShiftFormat f = format(bits, groups, is_signed, absorb, clip);
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

  nb::ndarray<nb::numpy, float> max_pool(In<int8_t, 2> codes, bool rectify, const PoolWindow& window, Out<float, 4> out,
                                         Out<uint8_t, 4> places) const {
    check(codes);
    const bitstrata::PoolMap s = pool_map(window, out);
    if (static_cast<int64_t>(out.shape(0)) * s.in_h * s.in_w != norm_.rows().rows ||
        s.channels != norm_.rows().channels)
      fail("out must be of the pooled images of the normalization");
    check_same_shape("places", places, out);
    std::vector<float> ranges;
    {
      nb::gil_scoped_release unlocked;
      ranges = norm_.max_pool(codes.data(), rectify, s, out.data(), places.data());
    }
    return array(ranges);
  }

  bool backward(Matrix gradient, Vector scale, std::optional<float> range, In<int8_t, 2> codes, bool rectify,
                NoiseKey key, Out<int8_t, 2> out) {
    check(codes);
    check_size("gradient", gradient, norm_.rows());
    check_size("out", out, norm_.rows());
    const RealTensor t = real(gradient, scale);
    if (t.bf16 != nullptr) fail("the gradient must be float32 or int32");
    const auto noise = noise_of(key);
    nb::gil_scoped_release unlocked;
    differentiated_ = norm_.backward(t, nullptr, range.has_value() ? &*range : nullptr, codes.data(), rectify,
                                     pointer(noise), out.data());
    return differentiated_;
  }

  void gradient_f32(In<int8_t, 2> gradient, In<int8_t, 2> codes, Out<float, 2> out) const {
    check_gradient(gradient, codes);
    check_size("out", out, norm_.rows());
    nb::gil_scoped_release unlocked;
    norm_.gradient_f32(gradient.data(), codes.data(), out.data());
  }

  Grid gradient_codes(In<int8_t, 2> gradient, In<int8_t, 2> codes, int bits, int groups, bool absorb, NoiseKey key,
                      Out<uint8_t, 2> out, bool powers) const {
    check_gradient(gradient, codes);
    check_size("out", out, norm_.rows());
    const ShiftFormat f = format(bits, groups, true, absorb, 1, powers);
    const auto noise = noise_of(key);
    ShiftGrid grid;
    {
      nb::gil_scoped_release unlocked;
      grid = norm_.gradient_codes(gradient.data(), codes.data(), f, pointer(noise), out.data());
    }
    return grid_of(grid);
  }

  explicit BoundNorm(std::unique_ptr<Norm> norm) : norm_(std::move(*norm)), ready_(true) {}

  void track(Out<float, 1> mean, Out<float, 1> deviation, double share) const {
    const size_t channels = static_cast<size_t>(norm_.rows().channels);
    if (mean.shape(0) != channels || deviation.shape(0) != channels)
      fail("mean and deviation must have one element for each channel");
    norm_.track(mean.data(), deviation.data(), share);
  }

  const Norm& norm() const { return norm_; }
  Norm& norm() { return norm_; }

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

}  // namespace bindings
