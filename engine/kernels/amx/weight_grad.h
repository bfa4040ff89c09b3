// The weight gradient on tiles: sixteen output channels by sixteen elements of a window's row a tile of sums. `Tiles`
// are those of tiles.h. See ../common/pointwise.h for the unnamed namespace.
//
// A window's row is the kernel_w * in_c / groups codes that one row of a kernel sees at one output position. Products
// are summed over positions, four of a row to a step. Of the gradient each output channel's positions are packed as
// neighbours, so that sixteen channels at up to sixteen steps are a tile wherever it begins; of the input, vectors of
// sixteen elements at four positions, of which as many are the tile that it is multiplied with. Rows of the input are
// ordered by their remainder modulo the stride, so that successive output rows find theirs one after the other; rows
// outside of the map are 0. One packed copy of the input serves all taps.
//
// An image's steps are cut into chunks of equal size: behind the last step the gradient is filled up with 0, against
// which anything is multiplied.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/unroll.h"
#include "../common/weight_sums.h"
#include "bitstrata/kernels.h"
#include "tile_config.h"

namespace bitstrata {
namespace {

template <typename Tiles>
struct TileWeightGrad {
  static constexpr int64_t kSide = 16, kStep = 4, kVectorBytes = kSide * kStep, kTileSums = kSide * kSide;

  static int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }
  static int64_t least(int64_t a, int64_t b) { return b < a ? b : a; }
  static int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }

  // Sums are [group][kernel row][panel of outputs][vector][output][lane].
  struct Layout {
    explicit Layout(const ConvShape& s)
        : elements(s.kernel_w * s.group_in()),
          vectors(parts(elements, kSide)),
          panels(parts(s.group_out(), kSide)),
          row_sums(panels * vectors * kTileSums),
          sums(s.groups * s.kernel_h * row_sums) {}
    int64_t elements, vectors, panels, row_sums, sums;
  };

  // One call of `add`, and what it packs. Distances are in steps, of 4 bytes (gradient) or a vector (input).
  struct Call {
    Call(const ConvShape& s, int64_t images, int64_t begin, int64_t end, uint8_t* scratch)
        : s(s),
          layout(s),
          images(images),
          begin(begin),
          end(end),
          steps(parts(s.out_w, kStep)),
          chunks(parts((end - begin) * steps, kTileRows)),
          chunk(parts((end - begin) * steps, chunks)),
          g_image(chunks * chunk),
          g_out(images * g_image),
          in_rows((end - begin - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1),
          per_remainder(parts(in_rows, s.stride_h)),
          x_image(s.stride_h * per_remainder * steps),
          x_vector(images * x_image),
          whole(s.groups == 1 && (s.dilation_w == 1 || s.kernel_w == 1)),
          pitch(whole ? s.stride_w * s.in_c : layout.elements),
          xs_bytes((layout.vectors * x_vector + g_image) * kVectorBytes),  // the last chunk may reach further
          gs_bytes(parts(layout.panels * kSide * g_out * kStep, 64) * 64),
          row_bytes(most(most(steps * kStep * pitch + layout.vectors * kSide, s.padded_w() * s.in_c),
                         steps * kStep * layout.panels * kSide)),
          scratch(scratch) {}

    const ConvShape& s;
    Layout layout;
    int64_t images, begin, end;
    int64_t steps;          // of a row
    int64_t chunks, chunk;  // of an image: its chunks, and the steps of each
    int64_t g_image, g_out;
    int64_t in_rows, per_remainder, x_image, x_vector;
    bool whole;     // windows are read from a padded row, else they are copied apart
    int64_t pitch;  // from window to window, in bytes
    int64_t xs_bytes, gs_bytes, row_bytes;
    uint8_t* scratch;

    uint8_t* xs() const { return scratch; }
    uint8_t* gs() const { return scratch + xs_bytes; }
    uint8_t* row() const { return scratch + xs_bytes + gs_bytes; }
    int64_t place(int64_t r) const { return (r % s.stride_h * per_remainder + r / s.stride_h) * steps; }
  };

  static int64_t sums(const ConvShape& s) { return Layout(s).sums; }
  static int64_t scratch_bytes(const ConvShape& s, int64_t images, int64_t rows) {
    const Call c(s, images, 0, rows, nullptr);
    return c.xs_bytes + c.gs_bytes + c.row_bytes;
  }

  // Four positions of sixteen neighbours to four bytes of each neighbour.
  static void interleave(const uint8_t* from, int64_t pitch, uint8_t* to) {
    for (int64_t i = 0; i < kSide; ++i)
      for (int64_t k = 0; k < kStep; ++k) to[i * kStep + k] = from[k * pitch + i];
  }

