// The table of products with AVX-512 BF16. Compiled for any processor: this runs before the processor is known.
#include "avx512bf16.h"

namespace bitstrata {
namespace {

bool dense_3x3(const ConvShape& s) {
  return s.kernel_h == 3 && s.kernel_w == 3 && s.stride_h == 1 && s.stride_w == 1 && s.dilation_h == 1 &&
         s.dilation_w == 1;
}

// Whether tiles of two gradients and four codes are computed in fewer products, lanes and positions that are padding
// included, with codes whose sums bfloat16 holds.
bool by_tiles(const ConvShape& s) {
  if (!dense_3x3(s)) return false;
  if (s.input_lo < -128 || s.input_hi > 128) return false;
  const int64_t tiles = (s.out_w + 3) / 4 * 4 * ((s.in_c + 15) / 16);
  const int64_t direct = (s.out_w + 1) / 2 * ((3 * s.in_c + 15) / 16);
  return tiles * 9 <= direct * 8;  // transforming tiles takes some time
}

const FloatWeightGradKernel* pick_weight_grad(const ConvShape& s) {
  return by_tiles(s) ? &kAvx512Bf16TilesWeightGrad : &kAvx512Bf16WeightGrad;
}

// Tiles of two pixels, with weights whose sums of three bfloat16 holds. Of few channels transforming them takes what
// they save; narrow maps leave half a tile unused.
const InputGradientKernel* pick_input_gradient(const ConvShape& s, int64_t largest) {
  const bool tiles = dense_3x3(s) && 3 * largest <= 256 && s.in_c > 16 && s.out_c > 16 && s.in_w > 3;
  return tiles ? &kAvx512Bf16TilesInputGradient : &kAvx512Bf16InputGradient;
}

const FloatProducts kProducts = {"avx512bf16", pick_input_gradient, pick_weight_grad};

}  // namespace

const FloatProducts* avx512bf16_products() {
  static const bool yes = __builtin_cpu_supports("avx512bf16");
  return yes ? &kProducts : nullptr;
}

}  // namespace bitstrata
