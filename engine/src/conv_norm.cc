#include "bitstrata/conv_norm.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "quantize_rows.h"
#include "scaled_codes.h"

namespace bitstrata {
namespace {

// Of an input's gradient: the largest magnitude of what passes the normalization that the input is the result of.
class PassedRange : public SumReader {
 public:
  PassedRange(const ConvInput& input, const float* factor)
      : norm_(*input.norm),
        codes_(input.normed),
        pass_(norm_.passes(input.rectified)),
        factor_(repeated(std::vector<float>(factor, factor + norm_.rows().channels), norm_.period())) {}

  void begin(int threads) override {
    parts_.assign(static_cast<size_t>(threads), std::vector<float>(factor_.size(), 0.0f));
  }

  void read(int thread, const int32_t* sums, int64_t at, int64_t count) override {
    norm_.rows().kernels.training->gradient_range_i32(sums, codes_ + at, count, norm_.period(), factor_.data(), pass_,
                                                      parts_[static_cast<size_t>(thread)].data());
  }

  float result() const {
    float top = 0;
    for (const auto& part : parts_)
      for (float v : part) top = larger(top, v);
    return top;
  }

 private:
  const Norm& norm_;
  const int8_t* codes_;
  PassArgs pass_;
  std::vector<float> factor_;
  std::vector<std::vector<float>> parts_;
};

int64_t inputs(const ProductShape& s) { return s.batch * s.in_h * s.in_w * s.in_c; }
int64_t results(const ProductShape& s) { return s.batch * s.out_h * s.out_w * s.out_c; }

Made codes_of(const Kernels& kernels, int threads, const ProductShape& s, const ConvInput& x, uint8_t* scratch) {
  if (x.codes != nullptr) return made(*x.grid, x.format, x.format.is_signed, x.codes);
  if (x.packed != nullptr) {
    unpack_codes(kernels, threads, x.packed, inputs(s), x.format.bits, x.format.is_signed, scratch);
    ShiftFormat bare = x.format;
    bare.absorb = false;
    return made(*x.grid, bare, bare.is_signed, scratch);
  }
  const ShiftGrid grid = x.norm->to_codes(x.normed, x.rectified, x.format, nullptr, scratch);
  return made(grid, x.format, x.format.is_signed && !x.rectified, scratch);
}

size_t aligned(int64_t bytes) {
  return (static_cast<size_t>(bytes) + kScratchAlignment - 1) / kScratchAlignment * kScratchAlignment;
}
// For codes that are there neither now nor, in the backward pass, later.
size_t input_scratch(const ProductShape& s, const ConvInput& x, bool backward) {
  return x.codes != nullptr && !(backward && rests(x.format)) ? 0 : aligned(inputs(s));
}
size_t weight_scratch(const ProductShape& s) { return aligned(weight_shape(s).elements()); }

// The same product on the pixels that it reads alone.
ProductShape pixels_read(ProductShape s) {
  s.in_h = s.out_h, s.in_w = s.out_w, s.stride_h = s.stride_w = 1;
  return s;
}

// Forward: codes of the input, of the weight, sums. Backward: codes of the weight and then of the input, which are not
// needed together; codes of the gradient.
size_t before_sums(const ProductShape& s, const ConvInput& x) { return input_scratch(s, x, false) + weight_scratch(s); }
size_t before_gradient(const ProductShape& s, const ConvInput& x) {
  return std::max(input_scratch(s, x, true), weight_scratch(s));
}

}  // namespace

size_t conv_norm_forward_scratch(const ProductShape& s, const ConvInput& x) {
  return before_sums(s, x) + aligned(4 * results(s));
}
size_t conv_norm_backward_scratch(const ProductShape& s, const ConvInput& x) {
  return before_gradient(s, x) + aligned(results(s));
}

std::unique_ptr<Norm> conv_norm_forward(const Kernels& kernels, int threads, const ProductShape& s,
                                        const ConvInput& input, const ConvWeight& weight, const NormOptions& options,
                                        const float* gamma, const float* beta, uint8_t* scratch, int8_t* codes,
                                        Status* status) {
  std::vector<float> w_scale;
  const int8_t* w = quantized(kernels, threads, s, weight, true,
                              reinterpret_cast<int8_t*>(scratch + input_scratch(s, input, false)), &w_scale);
  *status = Status::kWeight;
  if (w == nullptr) return nullptr;
  const Made x = codes_of(kernels, threads, s, input, scratch);
  int32_t* acc = reinterpret_cast<int32_t*>(scratch + before_sums(s, input));
  std::vector<int32_t> least(w_scale.size()), most(w_scale.size());
  const std::vector<float> scale = sum_factors(x.side.unit, w_scale);
  ProductResult result;
  result.acc = acc;
  result.lo = least.data();
  result.hi = most.data();
  conv_forward(kernels, threads, s, x.side.codes, w, result);
  auto norm =
      std::make_unique<Norm>(Rows{kernels, threads, s.batch * s.out_h * s.out_w, s.out_c}, options, gamma, beta);
  RealTensor sums;
  sums.i32 = acc;
  sums.scale = scale.data();
  *status = Status::kNorm;
  if (!norm->forward(sums, least.data(), most.data(), codes)) return nullptr;
  *status = Status::kDone;
  return norm;
}

Status conv_norm_backward(const Kernels& kernels, int threads, const ProductShape& s, Norm& norm, const int8_t* codes,
                          const ConvNormGradient& g, const ConvInput& input, const ConvWeight& weight,
                          const ConvNormResult& out) {
  uint8_t* product_codes = out.scratch + before_gradient(s, input);
  int8_t* normed = reinterpret_cast<int8_t*>(product_codes);  // the codes of one gradient in the place of the other's
  if (!norm.backward(g.real, g.pooled, g.range, codes, g.rectified, g.noise, normed)) return Status::kNorm;
  const ShiftGrid grid = norm.gradient_codes(normed, codes, g.format, g.product_noise, product_codes);
  if (std::isnan(grid.scale)) return Status::kProduct;
  const Made gradient = made(grid, g.format, true, product_codes);
  if (out.input != nullptr) {
    std::vector<float> w_scale;
    const int8_t* w = quantized(kernels, threads, s, weight, false, reinterpret_cast<int8_t*>(out.scratch), &w_scale);
    if (w == nullptr) return Status::kWeight;
    const std::vector<float> factor = sum_factors(gradient.side.unit, w_scale);
    std::copy(factor.begin(), factor.end(), out.input_factor);
    ProductResult result;
    result.acc = out.input;
    std::optional<PassedRange> range;
    if (input.norm != nullptr && out.input_range != nullptr) result.reader = &range.emplace(input, out.input_factor);
    conv_input_grad(kernels, threads, out.dense ? s : pixels_read(s), gradient.side.codes, w, result);
    if (range) *out.input_range = range->result();
  }
  if (out.weight != nullptr) {
    const Made x = codes_of(kernels, threads, s, input, out.scratch);
    WeightGradResult result;
    result.values = out.weight;
    result.out_factor = gradient.side.channel;
    result.in_factor = x.side.channel;
    conv_weight_grad(kernels, threads, s, gradient.side.codes, x.side.codes, result);
  }
  if (out.gamma != nullptr) std::copy(norm.weight_gradient().begin(), norm.weight_gradient().end(), out.gamma);
  if (out.beta != nullptr) std::copy(norm.bias_gradient().begin(), norm.bias_gradient().end(), out.beta);
  return Status::kDone;
}

}  // namespace bitstrata
