// Convolution by tiles of four outputs in a row, each position's products in pairs of int16; see
// ../common/winograd_four.h for what is computed, and ../common/pointwise.h for the unnamed namespace.
//
// `Form` has: kPositions; kInverse, of the scale's odd part modulo 2^32; Rows, the layout of staged rows, made of a
// shape, with tiles, tile_bytes, bytes (of a row) and, for a position, steps (pairs) and place (bytes from the tile's
// begin); multiply<kP, kV>(block, position, weights, sums), what one position gives; outputs(m, y), the scaled outputs
// of what all positions give; channel(shape, codes, put), which calls put(position, row of the kernel, pair, its
// first weight, its second) for all of an output channel and returns the sum of the weights as they were.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "../common/store_lanes.h"
#include "../common/unroll.h"
#include "../common/winograd_four.h"
#include "steps.h"

namespace bitstrata {
namespace {

constexpr int kLanes = 8;        // output channels of a vector
constexpr int kVectors = 2;      // of a set, at most
constexpr int kTiles = 5;        // of a block: with two vectors, ten sums and a few temporaries fill the registers
constexpr int64_t kGroup = 60;   // tiles convolved with all weights in turn
constexpr int64_t kPairs = 16;   // int16 of a vector of weights
constexpr uint8_t kSign = 0x80;  // what makes signed codes unsigned, 128 larger

inline uint8_t flip(const ConvShape& s) { return s.input_dtype == DType::s8 ? kSign : 0; }

// Sizes and positions of everything that is packed: int32 correction[vectors * kLanes]; pad codes, a byte each; weights
// [set][position][row of the kernel][step][vector of the set][lane][2] in 16 bits.
template <typename Form>
struct TilesPacked {
  explicit TilesPacked(const ConvShape& s)
      : rows(s), vectors((s.out_c + kLanes - 1) / kLanes), sets((vectors + kVectors - 1) / kVectors), steps(0) {
    for (int position = 0; position < Form::kPositions; ++position) {
      first_step[position] = steps;
      steps += s.kernel_h * rows.steps(position);
    }
    pad_at = vectors * kLanes * 4;
    weights_at = (pad_at + s.in_c + 63) / 64 * 64;
    bytes = weights_at + vectors * steps * 32;
  }
  int64_t first_vector(int64_t set) const { return set * vectors / sets; }

  typename Form::Rows rows;
  int64_t vectors, sets, steps;
  int64_t first_step[Form::kPositions];
  int64_t pad_at, weights_at, bytes;
};

// What the blocks of a group of tiles need.
template <typename Form>
struct TilesBlock {
  const typename Form::Rows& rows;
  int64_t kernel_h, row_step;    // from row to row of the kernel, in bytes
  const uint8_t* const* window;  // where each tile's window starts
  const int64_t* pixel;          // its first output
  const int64_t* count;          // its outputs that are real, and more
  const __m256i* weights;
  const int32_t* correction;
  int64_t channels;  // that are real
  int32_t* out;      // of pixel 0
  int64_t out_pitch;
  Ahead* ahead;
};

// Hides from the compiler how a value came to be. It would else add products to each other before it adds them to a
// sum, and compute addresses in vectors, and run out of registers in both.
inline __m256i settled(__m256i x) {
  __asm__("" : "+x"(x));
  return x;
}
inline const uint8_t* settled(const uint8_t* x) {
  __asm__("" : "+r"(x));
  return x;
}

// One step: four bytes of each tile, at[i], and kV vectors of weights.
template <int kP, int kV>
BITSTRATA_INLINE void multiply_step(const uint8_t* const (&at)[kP], int64_t offset, const __m256i* w,
                                    __m256i (&sum)[kP][kV]) {
  __m256i weights[kV];
  each<kV>([&](auto j) { weights[j] = _mm256_load_si256(w + j); });
  each<kP>([&](auto i) {
    const __m256i a = broadcast(at[i] + offset);
    each<kV>([&](auto j) { sum[i][j] = settled(_mm256_add_epi32(sum[i][j], _mm256_madd_epi16(a, weights[j]))); });
  });
}

template <typename Form, int kP, int kV>
void convolve_tiles(const TilesBlock<Form>& b) {
  __m256i sums[Form::kPositions][kP][kV];
  const __m256i* w = b.weights;
  for (int position = 0; position < Form::kPositions; ++position) {
    Form::template multiply<kP, kV>(b, position, w, sums[position]);
    w += b.kernel_h * b.rows.steps(position) * kV;
  }
  const __m256i inverse = _mm256_set1_epi32(static_cast<int32_t>(Form::kInverse));
  for (int j = 0; j < kV; ++j) {
    const __m256i correction = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b.correction) + j);
    for (int i = 0; i < kP; ++i) {
      __m256i m[Form::kPositions], y[kFourTile];
      each<Form::kPositions>([&](auto position) { m[position] = sums[position][i][j]; });
      Form::outputs(m, y);
      int32_t* to = b.out + b.pixel[i] * b.out_pitch + j * kLanes;
      each<kFourTile>([&](auto k) {
        if (k >= b.count[i]) return;
        const __m256i result = _mm256_srai_epi32(_mm256_mullo_epi32(y[k], inverse), kFourShift);
        store_lanes(to + k * b.out_pitch, b.channels - j * kLanes, _mm256_add_epi32(result, correction));
      });
    }
  }
}

