#include "tiles_test.h"

#include <cstring>
#include <string>
#include <vector>

#include "../kernels/amx/tiles_emulated.h"
#include "guarded.h"

namespace bitstrata::test {
namespace {

int64_t value(uint8_t byte, bool is_signed) { return is_signed ? int64_t{static_cast<int8_t>(byte)} : int64_t{byte}; }

// One product of bytes that lie `gap` apart from row to row, beside unmapped pages, added to sums that are there.
template <bool kASigned, bool kBSigned>
void test_dot(int64_t rows, int64_t steps, int64_t columns, int64_t gap, Edge edge, uint64_t seed) {
  Random random(seed);
  const int64_t a_pitch = 4 * steps + gap, b_pitch = 4 * columns + gap, sum_pitch = columns + gap;
  const Guarded a((rows - 1) * a_pitch + 4 * steps, edge), b((steps - 1) * b_pitch + 4 * columns, edge);
  const Guarded sums(((rows - 1) * sum_pitch + columns) * 4, edge);
  const int64_t a_count = (rows - 1) * a_pitch + 4 * steps, b_count = (steps - 1) * b_pitch + 4 * columns;
  for (int64_t i = 0; i < a_count; ++i) a.get<uint8_t>()[i] = static_cast<uint8_t>(random.in(0, 255));
  for (int64_t i = 0; i < b_count; ++i) b.get<uint8_t>()[i] = static_cast<uint8_t>(random.in(0, 255));
  std::vector<int32_t> before(static_cast<size_t>((rows - 1) * sum_pitch + columns));
  for (int32_t& sum : before) sum = static_cast<int32_t>(random.in(INT32_MIN, INT32_MAX));
  std::memcpy(sums.get(), before.data(), before.size() * 4);

  TileConfig config;
  config.set(1, rows, 4 * columns), config.set(5, rows, 4 * steps), config.set(7, steps, 4 * columns);
  EmulatedTiles tiles(config);
  tiles.load<1>(sums.get(), sum_pitch * 4);
  tiles.load<5>(a.get(), a_pitch);
  tiles.load<7>(b.get(), b_pitch);
  tiles.dot<kASigned, kBSigned, 1, 5, 7>();
  tiles.store<1>(sums.get(), sum_pitch * 4);

  const std::string where = std::to_string(rows) + " " + std::to_string(steps) + " " + std::to_string(columns);
  std::vector<int32_t> after(before.size());
  std::memcpy(after.data(), sums.get(), after.size() * 4);
  for (int64_t at = 0; at < static_cast<int64_t>(before.size()); ++at) {
    const int64_t m = at / sum_pitch, n = at % sum_pitch;
    int64_t sum = before[static_cast<size_t>(at)];
    for (int64_t k = 0; n < columns && k < 4 * steps; ++k)
      sum += value(a.get<uint8_t>()[m * a_pitch + k], kASigned) *
             value(b.get<uint8_t>()[k / 4 * b_pitch + 4 * n + k % 4], kBSigned);
    expect_equal("amx-emulated", "dot", where.c_str(), at, after[static_cast<size_t>(at)], static_cast<int32_t>(sum));
  }
}

// A loaded row of stride 0 is in every row; zero clears; each register keeps what is its own.
void test_registers() {
  TileConfig config;
  for (int t = 0; t < kTiles; ++t) config.set(t, 2 * t + 1, 8 * t + 4);
  EmulatedTiles tiles(config);
  uint8_t row[64], stored[16][64];
  for (int i = 0; i < 64; ++i) row[i] = static_cast<uint8_t>(i + 1);
  tiles.load<7>(row, 0);
  tiles.load<6>(row, 0);
  tiles.zero<6>();
  std::memset(stored, 0xA5, sizeof(stored));
  tiles.store<7>(stored, 64);
  for (int m = 0; m < 16; ++m)
    for (int i = 0; i < 64; ++i)
      expect_equal("amx-emulated", "load", "stride 0", m * 64 + i, stored[m][i], m < 15 && i < 60 ? i + 1 : 0xA5);
  tiles.store<6>(stored, 64);
  for (int m = 0; m < 13; ++m)
    for (int i = 0; i < 52; ++i) expect_equal("amx-emulated", "zero", "all", m * 64 + i, stored[m][i], 0);
}

}  // namespace

void test_emulated_tiles() {
  test_registers();
  uint64_t seed = 0;
  for (int64_t rows : {1, 2, 7, 15, 16})
    for (int64_t steps : {1, 3, 8, 16})
      for (int64_t columns : {1, 5, 16})
        for (int64_t gap : {0, 9}) {
          const Edge edge = ++seed % 2 == 0 ? Edge::end : Edge::begin;
          test_dot<false, false>(rows, steps, columns, gap, edge, seed);
          test_dot<false, true>(rows, steps, columns, gap, edge, seed);
          test_dot<true, false>(rows, steps, columns, gap, edge, seed);
          test_dot<true, true>(rows, steps, columns, gap, edge, seed);
        }
}

}  // namespace bitstrata::test