  // Windows of one row of the map, `pitch` bytes apart.
  static void copy_windows(const Call& c, const uint8_t* from, int64_t group) {
    const ConvShape& s = c.s;
    std::memset(c.row(), 0, static_cast<size_t>(c.row_bytes));
    if (c.whole) {
      const int64_t room = s.padded_w() - s.pad_left, copied = s.in_w < room ? s.in_w : room;
      if (copied > 0) std::memcpy(c.row() + s.pad_left * s.in_c, from, static_cast<size_t>(copied * s.in_c));
      return;
    }
    const int64_t ins = s.group_in();
    uint8_t* to = c.row();
    for (int64_t x = 0; x < s.out_w; ++x)
      for (int64_t kx = 0; kx < s.kernel_w; ++kx, to += ins) {
        const int64_t column = x * s.stride_w - s.pad_left + kx * s.dilation_w;
        if (column >= 0 && column < s.in_w)
          std::memcpy(to, from + column * s.in_c + group * ins, static_cast<size_t>(ins));
      }
  }

  static void pack_codes(const Call& c, const uint8_t* x, int64_t group) {
    const ConvShape& s = c.s;
    for (int64_t image = 0; image < c.images; ++image)
      for (int64_t r = 0; r < c.in_rows; ++r) {
        const int64_t y = c.begin * s.stride_h + r - s.pad_top;
        uint8_t* to = c.xs() + (image * c.x_image + c.place(r)) * kVectorBytes;
        const bool inside = y >= 0 && y < s.in_h;
        if (inside) copy_windows(c, x + (image * s.in_h + y) * s.in_w * s.in_c, group);
        for (int64_t v = 0; v < c.layout.vectors; ++v, to += c.x_vector * kVectorBytes) {
          if (!inside) std::memset(to, 0, static_cast<size_t>(c.steps * kVectorBytes));
          for (int64_t step = 0; inside && step < c.steps; ++step)
            interleave(c.row() + step * kStep * c.pitch + v * kSide, c.pitch, to + step * kVectorBytes);
        }
      }
  }

  // Of one row of the gradient: a step of sixteen output channels goes to sixteen places.
  static void pack_row(const Call& c, const int8_t* from, uint8_t* to) {
    const int64_t outs = c.s.group_out(), padded = c.layout.panels * kSide;
    std::memset(c.row(), 0, static_cast<size_t>(c.steps * kStep * padded));
    for (int64_t x = 0; x < c.s.out_w; ++x)
      std::memcpy(c.row() + x * padded, from + x * c.s.out_c, static_cast<size_t>(outs));
    for (int64_t panel = 0; panel < c.layout.panels; ++panel)
      for (int64_t step = 0; step < c.steps; ++step) {
        uint8_t fours[kVectorBytes];
        interleave(c.row() + step * kStep * padded + panel * kSide, padded, fours);
        for (int64_t o = 0; o < kSide; ++o)
          std::memcpy(to + ((panel * kSide + o) * c.g_out + step) * kStep, fours + o * kStep, kStep);
      }
  }

  static void pack_gradient(const Call& c, const int8_t* g, int64_t group) {
    const ConvShape& s = c.s;
    const int64_t used = (c.end - c.begin) * c.steps;
    for (int64_t image = 0; image < c.images; ++image) {
      uint8_t* to = c.gs() + image * c.g_image * kStep;
      for (int64_t o = 0; o < c.layout.panels * kSide; ++o)
        std::memset(to + (o * c.g_out + used) * kStep, 0, static_cast<size_t>((c.g_image - used) * kStep));
      for (int64_t y = c.begin; y < c.end; ++y, to += c.steps * kStep)
        pack_row(c, g + (image * s.out_h + y) * s.out_w * s.out_c + group * s.group_out(), to);
    }
  }

  // A block of panels and vectors with one kernel row.
  template <int kM, int kN, bool kSigned>
  static void block(Tiles& tiles, const Call& c, int64_t ky, int64_t panel, int64_t vector, int32_t* sums, bool fresh) {
    const uint8_t* g = c.gs() + panel * kSide * c.g_out * kStep;
    const uint8_t* x = c.xs() + (vector * c.x_vector + c.place(ky * c.s.dilation_h)) * kVectorBytes;
    int32_t* to = sums + (panel * c.layout.vectors + vector) * kTileSums;
    each<kM>([&](auto i) {
      each<kN>([&](auto j) {
        if (fresh)
          tiles.template zero<i * kN + j>();
        else
          tiles.template load<i * kN + j>(to + (i * c.layout.vectors + j) * kTileSums, kSide * 4);
      });
    });
    const auto load_left = [&](auto i, const uint8_t* gradient) {
      tiles.template load<left_tile(i)>(gradient + i * kSide * c.g_out * kStep, c.g_out * kStep);
    };
    const auto load_right = [&](auto j, const uint8_t* codes) {
      tiles.template load<right_tile(j)>(codes + j * c.x_vector * kVectorBytes, kVectorBytes);
    };
    for (int64_t image = 0; image < c.images; ++image)
      for (int64_t chunk = 0; chunk < c.chunks; ++chunk) {
        const uint8_t* gradient = g + (image * c.g_image + chunk * c.chunk) * kStep;
        const uint8_t* codes = x + (image * c.x_image + chunk * c.chunk) * kVectorBytes;
        // Each factor of the longer side is loaded when its products are due: the fourth overwrites the first.
        if constexpr (kM == 1) {
          load_left(std::integral_constant<int, 0>(), gradient);
          each<kN>([&](auto j) {
            load_right(j, codes);
            tiles.template dot<true, kSigned, j, left_tile(0), right_tile(j)>();
          });
        } else {
          each<kN>([&](auto j) { load_right(j, codes); });
          each<kM>([&](auto i) {
            load_left(i, gradient);
            each<kN>([&](auto j) { tiles.template dot<true, kSigned, i * kN + j, left_tile(i), right_tile(j)>(); });
          });
        }
      }
    each<kM>([&](auto i) {
      each<kN>(
          [&](auto j) { tiles.template store<i * kN + j>(to + (i * c.layout.vectors + j) * kTileSums, kSide * 4); });
    });
  }

