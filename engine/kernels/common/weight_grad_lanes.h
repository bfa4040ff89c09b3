// The weight gradient with vectors whose lanes are elements of a window's row; see pointwise.h for the unnamed
// namespace.
//
// A window's row is the kernel_w * in_c / groups codes that one row of a kernel sees at one output position. Of every
// input row, kStep neighbouring positions go into one vector: each lane holds the codes of one element of the window's
// row, at kStep positions. Of the gradient, kStep positions of each output channel are a group of four bytes that is
// broadcast. One step multiplies the two lane by lane and adds the kStep products to an int32; kOuts output channels
// and up to kVectors vectors are a block, whose sums stay in registers over all rows of all images of a call. As the
// gradient moves along the columns not at all and along the rows whole rows at a time, one packed copy of the input
// serves all taps.
//
// Gradients are bytes with int32 sums, or two bytes wide with float32 sums. Floats of one call are summed from 0 and
// then added to what is there, so that no sum has more terms one after the other than a call has steps.
//
// `Isa` has: Vector; kLanes, kStep, kOuts, kVectors; kOffset: what is added to codes of the type kOffsetOf;
//   zero(), load(Sum*), store(Sum*, Vector), load_packed(void*), broadcast(const void* four_bytes);
//   multiply(sum, codes, broadcast gradient); pack_codes(from, pitch, is_signed, to): a vector from kStep positions
//   `pitch` bytes apart; pack_gradient(from, pitch, to): kOuts groups of four bytes, pitch in gradients;
//   add_outs(packed, count, int32_t[kOuts]): the sums of `count` packed gradients (only if kOffset);
//   add(sum, sum) (only for floats).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "bitstrata/kernels.h"
#include "unroll.h"
#include "weight_sums.h"

namespace bitstrata {
namespace {

template <typename Isa, typename Gradient = int8_t, typename Sum = int32_t>
struct LanesWeightGrad {
  static constexpr bool kFloat = std::is_floating_point_v<Sum>;
  static constexpr int kLanes = Isa::kLanes, kStep = Isa::kStep, kOuts = Isa::kOuts, kVectors = Isa::kVectors;
  static constexpr int64_t kGradient = sizeof(Gradient), kVectorBytes = kLanes * 4, kGradientBytes = kOuts * 4;
  using Vector = typename Isa::Vector;

  static int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
  static int64_t least(int64_t a, int64_t b) { return b < a ? b : a; }
  static int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }

  // Sums are, in each group, [vector][panel of outputs][kernel row][output][lane]; then what takes off the offset:
  // [group][kernel row][output], none without an offset. Vectors are multiplied in sets of nearly equal size.
  struct Layout {
    explicit Layout(const ConvShape& s)
        : elements(s.kernel_w * s.group_in()),
          vectors((elements + kLanes - 1) / kLanes),
          sets((vectors + kVectors - 1) / kVectors),
          panels((s.group_out() + kOuts - 1) / kOuts),
          panel_sums(s.kernel_h * kOuts * kLanes),
          vector_sums(panels * panel_sums),
          group_sums(vectors * vector_sums),
          corrections_at(s.groups * group_sums),
          corrections(Isa::kOffset == 0 ? 0 : s.kernel_h * panels * kOuts),
          sums(corrections_at + s.groups * corrections) {}
    int64_t first_vector(int64_t set) const { return set * vectors / sets; }
    int64_t elements, vectors, sets, panels;
    int64_t panel_sums, vector_sums, group_sums, corrections_at, corrections, sums;
  };

  // What `add` packs, for so many images and output rows: a row of the gradient, or of the input at the positions of
  // one kernel row, takes `steps` vectors. Input rows are ordered by their remainder modulo the stride, so that
  // successive output rows find theirs one after the other.
  struct Packed {
    Packed(const ConvShape& s, const Layout& l, int64_t images, int64_t rows)
        : steps((s.out_w + kStep - 1) / kStep),
          positions(steps * kStep),
          in_rows((rows - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1),
          per_remainder((in_rows + s.stride_h - 1) / s.stride_h),
          x_image(s.stride_h * per_remainder * steps),
          x_vector(images * x_image),
          g_image(rows * steps),
          g_panel(images * g_image),
          whole(s.groups == 1 && (s.dilation_w == 1 || s.kernel_w == 1)),
          pitch(whole ? s.stride_w * s.in_c : l.elements),
          g_at(up(l.vectors * x_vector * kVectorBytes, 64)),
          row_at(up(g_at + l.panels * g_panel * kGradientBytes, 64)),
          row_bytes(most(most(positions * pitch + l.vectors * kLanes, s.padded_w() * s.in_c),
                         (positions * s.group_out() + l.panels * kOuts) * kGradient)),
          bytes(row_at + row_bytes + 64) {}
    int64_t steps, positions, in_rows, per_remainder;
    int64_t x_image, x_vector, g_image, g_panel;  // distances, in vectors or gradients
    bool whole;                                   // windows are read from a padded row, else they are copied apart
    int64_t pitch;                                // from window to window, in bytes
    int64_t g_at, row_at, row_bytes, bytes;
  };

