// Rows and bytes of a row of each tile register, as ldtilecfg reads them (palette 1: eight tiles of at most 16 rows of
// 64 bytes). See ../common/pointwise.h for the unnamed namespace.
#pragma once

#include <cstdint>

namespace bitstrata {
namespace {

constexpr int kTiles = 8, kTileRows = 16, kTileRowBytes = 64;

struct alignas(64) TileConfig {
  void set(int tile, int64_t tile_rows, int64_t row_bytes) {
    rows[tile] = static_cast<uint8_t>(tile_rows);
    colsb[tile] = static_cast<uint16_t>(row_bytes);
  }
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t colsb[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64, "ldtilecfg reads 64 bytes");

// How both convolution and weight gradient use the registers: four sums, 0 to 3, are the products of two left factors,
// 4 and 5, and two right ones, 6 and 7. So each tile that is loaded is multiplied twice, and the four sums are
// independent of each other: a product takes longer than three others need to start.
inline TileConfig two_by_two(int64_t rows, int64_t steps) {
  TileConfig config;
  for (int sum = 0; sum < 4; ++sum) config.set(sum, rows, kTileRowBytes);
  for (int i = 0; i < 2; ++i) config.set(4 + i, rows, steps * 4);
  for (int j = 0; j < 2; ++j) config.set(6 + j, steps, kTileRowBytes);
  return config;
}

}  // namespace
}  // namespace bitstrata
