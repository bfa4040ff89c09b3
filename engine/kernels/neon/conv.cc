// Direct convolution on NEON: eight output channels a vector of weights, several output pixels and up to two vectors a
// block.
//
// One step multiplies two bytes of each pixel's window, broadcast to all lanes, with a vector of weights that holds,
// for each of eight output channels, the two bytes that belong to them. Products of s8 are summed in int16 for as many
// steps as are proved to fit, from the actual weights and the input's bounds, then added in pairs to int32. Activations
// above 127 are staged with an offset that makes them signed; what it adds is constant in each channel, and taken off
// where the sums begin. Weights mul*c + add that leave s8 are applied as mul * sum(c*a) + add * sum(a).
#include "neon.h"
#include "output.h"
#include "signed_form.h"

namespace bitstrata {
namespace {

constexpr int kVectors = 2;        // of a set, at most: two serve each broadcast
constexpr int kPixels = 8;         // of a block, at most
constexpr int64_t kLeastLong = 8;  // where int16 holds fewer steps, sums are widened every second step, or every step

struct Packed : StepWeights<8, kVectors, int8_t, 2> {
  Packed(const ConvShape& s, const WeightForm& form, bool direct)
      : StepWeights(s, form, direct, INT32_MAX), together(products_in_int16(s, form)) {}
  int64_t together;  // steps whose products an int16 holds
};
struct Registers {
  using Vector = int8x16_t;
};
using Block = StepBlock<Packed, Registers>;

template <int kP, int kV>
using Sums = int32x4_t[kP][2 * kV];

// Hides from the compiler that the vector comes from memory. It would else load every two bytes of it anew, by way of a
// general register.
inline int8x16_t load(const uint8_t* x) {
  int8x16_t v = vreinterpretq_s8_u8(vld1q_u8(x));
  __asm__("" : "+w"(v));
  return v;
}
template <int kStep>
inline int8x16_t two_of(int8x16_t x) {
  return vreinterpretq_s8_s16(vdupq_laneq_s16(vreinterpretq_s16_s8(x), kStep));
}
inline int8x16_t two_at(const uint8_t* x) {
  int16_t two;
  std::memcpy(&two, x, 2);
  return vreinterpretq_s8_s16(vdupq_n_s16(two));
}

// kG steps of which an int16 holds the products: theirs are added to the sums. a(i, g): of pixel i, step g.
template <int kG, int kP, int kV, typename Activations>
inline void add_short(const int8x16_t* w, const Activations& a, Sums<kP, kV>& sum) {
  each<kP>([&](auto i) {
    int8x16_t x[kG];
    each<kG>([&](auto g) { x[g] = a(i, g); });
    each<kV>([&](auto j) {
      int16x8_t low = vmull_s8(vget_low_s8(w[j]), vget_low_s8(x[0])), high = vmull_high_s8(w[j], x[0]);
      each<kG - 1>([&](auto g) {
        const int8x16_t more = w[(g + 1) * kV + j];
        low = vmlal_s8(low, vget_low_s8(more), vget_low_s8(x[g + 1]));
        high = vmlal_high_s8(high, more, x[g + 1]);
      });
      sum[i][2 * j] = vpadalq_s16(sum[i][2 * j], low);
      sum[i][2 * j + 1] = vpadalq_s16(sum[i][2 * j + 1], high);
    });
  });
}

// `steps` neighbouring steps of a run, kG at a time.
template <int kG, int kP, int kV>
inline void multiply_short(const uint8_t* const* at, const int8x16_t* w, int64_t steps, Sums<kP, kV>& sum) {
  int64_t s = 0;
  for (; s + 8 <= steps; s += 8, w += 8 * kV) {
    int8x16_t x[kP];
    each<kP>([&](auto i) { x[i] = load(at[i] + 2 * s); });
    each<8 / kG>([&](auto k) {
      add_short<kG, kP, kV>(w + k * kG * kV, [&](auto i, auto g) { return two_of<k * kG + g>(x[i]); }, sum);
    });
  }
  for (; s < steps; ++s, w += kV) add_short<1, kP, kV>(w, [&](auto i, auto) { return two_at(at[i] + 2 * s); }, sum);
}

template <int kP, int kV>
using ShortSums = int16x8_t[kP][2 * kV];

template <int kP, int kV, typename Activations>
inline void add_long(const int8x16_t* w, const Activations& a, ShortSums<kP, kV>& sum) {
  each<kP>([&](auto i) {
    const int8x16_t x = a(i);
    each<kV>([&](auto j) {
      sum[i][2 * j] = vmlal_s8(sum[i][2 * j], vget_low_s8(w[j]), vget_low_s8(x));
      sum[i][2 * j + 1] = vmlal_high_s8(sum[i][2 * j + 1], w[j], x);
    });
  });
}

template <int kP, int kV>
inline void multiply_long(const uint8_t* const* at, const int8x16_t* w, int64_t steps, ShortSums<kP, kV>& sum) {
  int64_t s = 0;
  for (; s + 8 <= steps; s += 8, w += 8 * kV) {
    int8x16_t x[kP];
    each<kP>([&](auto i) { x[i] = load(at[i] + 2 * s); });
    each<8>([&](auto k) { add_long<kP, kV>(w + k * kV, [&](auto i) { return two_of<k>(x[i]); }, sum); });
  }
  for (; s < steps; ++s, w += kV) add_long<kP, kV>(w, [&](auto i) { return two_at(at[i] + 2 * s); }, sum);
}

// Moves int16 sums to the int32 ones.
template <int kP, int kV>
inline void widen(ShortSums<kP, kV>& from, Sums<kP, kV>& sum) {
  each<kP>([&](auto i) {
    each<2 * kV>([&](auto j) {
      sum[i][j] = vpadalq_s16(sum[i][j], from[i][j]);
      from[i][j] = vdupq_n_s16(0);
    });
  });
}

// Calls multiply(at, w, steps) for each run of the window, at most `most` steps at a time and `most` between two calls
// of full().
template <int kP, int kV, typename Multiply, typename Full>
inline void each_run(const Block& b, int64_t most, const Multiply& multiply, const Full& full) {
  const int8x16_t* w = b.weights;
  int64_t left = most;
  for (int64_t run = 0; run < b.p.runs.count; ++run) {
    const int64_t offset = b.p.runs.offset(run);
    for (int64_t s = 0; s < b.p.run_steps;) {
      const int64_t rest = b.p.run_steps - s, count = rest < left ? rest : left;
      const uint8_t* at[kP];
      each<kP>([&](auto i) { at[i] = b.window[i] + offset + 2 * s; });
      multiply(at, w, count);
      w += count * kV, s += count, left -= count;
      if (left == 0) {
        full();
        left = most;
      }
    }
  }
}

template <int kP, int kV>
void convolve_long(const Block& b) {
  Sums<kP, kV> sum;
  ShortSums<kP, kV> part;
  begin_sums(b, sum);
  each<kP>([&](auto i) { each<2 * kV>([&](auto j) { part[i][j] = vdupq_n_s16(0); }); });
  each_run<kP, kV>(
      b, b.p.together,
      [&](const uint8_t* const* at, const int8x16_t* w, int64_t steps) { multiply_long<kP, kV>(at, w, steps, part); },
      [&] { widen<kP, kV>(part, sum); });
  widen<kP, kV>(part, sum);
  finish_sums(b, sum);
}

template <int kG, int kP, int kV>
void convolve_short(const Block& b) {
  Sums<kP, kV> sum;
  begin_sums(b, sum);
  each_run<kP, kV>(
      b, INT32_MAX,
      [&](const uint8_t* const* at, const int8x16_t* w, int64_t steps) {
        multiply_short<kG, kP, kV>(at, w, steps, sum);
      },
      [] {});
  finish_sums(b, sum);
}

using BlockFn = void (*)(const Block&);
enum Widening { every_step, every_second, seldom };

template <int kP, int kV>
constexpr BlockFn kByWidening[3] = {convolve_short<1, kP, kV>, convolve_short<2, kP, kV>, convolve_long<kP, kV>};
constexpr const BlockFn* kOfOne[kPixels] = {kByWidening<1, 1>, kByWidening<2, 1>, kByWidening<3, 1>, kByWidening<4, 1>,
                                            kByWidening<5, 1>, kByWidening<6, 1>, kByWidening<7, 1>, kByWidening<8, 1>};
constexpr const BlockFn* kOfTwo[] = {kByWidening<1, 2>, kByWidening<2, 2>, kByWidening<3, 2>, kByWidening<4, 2>};

struct NeonConv {
  using Packed = bitstrata::Packed;
  using Registers = bitstrata::Registers;
  using Block = bitstrata::Block;
  static Packed packed_of(const ConvShape& s, bool direct) { return Packed(s, signed_form(s), direct); }
  // With 16 vectors of sums, the activations, the weights and a broadcast in 32 registers.
  static int64_t pixels_of(int64_t vectors) { return vectors == kVectors ? 4 : kPixels; }
  static BlockFn block(const Packed& p, int64_t vectors, int64_t pixels) {
    const Widening widening = p.together >= kLeastLong ? seldom : p.together >= 2 ? every_second : every_step;
    return (vectors == kVectors ? kOfTwo : kOfOne)[pixels - 1][widening];
  }
};

}  // namespace

bool neon_direct_fits(const ConvShape& s) { return signed_form(s).whole && reads_image(s, signed_form(s)); }

extern const ConvKernel kNeonConv = StepConv<NeonConv>::staged("neon");
extern const ConvKernel kNeonDirect = StepConv<NeonConv>::direct("neon-direct");

}  // namespace bitstrata
