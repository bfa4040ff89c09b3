// Convolution on tiles: sixteen output pixels by sixteen output channels a tile of sums. `Tiles` are those of tiles.h.
// See ../common/pointwise.h for the unnamed namespace.
//
// A tile of the left factor is up to 64 neighbouring bytes, a chunk of a run of the window, of each of up to sixteen
// pixels; it is loaded from the staged rows, or the image, as it lies there: the pixels' windows are equally far apart.
// A tile of the right factor is the packed weights of that chunk. A block is two tiles of pixels by two of channels
// (see two_by_two). Of 64 bytes a chunk, it loads four tiles, two cache lines a cycle, while four products pass through
// the multiplier, sixteen cycles each: loads take half of that time.
//
// One configuration serves a whole call, because each loading of one clears the registers. So tiles are made to fit:
//   pixels: tiles of equal size, of which the last begins early and computes some pixels twice;
//   bytes: the last chunk of a run begins early, where the packed weights are 0 for what was multiplied before;
//   channels: weights and corrections are filled up with 0, and the sums of a tile that is not full are copied apart.
// Signed activations are multiplied as they are, except where weights mul*c + add leave s8 (see step_weights.h).
#pragma once

#include "../common/step_weights.h"
#include "../common/unroll.h"
#include "tile_config.h"

namespace bitstrata {
namespace {

template <typename Tiles>
struct TileConv {
  static constexpr int kOuts = 16, kVectors = 2;
  using Packed = StepWeights<kOuts, kVectors>;

  static bool multiplies_signed(const ConvShape& s, const WeightForm& form) {
    return s.input_dtype == DType::s8 && form.whole;
  }
  static WeightForm form_of(const ConvShape& s) {
    WeightForm form(s);
    if (multiplies_signed(s, form)) form.offset = 0;
    return form;
  }
  static Packed packed_of(const ConvShape& s, bool direct) {
    return Packed(s, form_of(s), direct, kTileRowBytes / Packed::kStep);
  }

  static int64_t packed_bytes(const ConvShape& s) { return packed_of(s, false).bytes; }
  static int64_t staged_row_bytes(const ConvShape& s) { return packed_of(s, false).stage.row_bytes; }
  static int64_t no_staged_row_bytes(const ConvShape&) { return 0; }
  static int64_t pack_parts(const ConvShape& s) { return s.groups * packed_of(s, false).sets; }
  static void pack_part(const ConvShape& s, const WeightCodes& codes, const uint8_t* factor, const int32_t* pad,
                        void* packed, int64_t part) {
    pack_set(s, packed_of(s, false), codes, factor, pad, packed, part);
  }
  static void pack(const ConvShape& s, const int8_t* codes, const int32_t* pad, void* packed) {
    pack_sets(s, packed_of(s, false), codes, pad, packed);
  }
  static void stage(const ConvShape& s, const void* packed, const void* image, void* staged, int64_t row_begin,
                    int64_t row_end) {
    const Packed p = packed_of(s, false);
    stage_rows(s, p.stage, static_cast<const uint8_t*>(packed) + p.padding_at, image, staged, row_begin, row_end);
  }
  static void stage_nothing(const ConvShape&, const void*, const void*, void*, int64_t, int64_t) {}

  // Output pixels as strips, within which windows are equally far apart: output rows; or all rows as one strip, where
  // that takes fewer tiles though it passes over positions between the rows that belong to no pixel.
  struct Strips {
    Strips(const ConvShape& s, const Packed& p, int64_t rows)
        : pitch(s.stride_w * p.stage.lanes), strip_bytes(s.stride_h * p.row_bytes), count(rows), length(s.out_w) {
      const int64_t apart = strip_bytes / pitch, all = (rows - 1) * apart + s.out_w;
      if (strip_bytes % pitch == 0 && tiles_of(all) < rows * tiles_of(s.out_w)) {
        count = 1, length = all;
        row = apart;
      } else {
        row = s.out_w;
      }
      tiles = tiles_of(length);
      tile = (length + tiles - 1) / tiles;
    }
    static int64_t tiles_of(int64_t positions) { return (positions + kTileRows - 1) / kTileRows; }
    int64_t first_of(int64_t t) const { return t * tile < length - tile ? t * tile : length - tile; }