template <typename Form>
struct TilesConv {
  using Packed = TilesPacked<Form>;
  using Block = TilesBlock<Form>;
  using BlockFn = void (*)(const Block&);
  template <int kV>
  static constexpr BlockFn kBlocks[kTiles] = {convolve_tiles<Form, 1, kV>, convolve_tiles<Form, 2, kV>,
                                              convolve_tiles<Form, 3, kV>, convolve_tiles<Form, 4, kV>,
                                              convolve_tiles<Form, 5, kV>};
  static constexpr const BlockFn* kBySet[kVectors] = {kBlocks<1>, kBlocks<2>};

  static int64_t packed_bytes(const ConvShape& s) { return Packed(s).bytes; }
  static int64_t staged_row_bytes(const ConvShape& s) { return Packed(s).rows.bytes; }

  static void pack(const ConvShape& s, const int8_t* codes, const int32_t* pad, void* packed) {
    const Packed p(s);
    uint8_t* base = static_cast<uint8_t*>(packed);
    std::memset(packed, 0, static_cast<size_t>(p.bytes));
    for (int64_t c = 0; c < s.in_c; ++c) base[p.pad_at + c] = static_cast<uint8_t>(pad[c]);
    int32_t* correction = reinterpret_cast<int32_t*>(base);
    for (int64_t set = 0; set < p.sets; ++set) {
      const int64_t first = p.first_vector(set), vectors = p.first_vector(set + 1) - first;
      int16_t* weights = reinterpret_cast<int16_t*>(base + p.weights_at + first * p.steps * 32);
      for (int64_t o = first * kLanes; o < (first + vectors) * kLanes && o < s.out_c; ++o) {
        int16_t* lane = weights + (o - first * kLanes) * 2;
        const auto put = [&](int position, int64_t ky, int64_t pair, int32_t first_weight, int32_t second) {
          const int16_t both[2] = {static_cast<int16_t>(first_weight), static_cast<int16_t>(second)};
          const int64_t step = p.first_step[position] + ky * p.rows.steps(position) + pair;
          std::memcpy(lane + step * vectors * kPairs, both, sizeof both);
        };
        correction[o] = -flip(s) * Form::channel(s, codes + o * s.in_c * s.kernel_h * s.kernel_w, put);
      }
    }
  }

  // All tiles of a group, for one set of vectors: as few blocks as can be, of nearly equal size.
  static void convolve_group(Block b, const BlockFn* by_tiles, int64_t tiles) {
    for (int64_t left = (tiles + kTiles - 1) / kTiles; left > 0; --left) {
      const int64_t some = (tiles + left - 1) / left;
      by_tiles[some - 1](b);
      b.window += some, b.pixel += some, b.count += some;
      tiles -= some;
    }
  }

  static void run(const ConvShape& s, const void* packed, const void* staged, int32_t* out, int64_t row_begin,
                  int64_t row_end) {
    const Packed p(s);
    const uint8_t* base = static_cast<const uint8_t*>(packed);
    const uint8_t* rows = static_cast<const uint8_t*>(staged);
    const int32_t* correction = reinterpret_cast<const int32_t*>(base);
    const __m256i* weights = reinterpret_cast<const __m256i*>(base + p.weights_at);
    const uint8_t* window[kGroup];
    int64_t pixel[kGroup], count[kGroup];
    const int64_t end = row_end * p.rows.tiles;
    int64_t tiles;
    for (int64_t begin = row_begin * p.rows.tiles; begin < end; begin += tiles) {
      tiles = end - begin < kGroup ? end - begin : kGroup;
      int64_t y = begin / p.rows.tiles, t = begin % p.rows.tiles;
      for (int64_t i = 0; i < tiles; ++i) {
        window[i] = rows + y * s.stride_h * p.rows.bytes + t * p.rows.tile_bytes;
        pixel[i] = y * s.out_w + kFourTile * t;
        count[i] = s.out_w - kFourTile * t;
        if (++t == p.rows.tiles) t = 0, ++y;
      }
      for (int64_t set = 0; set < p.sets; ++set) {
        const int64_t v = p.first_vector(set), vectors = p.first_vector(set + 1) - v;
        const int64_t next = p.first_vector((set + 1) % p.sets);
        Ahead ahead{reinterpret_cast<const char*>(weights + next * p.steps), (tiles + kTiles - 1) / kTiles};
        convolve_group({p.rows, s.kernel_h, s.dilation_h * p.rows.bytes, window, pixel, count, weights + v * p.steps,
                        correction + v * kLanes, s.out_c - v * kLanes, out + v * kLanes, s.out_c, &ahead},
                       kBySet[vectors - 1], tiles);
      }
    }
  }
};

}  // namespace
}  // namespace bitstrata
