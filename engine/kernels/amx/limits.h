// What kernels on tiles can reach at best: four sums, each of full tiles, that do not wait for each other.
#pragma once

#include "bitstrata/kernels.h"
#include "tile_config.h"

namespace bitstrata {
namespace {

template <typename T>
void tile_products(int64_t rounds) {
  T tiles(block_config(BlockForm::square, kTileRows, kTileRows));
  tiles.template zero<0>(), tiles.template zero<1>(), tiles.template zero<2>(), tiles.template zero<3>();
  tiles.template zero<4>(), tiles.template zero<5>(), tiles.template zero<6>(), tiles.template zero<7>();
  for (int64_t round = 0; round < rounds; ++round) {
    tiles.template dot<false, true, 0, 4, 6>();
    tiles.template dot<false, true, 1, 4, 7>();
    tiles.template dot<false, true, 2, 5, 6>();
    tiles.template dot<false, true, 3, 5, 7>();
  }
}

template <typename T>
constexpr PeakLoop kTilePeak = {"tdpbusd", 4 * kTileRows * kTileRows * kTileRowBytes, tile_products<T>};

}  // namespace
}  // namespace bitstrata