  static int64_t sums(const ConvShape& s) { return Layout(s).sums; }
  static int64_t scratch_bytes(const ConvShape& s, int64_t images, int64_t rows) {
    return Packed(s, Layout(s), images, rows).bytes;
  }

  // One call of `add`.
  struct Call {
    // Of each group's panels of outputs, [panel_begin, panel_end).
    Call(const ConvShape& s, int64_t images, int64_t row_begin, int64_t row_end, uint8_t* scratch, int64_t panel_begin,
         int64_t panel_end)
        : s(s),
          layout(s),
          packed(s, layout, images, row_end - row_begin),
          images(images),
          begin(row_begin),
          end(row_end),
          panel_begin(panel_begin),
          panel_end(least(panel_end, layout.panels)),
          xs(scratch),
          gs(scratch + packed.g_at),
          row(scratch + packed.row_at) {}

    // The input row that output row y meets with kernel row ky; may lie outside of the map.
    int64_t in_row(int64_t y, int64_t ky) const { return y * s.stride_h - s.pad_top + ky * s.dilation_h; }

    const ConvShape& s;
    Layout layout;
    Packed packed;
    int64_t images, begin, end, panel_begin, panel_end;
    uint8_t *xs, *gs, *row;
  };

  // Windows of one row of the map, `pitch` bytes apart, that can be read beyond their ends. Outside of the map c.row is
  // 0 already.
  static const uint8_t* windows(const Call& c, const uint8_t* from, int64_t group) {
    const ConvShape& s = c.s;
    const int64_t columns = s.padded_w(), copied = least(s.in_w, columns - s.pad_left);
    if (c.packed.whole) {
      if (s.pad_left == 0 && s.in_w == columns && c.layout.elements % kLanes == 0 && s.out_w % kStep == 0) return from;
      if (copied > 0) std::memcpy(c.row + s.pad_left * s.in_c, from, static_cast<size_t>(copied * s.in_c));
      return c.row;
    }
    const int64_t ins = s.group_in();
    uint8_t* to = c.row;
    for (int64_t x = 0; x < s.out_w; ++x)
      for (int64_t kx = 0; kx < s.kernel_w; ++kx, to += ins) {
        const int64_t column = x * s.stride_w - s.pad_left + kx * s.dilation_w;
        if (column < 0 || column >= s.in_w)
          std::memset(to, 0, static_cast<size_t>(ins));
        else
          std::memcpy(to, from + column * s.in_c + group * ins, static_cast<size_t>(ins));
      }
    return c.row;
  }

  static void pack_codes(const Call& c, const uint8_t* x, int64_t group) {
    const ConvShape& s = c.s;
    const bool is_signed = s.input_dtype == DType::s8;
    const int64_t row_size = s.in_w * s.in_c;
    std::memset(c.row, 0, static_cast<size_t>(c.packed.row_bytes));
    for (int64_t image = 0; image < c.images; ++image)
      for (int64_t r = 0; r < c.packed.in_rows; ++r) {
        const int64_t y = c.begin * s.stride_h + r - s.pad_top;
        if (y < 0 || y >= s.in_h || !met(s, r)) continue;
        const uint8_t* from = windows(c, x + (image * s.in_h + y) * row_size, group);
        const int64_t place =
            image * c.packed.x_image + (r % s.stride_h * c.packed.per_remainder + r / s.stride_h) * c.packed.steps;
        constexpr int64_t kTogether = 64 / kLanes;  // vectors that are made from the same cache lines
        for (int64_t v = 0; v < c.layout.vectors; v += kTogether)
          for (int64_t step = 0; step < c.packed.steps; ++step)
            for (int64_t u = v; u < least(v + kTogether, c.layout.vectors); ++u)
              Isa::pack_codes(from + step * kStep * c.packed.pitch + u * kLanes, c.packed.pitch, is_signed,
                              c.xs + (u * c.packed.x_vector + place + step) * kVectorBytes);
      }
  }

