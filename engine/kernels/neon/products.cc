// The integer products of the NEON row: weight gradients by products of s8, added to int32 in pairs.
#include "../common/product_loops.h"
#include "../common/weight_grad_plain.h"
#include "neon.h"
#include "weight_grad.h"

namespace bitstrata {
namespace {

// A vector of codes is [pair of positions][lane][position of the pair], so that pairs are neighbours.
struct Neon : NeonLanes {
  static Vector broadcast(const void* p) {
    const uint8_t places[16] = {0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 2, 3};
    const uint8x8_t g = four(static_cast<const uint8_t*>(p));
    return vreinterpretq_s32_u8(vqtbl1q_u8(vcombine_u8(g, g), vld1q_u8(places)));
  }
  static Vector multiply(Vector sum, Vector codes, Vector gradient) {
    sum = vpadalq_s16(sum, vmull_s8(vget_low_s8(bytes(codes)), vget_low_s8(bytes(gradient))));
    return vpadalq_s16(sum, vmull_high_s8(bytes(codes), bytes(gradient)));
  }
  static void pack_codes(const uint8_t* from, int64_t pitch, bool is_signed, uint8_t* to) {
    const uint8x8_t ab = vzip1_u8(four(from), four(from + pitch)),
                    cd = vzip1_u8(four(from + 2 * pitch), four(from + 3 * pitch));
    vst1q_u8(to, veorq_u8(vcombine_u8(ab, cd), sign(is_signed)));
  }
};

constexpr WeightGradKernel kWeightGrad = LanesWeightGrad<Neon>::kernel("neon");
constexpr WeightGradKernel kDepthwise = PlainWeightGrad::kernel("neon-depthwise");

const WeightGradKernel* pick_weight_grad(const ConvShape& s) {
  return PlainWeightGrad::depthwise(s) && s.groups > 1 ? &kDepthwise : &kWeightGrad;
}

}  // namespace

const ProductKernels kNeonProducts = product_kernels(pick_weight_grad);

}  // namespace bitstrata
