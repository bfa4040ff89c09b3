#include "bitstrata/conv_norm.h"

#include <cmath>

namespace bitstrata {
namespace {

struct QuantizedWeight {
  std::vector<int8_t> codes;
  std::vector<float> scale;
};

bool quantize(const Kernels& kernels, int threads, const ProductShape& s, const ConvWeight& w, bool by_output,
              QuantizedWeight* out) {
  const WeightShape shape{s.out_c, s.group_in(), s.kernel_h * s.kernel_w, s.groups};
  out->codes.resize(static_cast<size_t>(shape.elements()));
  out->scale.resize(static_cast<size_t>(by_output ? s.out_c : s.in_c));
  return weight_codes(kernels, threads, w.data, shape, w.bits, by_output, w.scales, out->codes.data(),
                      out->scale.data());
}

}  // namespace

std::unique_ptr<Norm> conv_norm_forward(const Kernels& kernels, int threads, const ProductShape& s,
                                        const ScaledCodes& x, const ConvWeight& weight, const NormOptions& options,
                                        const float* gamma, const float* beta, int32_t* acc, int8_t* codes,
                                        Status* status) {
  QuantizedWeight w;
  *status = Status::kWeight;
  if (!quantize(kernels, threads, s, weight, true, &w)) return nullptr;
  std::vector<int32_t> least(w.scale.size()), most(w.scale.size());
  std::vector<float> scale(w.scale.size());
  for (size_t i = 0; i < scale.size(); ++i) scale[i] = static_cast<float>(x.unit * static_cast<double>(w.scale[i]));
  ProductResult result;
  result.acc = acc;
  result.lo = least.data();
  result.hi = most.data();
  conv_forward(kernels, threads, s, x.codes, w.codes.data(), result);
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
                          const ConvNormGradient& g, const ScaledCodes& x, const ConvWeight& weight,
                          const ConvNormResult& out) {
  if (!norm.backward(g.real, g.range, codes, g.rectified, g.noise, out.gradient)) return Status::kNorm;
  const ShiftGrid grid = norm.gradient_codes(out.gradient, codes, g.format, g.product_noise, out.product_codes);
  if (std::isnan(grid.scale)) return Status::kProduct;
  const int last = g.format.groups - 1;
  const int32_t largest = ((1 << (g.format.bits - 1)) - 1) << (g.format.absorb ? last : 0);
  const double unit = std::ldexp(static_cast<double>(grid.scale), -last);
  std::vector<uint8_t> shift;
  std::vector<double> channel(grid.exponents.size(), unit);
  if (!g.format.absorb)
    for (size_t i = 0; i < channel.size(); ++i) {
      shift.push_back(static_cast<uint8_t>(last - grid.exponents[i]));
      channel[i] = std::ldexp(static_cast<double>(grid.scale), -grid.exponents[i]);
    }
  const ProductCodes gradient{out.product_codes, DType::s8, -largest, largest, shift.empty() ? nullptr : shift.data()};
  if (out.input != nullptr) {
    QuantizedWeight w;
    if (!quantize(kernels, threads, s, weight, false, &w)) return Status::kWeight;
    for (size_t i = 0; i < w.scale.size(); ++i)
      out.input_factor[i] = static_cast<float>(unit * static_cast<double>(w.scale[i]));
    ProductResult result;
    result.acc = out.input;
    conv_input_grad(kernels, threads, s, gradient, w.codes.data(), result);
  }
  if (out.weight != nullptr) {
    WeightGradResult result;
    result.values = out.weight;
    result.out_factor = channel.data();
    result.in_factor = x.channel;
    conv_weight_grad(kernels, threads, s, gradient, x.codes, result);
  }
  return Status::kDone;
}

}  // namespace bitstrata