  // Whether any kernel row meets the r-th of the packed input rows, or one a multiple of the stride away.
  static bool met(const ConvShape& s, int64_t r) {
    for (int64_t ky = 0; ky < s.kernel_h; ++ky)
      if (ky * s.dilation_h % s.stride_h == r % s.stride_h) return true;
    return false;
  }

  static void pack_gradient(const Call& c, const Gradient* g, int64_t group) {
    const ConvShape& s = c.s;
    const int64_t outs = s.group_out(), padded_outs = c.layout.panels * kOuts;
    for (int64_t image = 0; image < c.images; ++image)
      for (int64_t y = c.begin; y < c.end; ++y) {
        const Gradient *from = g + (image * s.out_h + y) * s.out_w * s.out_c + group * outs, *row = from;
        if (s.groups > 1 || outs % kOuts != 0 || s.out_w % kStep != 0) {
          for (int64_t x = 0; x < (s.groups > 1 ? s.out_w : 0); ++x)
            std::memcpy(c.row + x * outs * kGradient, from + x * s.out_c, static_cast<size_t>(outs * kGradient));
          if (s.groups == 1) std::memcpy(c.row, from, static_cast<size_t>(s.out_w * outs * kGradient));
          std::memset(c.row + s.out_w * outs * kGradient, 0,
                      static_cast<size_t>(((c.packed.positions - s.out_w) * outs + padded_outs - outs) * kGradient));
          row = reinterpret_cast<const Gradient*>(c.row);
        }
        uint8_t* to = c.gs + (image * c.packed.g_image + (y - c.begin) * c.packed.steps) * kGradientBytes;
        for (int64_t panel = c.panel_begin; panel < c.panel_end; ++panel)
          for (int64_t step = 0; step < c.packed.steps; ++step)
            Isa::pack_gradient(reinterpret_cast<const uint8_t*>(row + step * kStep * outs + panel * kOuts), outs,
                               to + (panel * c.packed.g_panel + step) * kGradientBytes);
      }
  }

  // Takes off what the offset of the input adds, with the packed gradient of a group.
  static void correct_all(const Call& c, Sum* corrections) {
    if constexpr (Isa::kOffset != 0) {
      if (c.s.input_dtype != Isa::kOffsetOf) return;
      for (int64_t image = 0; image < c.images; ++image)
        for (int64_t panel = c.panel_begin; panel < c.panel_end; ++panel)
          correct(c, c.gs + (image * c.packed.g_image + panel * c.packed.g_panel) * kGradientBytes,
                  corrections + panel * kOuts);
    }
  }

  // Adds factor times the gradient of output rows [from, to); packed: that of all rows of an image and a panel.
  static void add_rows(const Call& c, const uint8_t* packed, int64_t from, int64_t to, uint32_t factor,
                       uint32_t* sums) {
    if (from >= to) return;
    int32_t outs[kOuts] = {};
    Isa::add_outs(packed + (from - c.begin) * c.packed.steps * kGradientBytes, (to - from) * c.packed.steps, outs);
    for (int i = 0; i < kOuts; ++i) sums[i] += static_cast<uint32_t>(outs[i]) * factor;
  }

  // Takes off what the offset of the input adds with an image's gradient for a panel: of all rows, less those that do
  // not meet the map.
  static void correct(const Call& c, const uint8_t* packed, int32_t* corrections) {
    uint32_t all[kOuts] = {};
    add_rows(c, packed, c.begin, c.end, static_cast<uint32_t>(-Isa::kOffset), all);
    for (int64_t ky = 0; ky < c.s.kernel_h; ++ky, corrections += c.layout.panels * kOuts) {
      const Rows met = met_rows(c, ky);
      uint32_t some[kOuts];
      std::memcpy(some, all, sizeof(all));
      add_rows(c, packed, c.begin, met.begin, Isa::kOffset, some);
      add_rows(c, packed, met.end, c.end, Isa::kOffset, some);
      for (int i = 0; i < kOuts; ++i)
        corrections[i] = static_cast<int32_t>(static_cast<uint32_t>(corrections[i]) + some[i]);
    }
  }

