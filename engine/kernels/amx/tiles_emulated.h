// The tile registers of tiles.h in plain C++, for processors without them. What the processor would refuse ends the
// program. See ../common/pointwise.h for the unnamed namespace.
#pragma once

#include <cstdlib>
#include <cstring>

#include "tile_config.h"

namespace bitstrata {
namespace {

class EmulatedTiles {
 public:
  explicit EmulatedTiles(const TileConfig& config) : config_(config) {
    require(config.palette == 1 && config.start_row == 0);
    for (uint8_t byte : config.reserved) require(byte == 0);
    for (int t = 0; t < 16; ++t) {
      require(config.rows[t] <= kTileRows && config.colsb[t] <= kTileRowBytes);
      require((config.rows[t] == 0) == (config.colsb[t] == 0));
      require(t < kTiles || config.rows[t] == 0);
    }
    std::memset(data_, 0, sizeof(data_));
  }
  EmulatedTiles(const EmulatedTiles&) = delete;
  EmulatedTiles& operator=(const EmulatedTiles&) = delete;

  template <int kTile>
  void zero() {
    require(config_.rows[kTile] > 0);
    std::memset(data_[kTile], 0, sizeof(data_[kTile]));
  }
  template <int kTile>
  void load(const void* from, int64_t stride) {
    zero<kTile>();
    for (int64_t m = 0; m < config_.rows[kTile]; ++m)
      std::memcpy(data_[kTile][m], static_cast<const uint8_t*>(from) + m * stride, config_.colsb[kTile]);
  }
  template <int kTile>
  void store(void* to, int64_t stride) const {
    require(config_.rows[kTile] > 0);
    for (int64_t m = 0; m < config_.rows[kTile]; ++m)
      std::memcpy(static_cast<uint8_t*>(to) + m * stride, data_[kTile][m], config_.colsb[kTile]);
  }

  template <bool kASigned, bool kBSigned, int kSum, int kA, int kB>
  void dot() {
    static_assert(kSum != kA && kSum != kB && kA != kB, "the processor refuses equal registers");
    const int rows = config_.rows[kSum], steps = config_.rows[kB], bytes = config_.colsb[kSum];
    require(rows > 0 && rows == config_.rows[kA] && bytes == config_.colsb[kB] && bytes % 4 == 0);
    require(steps > 0 && steps * 4 == config_.colsb[kA]);
    for (int m = 0; m < rows; ++m) {
      uint32_t sum[kTileRowBytes / 4];
      std::memcpy(sum, data_[kSum][m], kTileRowBytes);
      for (int k = 0; k < steps; ++k)
        for (int n = 0; n < bytes / 4; ++n)
          for (int i = 0; i < 4; ++i)
            sum[n] += static_cast<uint32_t>(value<kASigned>(data_[kA][m][4 * k + i]) *
                                            value<kBSigned>(data_[kB][k][4 * n + i]));
      std::memcpy(data_[kSum][m], sum, kTileRowBytes);
    }
  }

 private:
  static void require(bool holds) {
    if (!holds) std::abort();
  }
  template <bool kSigned>
  static int32_t value(uint8_t byte) {
    return kSigned ? int32_t{static_cast<int8_t>(byte)} : int32_t{byte};
  }

  const TileConfig config_;
  alignas(64) uint8_t data_[kTiles][kTileRows][kTileRowBytes];
};

}  // namespace
}  // namespace bitstrata