    int64_t pitch, strip_bytes;  // from window to window, from strip to strip
    int64_t count, length;       // strips, and the positions of each
    int64_t row;                 // positions from output row to output row
    int64_t tiles, tile;         // of a strip: its tiles, and the positions of each
  };

  // What the blocks of a call share.
  struct Call {
    const ConvShape& s;
    const Packed& p;
    const Strips& strips;
    const uint8_t* rows;  // staged, or the image
    const int32_t* correction;
    const uint8_t* weights;
    int32_t* out;
    int64_t row_begin;
  };

  // A block: successive tiles of the strips, counted through all of them, with a set of vectors.
  struct Block {
    int64_t group, vector, tile;  // the first ones
  };

  // Where a tile begins: its strip, and the position there.
  struct Place {
    Place(const Strips& strips, int64_t tile)
        : strip(tile / strips.tiles), position(strips.first_of(tile % strips.tiles)) {}
    int64_t strip, position;
  };

  template <int kM, int kN, bool kSigned>
  static void multiply(Tiles& tiles, const Call& c, const Block& b) {
    const Packed& p = c.p;
    const int64_t pitch = c.strips.pitch;
    const uint8_t* of_group = c.rows + c.row_begin * c.strips.strip_bytes + b.group * p.stage.columns * p.stage.lanes;
    const uint8_t* x[kM];
    each<kM>([&](auto i) {
      const Place place(c.strips, b.tile + i);
      x[i] = of_group + place.strip * c.strips.strip_bytes + place.position * pitch;
    });
    const uint8_t* w = c.weights + (b.group * p.vectors + b.vector) * p.steps * Packed::kVectorBytes;
    const int32_t* correction = c.correction + (b.group * p.vectors + b.vector) * kOuts;
    each<kM>([&](auto i) {
      each<kN>([&](auto j) {
        if (p.form.whole && p.form.offset != 0)
          tiles.template load<i * kN + j>(correction + j * kOuts, 0);
        else
          tiles.template zero<i * kN + j>();
      });
    });
    const int64_t rows = p.runs.count / p.runs.per_row;
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t column = 0; column < p.runs.per_row; ++column)
        for (int64_t chunk = 0; chunk < p.chunks; ++chunk, w += p.chunk * kN * Packed::kVectorBytes) {
          const int64_t at = row * p.runs.row_step + column * p.runs.column_step + p.chunk_at(chunk) * Packed::kStep;
          each<kN>([&](auto j) { tiles.template load<right_tile(j)>(w + j * kTileRowBytes, kN * kTileRowBytes); });
          each<kM>([&](auto i) {
            tiles.template load<left_tile(i)>(x[i] + at, pitch);
            each<kN>([&](auto j) { tiles.template dot<kSigned, true, i * kN + j, left_tile(i), right_tile(j)>(); });
          });
        }
  }

  // Copies the sums of a tile, one vector of channels, to where they belong.
  static void copy(const Call& c, const Place& place, int64_t group, int64_t vector, const int32_t* sums) {
    const ConvShape& s = c.s;
    const Packed& p = c.p;
    const int64_t channel = vector * kOuts, left = s.group_out() - channel, count = left < kOuts ? left : kOuts;
    const int32_t* correction = c.correction + (group * p.vectors + vector) * kOuts;
    for (int64_t i = 0; i < c.strips.tile; ++i, sums += kOuts) {
      const int64_t position = place.position + i, x = position % c.strips.row;
      const int64_t y = c.row_begin + place.strip + position / c.strips.row;
      if (x >= s.out_w) continue;
      int32_t* to = c.out + (y * s.out_w + x) * s.out_c + group * s.group_out() + channel;
      if (p.form.whole) {
        std::memcpy(to, sums, static_cast<size_t>(count) * 4);
        continue;
      }
      const uint32_t mul = static_cast<uint32_t>(p.form.mul);
      const uint32_t of_window = static_cast<uint32_t>(window_sum(s, p, c.rows, group, y, x));
      for (int64_t o = 0; o < count; ++o)
        to[o] = static_cast<int32_t>(static_cast<uint32_t>(sums[o]) * mul + static_cast<uint32_t>(correction[o]) +
                                     of_window);
    }
  }

