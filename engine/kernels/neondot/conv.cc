// Direct convolution by dot products: four output channels a vector of weights, several output pixels and up to four
// vectors a block.
//
// One step multiplies four bytes of each pixel's window with a vector of weights that holds, for each of four output
// channels, the four bytes that belong to them; the product takes the four bytes out of sixteen that are loaded
// together. Activations and weights are made s8 as in ../neon/conv.cc.
#include "../neon/output.h"
#include "../neon/signed_form.h"
#include "neondot.h"

namespace bitstrata {
namespace {

constexpr int kVectors = 4;  // of a set, at most
constexpr int kPixels = 8;   // of a block, at most

using Packed = StepWeights<4, kVectors, int8_t>;
struct Registers {
  using Vector = int8x16_t;
};
using Block = StepBlock<Packed, Registers>;

inline int8x16_t four_at(const uint8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

// Adds the products of `bytes` neighbours of kP pixels' windows, which start at at[i].
template <int kP, int kV>
inline void multiply(const uint8_t* const* at, const int8x16_t* w, int64_t bytes, int32x4_t (&sum)[kP][kV]) {
  int64_t b = 0;
  for (; b + 16 <= bytes; b += 16, w += 4 * kV) {
    int8x16_t x[kP];
    each<kP>([&](auto i) { x[i] = vreinterpretq_s8_u8(vld1q_u8(at[i] + b)); });
    each<4>([&](auto k) {
      each<kV>([&](auto j) {
        const int8x16_t weights = w[k * kV + j];
        each<kP>([&](auto i) { sum[i][j] = vdotq_laneq_s32(sum[i][j], weights, x[i], k); });
      });
    });
  }
  for (; b < bytes; b += 4, w += kV)
    each<kP>([&](auto i) {
      const int8x16_t x = four_at(at[i] + b);
      each<kV>([&](auto j) { sum[i][j] = vdotq_s32(sum[i][j], w[j], x); });
    });
}

template <int kP, int kV>
void convolve(const Block& b) {
  int32x4_t sum[kP][kV];
  begin_sums(b, sum);
  const int8x16_t* w = b.weights;
  for (int64_t run = 0; run < b.p.runs.count; ++run, w += b.p.run_steps * kV) {
    const int64_t offset = b.p.runs.offset(run);
    const uint8_t* at[kP];
    each<kP>([&](auto i) { at[i] = b.window[i] + offset; });
    multiply<kP, kV>(at, w, b.p.runs.elements, sum);
  }
  finish_sums(b, sum);
}

using BlockFn = void (*)(const Block&);
template <int kV>
constexpr BlockFn kBlocks[kPixels] = {convolve<1, kV>, convolve<2, kV>, convolve<3, kV>, convolve<4, kV>,
                                      convolve<5, kV>, convolve<6, kV>, convolve<7, kV>, convolve<8, kV>};
constexpr const BlockFn* kBySet[kVectors] = {kBlocks<1>, kBlocks<2>, kBlocks<3>, kBlocks<4>};

struct NeonDotConv {
  using Packed = bitstrata::Packed;
  using Registers = bitstrata::Registers;
  using Block = bitstrata::Block;
  static Packed packed_of(const ConvShape& s, bool direct) { return Packed(s, signed_form(s), direct, INT32_MAX); }
  // With the sums, a load of each pixel and one of weights in 32 registers.
  static int64_t pixels_of(int64_t vectors) {
    constexpr int64_t kMost[kVectors] = {8, 8, 7, 5};
    return kMost[vectors - 1];
  }
  static BlockFn block(const Packed&, int64_t vectors, int64_t pixels) { return kBySet[vectors - 1][pixels - 1]; }
};

}  // namespace

extern const ConvKernel kNeonDotConv = StepConv<NeonDotConv>::staged("neon-dot");
extern const ConvKernel kNeonDotDirect = StepConv<NeonDotConv>::direct("neon-dot-direct");

}  // namespace bitstrata
