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

// How convolution and weight gradient use the registers: 0 to 3 are sums, the others factors. Sums of a block are the
// products of some left by some right factors: two by two, so that each factor is multiplied twice; or, where there is
// one of a side, four of the other. Either way four sums are independent of each other, which a product, that takes
// longer than three others need to start, waits for; and no block needs more than three registers for the side that is
// not multiplied again: the fourth factor takes the first one's place.
enum class BlockForm { square, tall, wide };  // 2 x 2, 4 x 1, 1 x 4

constexpr int left_tile(int i) { return i == 2 ? 7 : i == 3 ? 4 : 4 + i; }
constexpr int right_tile(int j) { return j == 2 ? 5 : j == 3 ? 6 : 6 + j; }

// Left factors of `rows`, of up to 64 bytes: four for each of `steps`, the rows of right factors.
inline TileConfig block_config(BlockForm form, int64_t rows, int64_t steps) {
  TileConfig config;
  for (int sum = 0; sum < 4; ++sum) config.set(sum, rows, kTileRowBytes);
  for (int tile = 4; tile < kTiles; ++tile) {
    const bool left = tile == 4 || (tile == 5 && form != BlockForm::wide) || (tile == 7 && form == BlockForm::tall);
    config.set(tile, left ? rows : steps, left ? steps * 4 : kTileRowBytes);
  }
  return config;
}

}  // namespace
}  // namespace bitstrata
