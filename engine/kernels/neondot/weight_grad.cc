// The weight gradient of the dot product row: four positions of a lane are one dot product.
#include "../neon/weight_grad.h"

#include "neondot.h"

namespace bitstrata {
namespace {

// A vector of codes is [lane][position].
struct NeonDot : NeonLanes {
  static Vector broadcast(const void* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return vdupq_n_s32(four);
  }
  static Vector multiply(Vector sum, Vector codes, Vector gradient) {
    return vdotq_s32(sum, bytes(codes), bytes(gradient));
  }
  static void pack_codes(const uint8_t* from, int64_t pitch, bool is_signed, uint8_t* to) {
    const uint16x4_t ab = vreinterpret_u16_u8(vzip1_u8(four(from), four(from + pitch))),
                     cd = vreinterpret_u16_u8(vzip1_u8(four(from + 2 * pitch), four(from + 3 * pitch)));
    const uint16x8_t codes = vcombine_u16(vzip1_u16(ab, cd), vzip2_u16(ab, cd));
    vst1q_u8(to, veorq_u8(vreinterpretq_u8_u16(codes), sign(is_signed)));
  }
};

}  // namespace

extern const WeightGradKernel kNeonDotWeightGrad = LanesWeightGrad<NeonDot>::kernel("neon-dot");

}  // namespace bitstrata
