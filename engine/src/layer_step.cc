#include "bitstrata/layer_step.h"

#include <cmath>

#include "scaled_codes.h"
#include "workspace.h"

namespace bitstrata {
namespace {

enum Shared { kCodes, kWeightCodes };  // buffers

int exponent_bits(int groups) {
  int bits = 0;
  while ((1 << bits) < groups) ++bits;
  return bits;
}

int8_t* weight_buffer(Workspace& memory, const ProductShape& s, const ConvWeight& w) {
  return reinterpret_cast<int8_t*>(memory.get(kWeightCodes, w.codes != nullptr ? 0 : weight_shape(s).elements()));
}

void input_gradient(const Kernels& kernels, int threads, const ProductShape& s, const ScaledCodes& g, const int8_t* w,
                    const std::vector<float>& w_scale, float* out) {
  const std::vector<float> factor = sum_factors(g.unit, w_scale);
  ProductResult result;
  result.values = out;
  result.factor = factor.data();
  conv_input_grad(kernels, threads, s, g.codes, w, result);
}

Made unpacked(const Kernels& kernels, int threads, const ProductShape& s, const KeptCodes& kept, Workspace& memory) {
  const int64_t count = s.batch * s.in_h * s.in_w * s.in_c;
  uint8_t* codes = memory.get(kCodes, count);
  unpack_codes(kernels, threads, kept.packed, count, kept.format.bits, kept.format.is_signed, codes);
  const ShiftGrid grid{kept.scale, unpack_exponents(kept.exponents, s.in_c, kept.format.groups)};
  return made(grid, kept.format, kept.format.is_signed, codes);
}

void product(const Kernels& kernels, int threads, const ProductShape& s, const ScaledCodes& x, const int8_t* w,
             const std::vector<float>& w_scale, const float* bias, float* y) {
  const std::vector<float> factor = sum_factors(x.unit, w_scale);
  ProductResult result;
  result.values = y;
  result.factor = factor.data();
  result.bias = bias;
  conv_forward(kernels, threads, s, x.codes, w, result);
}

void weight_gradient(const Kernels& kernels, int threads, const ProductShape& s, const ScaledCodes& g,
                     const KeptCodes& kept, float* out) {
  Workspaces memory(1);  // of its own, so that the gradient's codes stay
  const Made x = unpacked(kernels, threads, s, kept, memory[0]);
  WeightGradResult result;
  result.values = out;
  result.out_factor = g.channel;
  result.in_factor = x.side.channel;
  conv_weight_grad(kernels, threads, s, g.codes, x.side.codes, result);
}

}  // namespace

StepStatus layer_forward(const Kernels& kernels, int threads, const ProductShape& s, const RealTensor& x,
                         const ShiftFormat& format, const Noise* noise, const ConvWeight& weight, const float* bias,
                         float* y, uint8_t* packed, ShiftGrid* grid) {
  const Rows rows{kernels, threads, s.batch * s.in_h * s.in_w, s.in_c};
  Workspaces memory(1);
  uint8_t* codes = memory[0].get(kCodes, rows.elements());
  *grid = shift_codes(rows, x, format, noise, codes);
  if (std::isnan(grid->scale)) return StepStatus::kReal;
  std::vector<float> w_scale;
  const int8_t* w = quantized(kernels, threads, s, weight, true, weight_buffer(memory[0], s, weight), &w_scale);
  if (w == nullptr) return StepStatus::kWeight;
  if (packed != nullptr) pack_codes(kernels, threads, codes, rows.elements(), format.bits, packed);
  const Made side = made(*grid, format, format.is_signed, codes);
  product(kernels, threads, s, side.side, w, w_scale, bias, y);
  return StepStatus::kDone;
}

StepStatus layer_again(const Kernels& kernels, int threads, const ProductShape& s, const KeptCodes& x,
                       const ConvWeight& weight, const float* bias, float* y) {
  Workspaces memory(1);
  std::vector<float> w_scale;
  const int8_t* w = quantized(kernels, threads, s, weight, true, weight_buffer(memory[0], s, weight), &w_scale);
  if (w == nullptr) return StepStatus::kWeight;
  product(kernels, threads, s, unpacked(kernels, threads, s, x, memory[0]).side, w, w_scale, bias, y);
  return StepStatus::kDone;
}

StepStatus layer_backward(const Kernels& kernels, int threads, const ProductShape& s, const RealTensor& gradient,
                          const ShiftFormat& format, const Noise* noise, const KeptCodes* x, const ConvWeight& weight,
                          const LayerGradients& out) {
  const Rows rows{kernels, threads, s.batch * s.out_h * s.out_w, s.out_c};
  Workspaces memory(1);
  uint8_t* codes = memory[0].get(kCodes, rows.elements());
  const ShiftGrid grid = shift_codes(rows, gradient, format, noise, codes);
  if (std::isnan(grid.scale)) return StepStatus::kReal;
  const Made g = made(grid, format, true, codes);
  if (out.input != nullptr) {
    std::vector<float> w_scale;
    const int8_t* w = quantized(kernels, threads, s, weight, false, weight_buffer(memory[0], s, weight), &w_scale);
    if (w == nullptr) return StepStatus::kWeight;
    input_gradient(kernels, threads, s, g.side, w, w_scale, out.input);
  }
  if (out.weight != nullptr) weight_gradient(kernels, threads, s, g.side, *x, out.weight);
  if (out.bias != nullptr) {
    const std::vector<int64_t> sums = code_sums(rows, reinterpret_cast<const int8_t*>(codes));
    for (size_t c = 0; c < sums.size(); ++c)
      out.bias[c] = static_cast<float>(static_cast<double>(sums[c]) * g.side.channel[c]);
  }
  return StepStatus::kDone;
}

std::vector<uint8_t> pack_exponents(const std::vector<uint8_t>& exponents, int groups) {
  const size_t width = static_cast<size_t>(exponent_bits(groups));
  std::vector<uint8_t> out((exponents.size() * width + 7) / 8, 0);
  for (size_t i = 0; i < exponents.size(); ++i)
    for (size_t b = 0; b < width; ++b)
      out[(i * width + b) / 8] |= static_cast<uint8_t>((exponents[i] >> b & 1) << (i * width + b) % 8);
  return out;
}

std::vector<uint8_t> unpack_exponents(const uint8_t* packed, int64_t count, int groups) {
  const size_t width = static_cast<size_t>(exponent_bits(groups));
  std::vector<uint8_t> out(static_cast<size_t>(count), 0);
  for (size_t i = 0; i < out.size(); ++i)
    for (size_t b = 0; b < width; ++b)
      out[i] |= static_cast<uint8_t>((packed[(i * width + b) / 8] >> (i * width + b) % 8 & 1) << b);
  return out;
}

}  // namespace bitstrata
