// The table of products with AVX-512 BF16. Compiled for any processor: this runs before the processor is known.
#include "avx512bf16.h"

namespace bitstrata {

extern const FloatProducts kGenericFloatProducts;
extern const FloatWeightGradKernel kAvx512Bf16WeightGrad;
namespace {

const FloatProducts kProducts = {"avx512bf16",
                                 [](const ConvShape& s) { return kGenericFloatProducts.input_gradient(s); },
                                 [](const ConvShape&) { return &kAvx512Bf16WeightGrad; }};

}  // namespace

const FloatProducts* avx512bf16_products() {
  static const bool yes = __builtin_cpu_supports("avx512bf16");
  return yes ? &kProducts : nullptr;
}

}  // namespace bitstrata
