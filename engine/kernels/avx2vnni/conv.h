// Direct convolution with VNNI on 256 bits: eight output channels a vector, several output pixels and up to two vectors
// a block. See ../common/pointwise.h for the unnamed namespace.
//
// One step multiplies four bytes of each pixel's window, broadcast to all lanes, with a vector of weights that holds,
// for each of eight output channels, the four bytes that belong to them. Signed activations are staged with an offset
// that makes them unsigned; what it adds is constant in each channel, and taken off where the sums begin. Weights
// mul*c + add that leave s8 are applied as mul * sum(c*a) + add * sum(a).
#pragma once

#include <immintrin.h>

#include "../common/step_conv.h"
#include "../common/store_lanes.h"
#include "../common/unroll.h"
#include "dot.h"

namespace bitstrata {
namespace {

constexpr int kLanes = 8;    // output channels of a vector
constexpr int kVectors = 2;  // of a set, at most: two serve each broadcast
constexpr int kPixels = 8;   // of a block, at most: their window's addresses fill the general registers

using Packed = StepWeights<kLanes, kVectors>;
struct Registers {
  using Vector = __m256i;
};
using Block = StepBlock<Packed, Registers>;

inline __m256i broadcast(const uint8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

inline __m256i load(const int32_t* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }

// Hides from the compiler where an address comes from. It would else keep parts of the sum that outlive the inner loop
// in vector registers, and move one to a general register for every load.
inline const uint8_t* in_register(const uint8_t* address) {
  __asm__("" : "+r"(address));
  return address;
}

// Adds the products of kP runs of `bytes` bytes, which start at x[i] + offset, and kV vectors of weights to the sums;
// moves to the weights after them.
template <int kP, int kV>
inline void multiply_run(const uint8_t* const* x, int64_t offset, int64_t bytes, const __m256i*& w,
                         __m256i (&sum)[kP][kV]) {
  const uint8_t* at[kP];
  each<kP>([&](auto i) { at[i] = in_register(x[i] + offset); });
  for (int64_t b = 0; b < bytes; b += Packed::kStep, w += kV) {
    __m256i weights[kV];
    each<kV>([&](auto j) { weights[j] = _mm256_load_si256(w + j); });
    each<kP>([&](auto i) {
      const __m256i a = broadcast(at[i] + b);
      each<kV>([&](auto j) { sum[i][j] = dot(sum[i][j], a, weights[j]); });
    });
  }
}

// Adds the products of kP pixels' windows, which start at x[i], and kV vectors of weights to the sums.
template <int kP, int kV>
inline void multiply(const Packed& p, const uint8_t* const* x, const __m256i* w, __m256i (&sum)[kP][kV]) {
  const int64_t rows = p.runs.count / p.runs.per_row;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < p.runs.per_row; ++column)
      multiply_run<kP, kV>(x, row * p.runs.row_step + column * p.runs.column_step, p.runs.elements, w, sum);
}

template <int kP, int kV>
void convolve(const Block& b) {
  __m256i sum[kP][kV];
  const bool whole = b.p.form.whole;
  each<kV>([&](auto j) {
    const __m256i first = whole ? load(b.correction + j * kLanes) : _mm256_setzero_si256();
    each<kP>([&](auto i) { sum[i][j] = first; });
  });
  multiply<kP, kV>(b.p, b.window, b.weights, sum);
  if (!whole) {
    const __m256i mul = _mm256_set1_epi32(b.p.form.mul);
    each<kV>([&](auto j) {
      const __m256i correction = load(b.correction + j * kLanes);
      each<kP>([&](auto i) {
        sum[i][j] = _mm256_add_epi32(_mm256_mullo_epi32(sum[i][j], mul),
                                     _mm256_add_epi32(correction, _mm256_set1_epi32(b.window_sum[i])));
      });
    });
  }
  each<kP>([&](auto i) {
    int32_t* to = b.out + i * b.out_pitch;
    each<kV - 1>([&](auto j) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + j * kLanes), sum[i][j]); });
    store_lanes(to + (kV - 1) * kLanes, b.channels - (kV - 1) * kLanes, sum[i][kV - 1]);
  });
}

using BlockFn = void (*)(const Block&);
template <int kV>
constexpr BlockFn kBlocks[kPixels] = {convolve<1, kV>, convolve<2, kV>, convolve<3, kV>, convolve<4, kV>,
                                      convolve<5, kV>, convolve<6, kV>, convolve<7, kV>, convolve<8, kV>};
constexpr const BlockFn* kBySet[kVectors] = {kBlocks<1>, kBlocks<2>};

struct Vnni256Conv {
  using Packed = bitstrata::Packed;
  using Registers = bitstrata::Registers;
  using Block = bitstrata::Block;
  static Packed packed_of(const ConvShape& s, bool direct) { return Packed(s, WeightForm(s), direct, INT32_MAX); }
  // With the sums of its vectors, the weights and one broadcast in 16 registers.
  static int64_t pixels_of(int64_t vectors) { return vectors == kVectors ? 6 : kPixels; }
  static BlockFn block(const Packed&, int64_t vectors, int64_t pixels) { return kBySet[vectors - 1][pixels - 1]; }
};

bool direct_fits(const ConvShape& s) { return WeightForm(s).whole && reads_image(s, WeightForm(s)); }

constexpr ConvKernel kStaged = StepConv<Vnni256Conv>::staged("avx2vnni");
constexpr ConvKernel kDirect = StepConv<Vnni256Conv>::direct("avx2vnni-direct");

}  // namespace
}  // namespace bitstrata