  static BlockForm form_of_blocks(const Layout& l) {
    return l.panels == 1 ? BlockForm::wide : l.vectors == 1 ? BlockForm::tall : BlockForm::square;
  }

  template <bool kSigned>
  static void multiply(Tiles& tiles, const Call& c, int32_t* sums, bool fresh) {
    using BlockFn = void (*)(Tiles&, const Call&, int64_t, int64_t, int64_t, int32_t*, bool);
    constexpr BlockFn kBlocks[4][4] = {
        {block<1, 1, kSigned>, block<1, 2, kSigned>, block<1, 3, kSigned>, block<1, 4, kSigned>},
        {block<2, 1, kSigned>, block<2, 2, kSigned>},
        {block<3, 1, kSigned>},
        {block<4, 1, kSigned>}};
    const BlockForm form = form_of_blocks(c.layout);
    const int64_t most_panels = form == BlockForm::tall ? 4 : 2, most_vectors = form == BlockForm::wide ? 4 : 2;
    for (int64_t vector = 0; vector < c.layout.vectors; vector += most_vectors)
      for (int64_t ky = 0; ky < c.s.kernel_h; ++ky)
        for (int64_t panel = 0; panel < c.layout.panels; panel += most_panels)
          kBlocks[least(most_panels, c.layout.panels - panel) - 1][least(most_vectors, c.layout.vectors - vector) - 1](
              tiles, c, ky, panel, vector, sums + ky * c.layout.row_sums, fresh);
  }

  static void add(const ConvShape& s, const void* x, const int8_t* g, int64_t images, int64_t row_begin,
                  int64_t row_end, void* scratch, int32_t* sums, bool fresh) {
    const Call c(s, images, row_begin, row_end, static_cast<uint8_t*>(scratch));
    Tiles tiles(block_config(form_of_blocks(c.layout), kTileRows, c.chunk));
    for (int64_t group = 0; group < s.groups; ++group, sums += s.kernel_h * c.layout.row_sums) {
      pack_codes(c, static_cast<const uint8_t*>(x), group);
      pack_gradient(c, g, group);
      if (s.input_dtype == DType::s8)
        multiply<true>(tiles, c, sums, fresh);
      else
        multiply<false>(tiles, c, sums, fresh);
    }
  }

  template <typename Sum>
  static void read(const ConvShape& s, const int32_t* sums, const WeightBlock& b, Sum* rows, int64_t pitch,
                   bool fresh) {
    const Layout l(s);
    const int64_t outs = s.group_out(), ins = s.group_in(), taps = s.kernel_h * s.kernel_w;
    for (int64_t o = b.out_begin; o < b.out_end; ++o, rows += pitch) {
      const int64_t within = o % outs;
      for (int64_t ky = 0; ky < s.kernel_h; ++ky) {
        const int32_t* of_row = sums + (o / outs * s.kernel_h + ky) * l.row_sums +
                                within / kSide * l.vectors * kTileSums + within % kSide * kSide;
        for (int64_t kx = 0; kx < s.kernel_w; ++kx)
          for (int64_t i = b.in_begin; i < b.in_end; ++i) {
            const int64_t e = kx * ins + i;
            Sum& to = rows[(i - b.in_begin) * taps + ky * s.kernel_w + kx];
            const int32_t sum = of_row[e / kSide * kTileSums + e % kSide];
            to = fresh ? sum : added(to, sum);
          }
      }
    }
  }

  static constexpr WeightGradKernel kernel(const char* name) {
    return {name, sums, scratch_bytes, add, read<int64_t>, read<int32_t>};
  }
};

}  // namespace
}  // namespace bitstrata