  // Output rows that meet a row of the map with kernel row ky.
  struct Rows {
    int64_t begin, end;
  };
  static Rows met_rows(const Call& c, int64_t ky) {
    Rows met{c.begin, c.end};
    while (met.begin < met.end && c.in_row(met.begin, ky) < 0) ++met.begin;
    while (met.begin < met.end && c.in_row(met.end - 1, ky) >= c.s.in_h) --met.end;
    return met;
  }

  // The block of kV vectors from `first` with a panel and a kernel row.
  template <int kV>
  static void block(const Call& c, int64_t first, int64_t panel, int64_t ky, Sum* sums, bool fresh) {
    const ConvShape& s = c.s;
    const Rows met = met_rows(c, ky);
    const int64_t from = met.begin < met.end ? met.begin : c.begin;
    const int64_t offset = ky * s.dilation_h, steps = (met.end - met.begin) * c.packed.steps;
    const int64_t row = offset % s.stride_h * c.packed.per_remainder + offset / s.stride_h + from - c.begin;
    const uint8_t* x = c.xs + (first * c.packed.x_vector + row * c.packed.steps) * kVectorBytes;
    const uint8_t* g = c.gs + (panel * c.packed.g_panel + (from - c.begin) * c.packed.steps) * kGradientBytes;
    const int64_t pitch = c.packed.x_vector * kVectorBytes;
    const int64_t next = c.layout.vector_sums;
    Vector sum[kOuts][kV];
    each<kOuts>([&](auto i) {
      each<kV>([&](auto v) { sum[i][v] = fresh || kFloat ? Isa::zero() : Isa::load(sums + v * next + i * kLanes); });
    });
    for (int64_t image = 0; image < c.images; ++image) {
      const uint8_t *codes = x + image * c.packed.x_image * kVectorBytes,
                    *gradient = g + image * c.packed.g_image * kGradientBytes;
      for (int64_t step = 0; step < steps; ++step, codes += kVectorBytes, gradient += kGradientBytes) {
        Vector a[kV];
        each<kV>([&](auto v) { a[v] = Isa::load_packed(codes + v * pitch); });
        each<kOuts>([&](auto i) {
          const Vector b = Isa::broadcast(gradient + i * 4);
          each<kV>([&](auto v) { sum[i][v] = Isa::multiply(sum[i][v], a[v], b); });
        });
      }
    }
    each<kOuts>([&](auto i) {
      each<kV>([&](auto v) {
        Sum* to = sums + v * next + i * kLanes;
        if constexpr (kFloat) sum[i][v] = fresh ? sum[i][v] : Isa::add(Isa::load(to), sum[i][v]);
        Isa::store(to, sum[i][v]);
      });
    });
  }

  using BlockFn = void (*)(const Call&, int64_t, int64_t, int64_t, Sum*, bool);

  static void add_panels(const Call& c, const void* x, const Gradient* g, Sum* sums, bool fresh) {
    constexpr BlockFn kBlocks[3] = {block<1>, block<2>, block < kVectors == 3 ? 3 : 1 > };
    const Layout& l = c.layout;
    for (int64_t group = 0; group < c.s.groups; ++group) {
      pack_codes(c, static_cast<const uint8_t*>(x), group);
      pack_gradient(c, g, group);
      correct_all(c, sums + l.corrections_at + group * l.corrections);
      for (int64_t set = 0; set < l.sets; ++set) {
        const int64_t first = l.first_vector(set), count = l.first_vector(set + 1) - first;
        Sum* to = sums + group * l.group_sums + first * l.vector_sums;
        for (int64_t panel = c.panel_begin; panel < c.panel_end; ++panel)
          for (int64_t ky = 0; ky < c.s.kernel_h; ++ky)
            kBlocks[count - 1](c, first, panel, ky, to + panel * l.panel_sums + ky * kOuts * kLanes, fresh);
      }
    }
  }

  static void add(const ConvShape& s, const void* x, const Gradient* g, int64_t images, int64_t row_begin,
                  int64_t row_end, void* scratch, Sum* sums, bool fresh) {
    const Call c(s, images, row_begin, row_end, static_cast<uint8_t*>(scratch), 0, INT64_MAX);
    if (fresh)
      std::memset(sums + c.layout.corrections_at, 0, static_cast<size_t>(c.layout.sums - c.layout.corrections_at) * 4);
    add_panels(c, x, g, sums, fresh);
  }

