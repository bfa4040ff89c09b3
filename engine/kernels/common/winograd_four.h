// Winograd's F(4, 3) and F(4, 4) along rows of the map, in integers: four neighbouring outputs at a time, of three taps
// with stride 1 by half of the products, of seven taps with stride 2 by less.
//
// Sums of data and weights are taken at points p (Toom and Cook; transposed, Winograd): with N(p) the product of p's
// distances to the other points,
//   m(p) = sum over k of data(p, k) d[k]  *  sum over k of p^k g[k] / N(p)
// gives output y as the sum over p of p^y m(p), and the last output m(infinity) besides. F(4, 3) has the points 0, 1,
// -1, 2, -2 and infinity, F(4, 4) also 3. Of seven taps with stride 2, four meet even columns of the map and three odd
// ones: two kernels with stride 1, whose m(p) are summed where both have the point: thirteen products for
// twenty-eight.
//
// Weights are scaled, by a multiple of all N(p), which makes them whole, and so are the sums of all channels and rows.
// Modulo 2^32, those are divided by the scale's odd part and shifted right by three: exact for results of up to 29
// bits. Eight bits become 15 for weights and 14 for data: this is for products of 16 bits.
// See pointwise.h for the unnamed namespace.
#pragma once

#include <cstdint>

#include "bitstrata/kernels.h"

namespace bitstrata {
namespace {

constexpr int kFourTile = 4;                                // outputs of a tile
constexpr int32_t kFourPoints[] = {0, 1, -1, 2, -2, 0, 3};  // of the positions; that at 5 is infinity
constexpr int kFourInfinity = 5, kFourShared = 6;           // positions of F(4, 3)
constexpr int kFourPositions = 7;                           // and of F(4, 4)
constexpr int32_t kFourShift = 3;                           // of the scales: 8 times their odd part

// What data and weights are multiplied by; [position][column] and [position][tap].
template <int kTaps>
struct FourFactors {
  static constexpr int kPositions = kTaps + kFourTile - 1;
  int32_t data[kFourPositions][kFourPositions], weight[kFourPositions][kTaps];

  explicit constexpr FourFactors(int32_t scale) : data(), weight() {
    for (int i = 0; i < kPositions; ++i) {
      data[i][0] = 1;  // the product of x - q for all other points q: [k] of x^k
      int32_t distance = 1;
      for (int j = 0, degree = 0; j < kPositions; ++j) {
        if (j == i || j == kFourInfinity) continue;
        ++degree;
        for (int k = degree; k > 0; --k) data[i][k] = data[i][k - 1] - kFourPoints[j] * data[i][k];
        data[i][0] *= -kFourPoints[j];
        distance *= kFourPoints[i] - kFourPoints[j];
      }
      int32_t power = 1;
      for (int k = 0; k < kTaps; ++k, power *= kFourPoints[i])
        weight[i][k] = i == kFourInfinity ? (k == kTaps - 1 ? scale : 0) : scale / distance * power;
    }
  }

  // The largest sum of magnitudes of a position's weight factors; of its data factors of one sign.
  constexpr int32_t largest_weight() const {
    int32_t most = 0;
    for (const auto& row : weight) {
      int32_t sum = 0;
      for (int32_t f : row) sum += f < 0 ? -f : f;
      most = sum > most ? sum : most;
    }
    return most;
  }
  constexpr int32_t largest_data() const {
    int32_t most = 0;
    for (const auto& row : data) {
      int32_t sums[2] = {};
      for (int32_t f : row) sums[f < 0] += f < 0 ? -f : f;
      for (int32_t sum : sums) most = sum > most ? sum : most;
    }
    return most;
  }
};

// Whether 16 bits hold weights times `factor`, and 29 bits the results. Inputs are unsigned bytes, signed ones moved.
inline bool four_fits(const ConvShape& s, int32_t factor) {
  const int64_t p = s.mul * s.code_lo + s.add, q = s.mul * s.code_hi + s.add;
  const int64_t of_p = p < 0 ? -p : p, of_q = q < 0 ? -q : q, weight = of_p > of_q ? of_p : of_q;
  return weight * factor <= INT16_MAX &&
         weight * UINT8_MAX * s.in_c * s.kernel_h * s.kernel_w <= INT32_MAX >> kFourShift;
}

}  // namespace
}  // namespace bitstrata
