// The weight gradient on NEON by products of s8, four positions a step. Unsigned codes get an offset of -128 that makes
// them signed. See ../common/pointwise.h for the unnamed namespace.
#pragma once

#include <arm_neon.h>

#include <cstring>

#include "../common/weight_grad_lanes.h"

namespace bitstrata {
namespace {

// What both forms of the products share. Eight outputs and three vectors: their sums, the vectors, one broadcast and
// what a product needs beside them are 32 registers.
struct NeonLanes {
  using Vector = int32x4_t;
  static constexpr int kLanes = 4, kStep = 4, kOuts = 8, kVectors = 3, kOffset = -128;
  static constexpr DType kOffsetOf = DType::u8;

  static Vector zero() { return vdupq_n_s32(0); }
  static Vector load(const int32_t* p) { return vld1q_s32(p); }
  static void store(int32_t* p, Vector v) { vst1q_s32(p, v); }
  static Vector load_packed(const void* p) { return vld1q_s32(static_cast<const int32_t*>(p)); }
  static int8x16_t bytes(Vector v) { return vreinterpretq_s8_s32(v); }

  static uint8x8_t four(const uint8_t* p) {
    uint32_t bytes;
    std::memcpy(&bytes, p, 4);
    return vreinterpret_u8_u32(vdup_n_u32(bytes));
  }
  static uint8x16_t sign(bool is_signed) { return vdupq_n_u8(is_signed ? 0 : 128); }

  // [output][position]
  static void pack_gradient(const uint8_t* from, int64_t pitch, uint8_t* to) {
    const uint8x8_t a = vld1_u8(from), b = vld1_u8(from + pitch), c = vld1_u8(from + 2 * pitch),
                    d = vld1_u8(from + 3 * pitch);
    const uint16x8_t ab = vreinterpretq_u16_u8(vcombine_u8(vzip1_u8(a, b), vzip2_u8(a, b))),
                     cd = vreinterpretq_u16_u8(vcombine_u8(vzip1_u8(c, d), vzip2_u8(c, d)));
    vst1q_u8(to, vreinterpretq_u8_u16(vzip1q_u16(ab, cd)));
    vst1q_u8(to + 16, vreinterpretq_u8_u16(vzip2q_u16(ab, cd)));
  }

  static void add_outs(const uint8_t* packed, int64_t count, int32_t* sums) {
    Vector low = zero(), high = zero();
    for (int64_t i = 0; i < count; ++i, packed += kOuts * 4) {
      low = vpadalq_s16(low, vpaddlq_s8(vreinterpretq_s8_u8(vld1q_u8(packed))));
      high = vpadalq_s16(high, vpaddlq_s8(vreinterpretq_s8_u8(vld1q_u8(packed + 16))));
    }
    vst1q_s32(sums, low);
    vst1q_s32(sums + 4, high);
  }
};

}  // namespace
}  // namespace bitstrata
