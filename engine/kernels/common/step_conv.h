// Convolution by steps of a few bytes (see step_weights.h), whatever the vectors that multiply them. See pointwise.h
// for the unnamed namespace.
//
// Output pixels are convolved a tile at a time with all weights in turn, so that their windows stay in the L1 cache;
// each set of vectors takes a tile's pixels in blocks, whose sums stay in registers.
//
// `Isa` has: Packed, a StepWeights; packed_of(shape, direct); Registers, whose Vector weights are loaded in; Block,
// which
//   is StepBlock<Packed, Registers>; pixels_of(vectors): of a block, at most; block(packed, vectors, pixels): the
//   function that computes one.
#pragma once

#include "step_weights.h"

namespace bitstrata {
namespace {

// What the blocks of a tile need. A block's first pixel is at window[0], window_sum[0], out.
// Registers stands for its Vector, as vector types lose attributes where they are template arguments.
template <typename Packed, typename Registers>
struct StepBlock {
  const Packed& p;
  const uint8_t* const* window;  // where each pixel's window starts
  const int32_t* window_sum;     // add * the sum of its activations
  const typename Registers::Vector* weights;
  const int32_t* correction;
  int64_t channels;  // that are real
  int32_t* out;
  int64_t out_pitch;
};

template <typename Isa>
struct StepConv {
  using Packed = typename Isa::Packed;
  using Vector = typename Isa::Registers::Vector;
  using Block = typename Isa::Block;
  using Staged = typename Packed::Staged;
  static constexpr int64_t kTile = 192;  // pixels
  static constexpr int64_t kLanes = Packed::kLanes;

  static int64_t packed_bytes(const ConvShape& s) { return Isa::packed_of(s, false).bytes; }
  static int64_t staged_row_bytes(const ConvShape& s) { return Isa::packed_of(s, false).stage.row_bytes; }
  static int64_t no_staged_row_bytes(const ConvShape&) { return 0; }
  static int64_t pack_parts(const ConvShape& s) { return s.groups * Isa::packed_of(s, false).sets; }

  static void pack_part(const ConvShape& s, const WeightCodes& codes, const uint8_t* factor, const int32_t* pad,
                        void* packed, int64_t part) {
    pack_set(s, Isa::packed_of(s, false), codes, factor, pad, packed, part);
  }

  static void pack(const ConvShape& s, const int8_t* codes, const int32_t* pad, void* packed) {
    pack_sets(s, Isa::packed_of(s, false), codes, pad, packed);
  }

  static void stage(const ConvShape& s, const void* packed, const void* image, void* staged, int64_t row_begin,
                    int64_t row_end) {
    const Packed p = Isa::packed_of(s, false);
    const uint8_t* padding = static_cast<const uint8_t*>(packed) + p.padding_at;
    stage_rows(s, p.stage, reinterpret_cast<const Staged*>(padding), image, staged, row_begin, row_end);
  }

  static void stage_nothing(const ConvShape&, const void*, const void*, void*, int64_t, int64_t) {}

  // All `pixels` of a tile, for one set of vectors: as few blocks as can be, of nearly equal size.
  static void convolve_tile(Block b, int64_t vectors, int64_t pixels) {
    const int64_t most = Isa::pixels_of(vectors), blocks = (pixels + most - 1) / most;
    for (int64_t left = blocks; left > 0; --left) {
      const int64_t count = (pixels + left - 1) / left;
      Isa::block(b.p, vectors, count)(b);
      b.window += count, b.window_sum += count, b.out += count * b.out_pitch;
      pixels -= count;
    }
  }

  template <bool kDirect>
  static void run(const ConvShape& s, const void* packed, const void* staged, int32_t* out, int64_t row_begin,
                  int64_t row_end) {
    const Packed p = Isa::packed_of(s, kDirect);
    const uint8_t* base = static_cast<const uint8_t*>(packed);
    const uint8_t* rows = static_cast<const uint8_t*>(staged);
    const int32_t* correction = reinterpret_cast<const int32_t*>(base);
    const Vector* weights = reinterpret_cast<const Vector*>(base + p.weights_at);
    const uint8_t* window[kTile];
    int32_t sums[kTile];
    const int64_t end = row_end * s.out_w;
    int64_t pixels;
    for (int64_t begin = row_begin * s.out_w; begin < end; begin += pixels) {
      pixels = end - begin < kTile ? end - begin : kTile;
      for (int64_t group = 0; group < s.groups; ++group) {
        const uint8_t* of_group = rows + group * p.stage.columns * p.stage.lanes;
        int64_t y = begin / s.out_w, x = begin % s.out_w;
        for (int64_t i = 0; i < pixels; ++i) {
          window[i] = of_group + y * s.stride_h * p.row_bytes + x * s.stride_w * p.stage.lanes;
          if (p.stage.sums) sums[i] = window_sum(s, p, rows, group, y, x);
          if (++x == s.out_w) x = 0, ++y;
        }
        for (int64_t set = 0; set < p.sets; ++set) {
          const int64_t v = p.first_vector(set), vectors = p.first_vector(set + 1) - v, first = group * p.vectors + v;
          const int64_t left = s.group_out() - v * kLanes;
          convolve_tile({p, window, sums, weights + first * p.steps, correction + first * kLanes,
                         left < vectors * kLanes ? left : vectors * kLanes,
                         out + begin * s.out_c + group * s.group_out() + v * kLanes, s.out_c},
                        vectors, pixels);
        }
      }
    }
  }

  static constexpr ConvKernel staged(const char* name) {
    return {name, packed_bytes, pack, staged_row_bytes, stage, run<false>, pack_parts, pack_part};
  }
  static constexpr ConvKernel direct(const char* name) {
    return {name, packed_bytes, pack, no_staged_row_bytes, stage_nothing, run<true>, pack_parts, pack_part};
  }
};

}  // namespace
}  // namespace bitstrata