  template <int kM, int kN, bool kSigned>
  static void block(Tiles& tiles, const Call& c, const Block& b) {
    multiply<kM, kN, kSigned>(tiles, c, b);
    const ConvShape& s = c.s;
    const bool in_order = c.p.form.whole && c.strips.row == s.out_w;
    each<kM>([&](auto i) {
      const Place place(c.strips, b.tile + i);
      each<kN>([&](auto j) {
        const int64_t vector = b.vector + j;
        if (in_order && (vector + 1) * kOuts <= s.group_out()) {
          int32_t* to = c.out + ((c.row_begin + place.strip) * s.out_w + place.position) * s.out_c;
          tiles.template store<i * kN + j>(to + b.group * s.group_out() + vector * kOuts, s.out_c * 4);
        } else {
          alignas(64) int32_t sums[kTileRows * kOuts];
          tiles.template store<i * kN + j>(sums, kOuts * 4);
          copy(c, place, b.group, vector, sums);
        }
      });
    });
  }

  static BlockForm form_of_blocks(const Packed& p) { return p.vectors == 1 ? BlockForm::tall : BlockForm::square; }

  template <bool kSigned>
  static void run_blocks(Tiles& tiles, const Call& c) {
    using BlockFn = void (*)(Tiles&, const Call&, const Block&);
    constexpr BlockFn kBlocks[2][4] = {
        {block<1, 1, kSigned>, block<2, 1, kSigned>, block<3, 1, kSigned>, block<4, 1, kSigned>},
        {block<1, 2, kSigned>, block<2, 2, kSigned>}};
    const int64_t tiles_of_all = c.strips.count * c.strips.tiles;
    const int64_t together = form_of_blocks(c.p) == BlockForm::tall ? 4 : 2;
    for (int64_t group = 0; group < c.s.groups; ++group)
      for (int64_t set = 0; set < c.p.sets; ++set) {
        const int64_t vector = c.p.first_vector(set), vectors = c.p.first_vector(set + 1) - vector;
        for (int64_t tile = 0; tile < tiles_of_all; tile += together) {
          const int64_t left = tiles_of_all - tile;
          kBlocks[vectors - 1][(left < together ? left : together) - 1](tiles, c, {group, vector, tile});
        }
      }
  }

  template <bool kDirect>
  static void run(const ConvShape& s, const void* packed, const void* staged, int32_t* out, int64_t row_begin,
                  int64_t row_end) {
    if (row_begin == row_end) return;
    const Packed p = packed_of(s, kDirect);
    const Strips strips(s, p, row_end - row_begin);
    const uint8_t* base = static_cast<const uint8_t*>(packed);
    const Call c{s,
                 p,
                 strips,
                 static_cast<const uint8_t*>(staged),
                 reinterpret_cast<const int32_t*>(base),
                 base + p.weights_at,
                 out,
                 row_begin};
    Tiles tiles(block_config(form_of_blocks(p), strips.tile, p.chunk));
    if (multiplies_signed(s, p.form))
      run_blocks<true>(tiles, c);
    else
      run_blocks<false>(tiles, c);
  }

  static bool direct_fits(const ConvShape& s) { return form_of(s).whole && reads_image(s, form_of(s)); }

  static constexpr ConvKernel staged(const char* name) {
    return {name, packed_bytes, pack, staged_row_bytes, stage, run<false>, pack_parts, pack_part};
  }
  static constexpr ConvKernel direct(const char* name) {
    return {name, packed_bytes, pack, no_staged_row_bytes, stage_nothing, run<true>, pack_parts, pack_part};
  }
};

}  // namespace
}  // namespace bitstrata
