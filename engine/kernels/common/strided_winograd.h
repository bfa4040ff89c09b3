// Winograd's F(4, 4) and F(4, 3) along rows of the map, in integers: four neighbouring outputs of seven taps with
// stride 2 take thirteen products instead of twenty-eight.
//
// Of an output's seven inputs, four are even columns of the map and three odd ones, so that a row of the kernel is two
// kernels with stride 1. Each is a product of polynomials, taken at the points 0, 1, -1, 2, -2, infinity and, of the
// even columns, 3 (Toom and Cook; transposed, Winograd): with the points p and N(p) the product of p's distances to the
// others of its kernel, the sum over both kernels
//   m(p) = sum over k of data(p, k) d[k]  *  sum over k of p^k g[k] / N(p)
// gives output y as the sum over p of p^y m(p), and the last output m(infinity) besides. Weights are 120 times as
// large, which makes them whole, and so are the sums of all channels and rows, which are divided exactly. Eight bits
// become 15 for weights and 14 for data: this is for products of 16 bits. See pointwise.h for the unnamed namespace.
#pragma once

#include <cstdint>

#include "bitstrata/kernels.h"

namespace bitstrata {
namespace {

constexpr int kStemTaps = 7, kStemTile = 4;                  // of a kernel's row; outputs of a tile
constexpr int kStemPositions = 7, kStemShared = 6;           // all; those that odd columns have too
constexpr int kStemColumns = 2 * kStemTile + kStemTaps - 2;  // input columns of a tile
constexpr int kStemEven = 4, kStemOdd = 3;                   // taps of the two kernels
constexpr int32_t kStemScale = 120;
constexpr int32_t kStemPoints[] = {0, 1, -1, 2, -2, 0, 3};  // of the positions; that at 5 is infinity
constexpr int kStemInfinity = 5;

// What data and weights of a tile are multiplied by. [position][tap, or column of its kernel].
struct StemFactors {
  constexpr StemFactors() : data(), weight() {
    fill(0, kStemPositions, kStemEven);
    fill(1, kStemShared, kStemOdd);
  }

  // odd: 0 or 1. Of data, seven columns at most: the degree of the product of all x - p.
  int32_t data[2][kStemPositions][kStemPositions];
  int32_t weight[2][kStemPositions][kStemEven];

 private:
  constexpr void fill(int odd, int positions, int taps) {
    for (int i = 0; i < positions; ++i) {
      int32_t product[kStemPositions] = {1};  // of x - q for all other points q, by falling significance of its index
      int32_t distance = 1;
      for (int j = 0, degree = 0; j < positions; ++j) {
        if (j == i || j == kStemInfinity) continue;
        ++degree;
        for (int k = degree; k > 0; --k) product[k] = product[k - 1] - kStemPoints[j] * product[k];
        product[0] *= -kStemPoints[j];
        distance *= kStemPoints[i] - kStemPoints[j];
      }
      for (int k = 0; k < kStemPositions; ++k) data[odd][i][k] = product[k];
      int32_t power = 1;
      for (int k = 0; k < taps; ++k, power *= kStemPoints[i])
        weight[odd][i][k] = i == kStemInfinity ? (k == taps - 1 ? kStemScale : 0) : kStemScale / distance * power;
    }
  }
};
constexpr StemFactors kStemFactors;

// The largest sum of magnitudes of a position's weight factors; of its data factors of one sign.
constexpr int32_t largest_stem_weight() {
  int32_t most = 0;
  for (const auto& kernel : kStemFactors.weight)
    for (const auto& row : kernel) {
      int32_t sum = 0;
      for (int32_t f : row) sum += f < 0 ? -f : f;
      most = sum > most ? sum : most;
    }
  return most;
}
constexpr int32_t largest_stem_data() {
  int32_t most = 0;
  for (const auto& kernel : kStemFactors.data)
    for (const auto& row : kernel) {
      int32_t sums[2] = {};
      for (int32_t f : row) sums[f < 0] += f < 0 ? -f : f;
      for (int32_t sum : sums) most = sum > most ? sum : most;
    }
  return most;
}
static_assert(largest_stem_data() * UINT8_MAX <= INT16_MAX);

// Staged rows: [tile][position][even columns' channels, odd ones'] in 16 bits, the last position without odd ones, its
// channels filled up to pairs.
struct StemRows {
  static constexpr int64_t kSlack = 16;  // what whole vectors may write behind a row

  explicit StemRows(const ConvShape& s)
      : channels(s.in_c),
        pairs((s.in_c + 1) / 2),
        tiles((s.out_w + kStemTile - 1) / kStemTile),
        tile_bytes((kStemShared * 2 * channels + 2 * pairs) * 2),
        bytes(tiles * tile_bytes + kSlack) {}
  // Pairs of a position, and where they begin in a tile, in bytes.
  int64_t steps(int position) const { return position < kStemShared ? channels : pairs; }
  int64_t place(int position) const { return position * 4 * channels; }

  int64_t channels, pairs, tiles, tile_bytes, bytes;
};

// Whether 16 bits hold what the products take, and int32 the scaled results.
inline bool stem_fits(const ConvShape& s) {
  if (s.kernel_w != kStemTaps || s.stride_w != 2 || s.dilation_w != 1 || s.groups != 1 || s.in_c > 4) return false;
  const int64_t p = s.mul * s.code_lo + s.add, q = s.mul * s.code_hi + s.add;
  const int64_t of_p = p < 0 ? -p : p, of_q = q < 0 ? -q : q, weight = of_p > of_q ? of_p : of_q;
  return weight * largest_stem_weight() <= INT16_MAX &&
         weight * UINT8_MAX * kStemScale * s.in_c * s.kernel_h * kStemTaps <= INT32_MAX;
}

}  // namespace
}  // namespace bitstrata