  // The same for output channels [out_begin, out_end) of one group; out_begin: a multiple of kOuts.
  static void add_outs(const ConvShape& s, const void* x, const Gradient* g, const FloatWeightGradBlock& b,
                       void* scratch, Sum* sums, bool fresh) {
    const int64_t panel_end = (b.out_end + kOuts - 1) / kOuts;
    const Call c(s, b.images, b.row_begin, b.row_end, static_cast<uint8_t*>(scratch), b.out_begin / kOuts, panel_end);
    add_panels(c, x, g, sums, fresh);
  }

  // Sums of successive lanes to places kTaps (0: `taps`) elements apart.
  template <bool kFresh, int kTaps, typename To>
  static void read_lanes(const Sum* from, Sum correction, int64_t count, int64_t taps, To* to) {
    const int64_t step = kTaps != 0 ? kTaps : taps;
    for (int64_t n = 0; n < count; ++n) {
      const Sum sum = Isa::kOffset == 0 ? from[n] : added(from[n], correction);
      to[n * step] = kFresh ? sum : added(to[n * step], sum);
    }
  }

  // Outputs of one panel of a group, which b counts from the group's first. A few channels with all their taps at a
  // time: those of one output lie together in its row, those of one vector together in the sums.
  template <bool kFresh, int kTaps, typename To>
  static void read_panel(const ConvShape& s, const Layout& l, const Sum* sums, int64_t group, const WeightBlock& b,
                         To* rows, int64_t pitch) {
    const int64_t panel = b.out_begin / kOuts, outs = b.out_end - b.out_begin;
    const int64_t ins = s.group_in(), taps = s.kernel_h * s.kernel_w;
    const Sum* corrections = sums + l.corrections_at + group * l.corrections + b.out_begin;
    const Sum* of_panel = sums + group * l.group_sums + panel * l.panel_sums + b.out_begin % kOuts * kLanes;
    const int64_t ahead = l.vector_sums * (taps == 1 ? 4 : 1);  // vectors are too far apart to be fetched unasked
    for (int64_t channel = b.in_begin; channel < b.in_end; channel += kLanes)
      for (int64_t kx = 0; kx < s.kernel_w; ++kx) {
        const int64_t first = kx * ins + b.in_begin, last = kx * ins + least(channel + kLanes, b.in_end);
        for (int64_t e = kx * ins + channel, run; e < last; e += run) {
          run = least(last, up(e + 1, kLanes)) - e;  // within one vector
          const Sum* of_vector = of_panel + e / kLanes * l.vector_sums + e % kLanes;
          for (int64_t ky = 0; ky < s.kernel_h; ++ky)
            for (int64_t o = 0; o < outs; ++o) {
              __builtin_prefetch(of_vector + (ky * kOuts + o) * kLanes + ahead);
              read_lanes<kFresh, kTaps>(of_vector + (ky * kOuts + o) * kLanes,
                                        Isa::kOffset == 0 ? Sum(0) : corrections[ky * l.panels * kOuts + o], run, taps,
                                        rows + o * pitch + ((e - first) * s.kernel_h + ky) * s.kernel_w + kx);
            }
        }
      }
  }

  template <typename To>
  static void read(const ConvShape& s, const Sum* sums, const WeightBlock& b, To* rows, int64_t pitch, bool fresh) {
    using ReadFn = void (*)(const ConvShape&, const Layout&, const Sum*, int64_t, const WeightBlock&, To*, int64_t);
    constexpr ReadFn kReads[2][3] = {{read_panel<false, 0>, read_panel<false, 1>, read_panel<false, 9>},
                                     {read_panel<true, 0>, read_panel<true, 1>, read_panel<true, 9>}};
    const Layout l(s);
    const int64_t outs = s.group_out(), taps = s.kernel_h * s.kernel_w;
    const ReadFn read_some = kReads[fresh ? 1 : 0][taps == 1 ? 1 : taps == 9 ? 2 : 0];
    for (int64_t o = b.out_begin, end; o < b.out_end; o = end) {
      const int64_t group = o / outs, within = o % outs;
      end = group * outs + least(least(outs, within / kOuts * kOuts + kOuts), within + b.out_end - o);
      read_some(s, l, sums, group, {within, end - group * outs, b.in_begin, b.in_end}, rows + (o - b.out_begin) * pitch,
                pitch);
    }
  }

  static constexpr auto kernel(const char* name) {
    if constexpr (kFloat)
      return FloatWeightGradKernel{name, kOuts, sums, scratch_bytes, add_outs, read<float>, nullptr};
    else
      return WeightGradKernel{name, sums, scratch_bytes, add, read<int64_t>, read<int32_t>};
  }
};

}  // namespace
}  // namespace bitstrata
