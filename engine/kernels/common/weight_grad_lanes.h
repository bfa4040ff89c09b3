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
// Three taps of a row may also be found from four products of pairs of positions (kWinograd, see
// weight_grad_winograd.h): then a position is a pair of output columns, its window's row the in_c channels, and codes,
// gradients and sums exist in four forms.
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
// For kWinograd: pack_winograd(from, pitch, is_signed, to, apart) and pack_gradient_winograd(from, pitch, to, apart):
//   the four forms, `apart` bytes apart; pitch between columns. Codes of either type have the offset then.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "bitstrata/kernels.h"
#include "unroll.h"
#include "weight_grad_layout.h"
#include "weight_grad_read.h"

namespace bitstrata {
namespace {

template <typename Isa, typename Gradient = int8_t, typename Sum = int32_t, bool kWinograd = false>
struct LanesWeightGrad {
  static constexpr bool kFloat = std::is_floating_point_v<Sum>;
  static constexpr int kLanes = Isa::kLanes, kStep = Isa::kStep, kOuts = Isa::kOuts, kVectors = Isa::kVectors;
  static constexpr int64_t kGradient = sizeof(Gradient), kVectorBytes = kLanes * 4, kGradientBytes = kOuts * 4;
  using Vector = typename Isa::Vector;
  using Layout = WeightGradLayout<Isa, kWinograd>;
  using Packed = WeightGradPacked<Isa, kWinograd, kGradient>;
  static constexpr int kForms = Layout::kForms, kColumns = Layout::kColumns;

  static int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
  static int64_t least(int64_t a, int64_t b) { return b < a ? b : a; }

  static int64_t sums(const ConvShape& s) { return Layout(s).sums; }
  static int64_t scratch_bytes(const ConvShape& s, int64_t images, int64_t rows) {
    return Packed(s, Layout(s), images, rows).bytes;
  }

  // One call.
  struct Call {
    // Of each group's panels of outputs those that hold outputs [out_begin, out_end); the sums are laid out as `kept`
    // says, from panel kept_from on.
    Call(const ConvShape& s, const WeightGradBlock& b, void* scratch, const Layout& kept, int64_t kept_from)
        : s(s),
          layout(s),
          kept(kept),
          packed(s, layout, b.images, b.row_end - b.row_begin),
          images(b.images),
          begin(b.row_begin),
          end(b.row_end),
          panel_begin(b.out_begin / kOuts),
          panel_end(least((b.out_end + kOuts - 1) / kOuts, layout.panels)),
          kept_from(kept_from),
          xs(static_cast<uint8_t*>(scratch)),
          gs(xs + packed.g_at),
          row(xs + packed.row_at) {}

    // The input row that output row y meets with kernel row ky; may lie outside of the map.
    int64_t in_row(int64_t y, int64_t ky) const { return y * s.stride_h - s.pad_top + ky * s.dilation_h; }

    const ConvShape& s;
    Layout layout;
    const Layout& kept;
    Packed packed;
    int64_t images, begin, end, panel_begin, panel_end, kept_from;
    uint8_t *xs, *gs, *row;
  };

  // Windows of one row of the map, `pitch` bytes apart, that can be read beyond their ends. Outside of the map c.row is
  // 0 already.
  static const uint8_t* windows(const Call& c, const uint8_t* from, int64_t group) {
    const ConvShape& s = c.s;
    const int64_t columns = s.padded_w(), copied = least(s.in_w, columns - s.pad_left);
    if (c.packed.whole) {
      if (!kWinograd && s.pad_left == 0 && s.in_w == columns && c.layout.elements % kLanes == 0 && s.out_w % kStep == 0)
        return from;
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
        for (int64_t v = 0; v < c.layout.form_vectors; v += kTogether)
          for (int64_t step = 0; step < c.packed.steps; ++step)
            for (int64_t u = v; u < least(v + kTogether, c.layout.form_vectors); ++u) {
              const uint8_t* codes = from + step * kStep * kColumns * c.packed.pitch + u * kLanes;
              uint8_t* to = c.xs + (u * c.packed.x_vector + place + step) * kVectorBytes;
              if constexpr (kWinograd)
                Isa::pack_winograd(codes, c.packed.pitch, is_signed, to,
                                   c.layout.form_vectors * c.packed.x_vector * kVectorBytes);
              else
                Isa::pack_codes(codes, c.packed.pitch, is_signed, to);
            }
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
        if (s.groups > 1 || outs % kOuts != 0 || c.packed.columns != s.out_w) {
          for (int64_t x = 0; x < (s.groups > 1 ? s.out_w : 0); ++x)
            std::memcpy(c.row + x * outs * kGradient, from + x * s.out_c, static_cast<size_t>(outs * kGradient));
          if (s.groups == 1) std::memcpy(c.row, from, static_cast<size_t>(s.out_w * outs * kGradient));
          std::memset(c.row + s.out_w * outs * kGradient, 0,
                      static_cast<size_t>(((c.packed.columns - s.out_w) * outs + padded_outs - outs) * kGradient));
          row = reinterpret_cast<const Gradient*>(c.row);
        }
        uint8_t* to = c.gs + (image * c.packed.g_image + (y - c.begin) * c.packed.steps) * kGradientBytes;
        for (int64_t panel = c.panel_begin; panel < c.panel_end; ++panel)
          for (int64_t step = 0; step < c.packed.steps; ++step) {
            const uint8_t* codes =
                reinterpret_cast<const uint8_t*>(row + step * kStep * kColumns * outs + panel * kOuts);
            uint8_t* place = to + (panel * c.packed.g_panel + step) * kGradientBytes;
            if constexpr (kWinograd)
              Isa::pack_gradient_winograd(codes, outs, place, c.packed.g_form * kGradientBytes);
            else
              Isa::pack_gradient(codes, outs, place);
          }
      }
  }

  // Takes off what the offset of the input adds, with the packed gradient of a group.
  static void correct_all(const Call& c, Sum* corrections) {
    if constexpr (Isa::kOffset != 0) {
      if (!kWinograd && c.s.input_dtype != Isa::kOffsetOf) return;
      for (int64_t form = 0; form < kForms; ++form, corrections += c.kept.form_corrections)
        for (int64_t image = 0; image < c.images; ++image)
          for (int64_t panel = c.panel_begin; panel < c.panel_end; ++panel) {
            const int64_t at = form * c.packed.g_form + image * c.packed.g_image + panel * c.packed.g_panel;
            correct(c, c.gs + at * kGradientBytes, corrections + (panel - c.kept_from) * kOuts);
          }
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
    for (int64_t ky = 0; ky < c.s.kernel_h; ++ky, corrections += c.kept.panels * kOuts) {
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

  // The block of kV vectors of a form from `first` with a panel and a kernel row.
  template <int kV>
  static void block(const Call& c, int64_t first, int64_t panel, int64_t ky, Sum* sums, bool fresh) {
    const ConvShape& s = c.s;
    const Rows met = met_rows(c, ky);
    const int64_t from = met.begin < met.end ? met.begin : c.begin;
    const int64_t offset = ky * s.dilation_h, steps = (met.end - met.begin) * c.packed.steps;
    const int64_t row = offset % s.stride_h * c.packed.per_remainder + offset / s.stride_h + from - c.begin;
    const uint8_t* x = c.xs + (first * c.packed.x_vector + row * c.packed.steps) * kVectorBytes;
    const uint8_t* g = c.gs + (first / c.layout.form_vectors * c.packed.g_form + panel * c.packed.g_panel +
                               (from - c.begin) * c.packed.steps) *
                                  kGradientBytes;
    const int64_t pitch = c.packed.x_vector * kVectorBytes;
    const int64_t next = c.kept.vector_sums;
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

  // With the packed input of a group.
  static void multiply(const Call& c, int64_t group, Sum* sums, bool fresh) {
    constexpr BlockFn kBlocks[3] = {block<1>, block<2>, block < kVectors == 3 ? 3 : 1 > };
    const Layout &l = c.layout, &kept = c.kept;
    for (int64_t set = 0; set < l.sets; ++set) {
      const int64_t first = l.first_vector(set), count = l.first_vector(set + 1) - first;
      Sum* to = sums + group * kept.group_sums + first * kept.vector_sums;
      for (int64_t panel = c.panel_begin; panel < c.panel_end; ++panel)
        for (int64_t ky = 0; ky < c.s.kernel_h; ++ky)
          kBlocks[count - 1](c, first, panel, ky, to + (panel - c.kept_from) * kept.panel_sums + ky * kOuts * kLanes,
                             fresh);
    }
  }

  static void add_group(const Call& c, const Gradient* g, int64_t group, Sum* sums, bool fresh) {
    pack_gradient(c, g, group);
    correct_all(c, sums + c.kept.corrections_at + group * c.kept.corrections);
    multiply(c, group, sums, fresh);
  }

  static void clear_corrections(const Layout& l, Sum* sums) {
    std::memset(sums + l.corrections_at, 0, static_cast<size_t>(l.sums - l.corrections_at) * 4);
  }

  static void add(const ConvShape& s, const void* x, const Gradient* g, int64_t images, int64_t row_begin,
                  int64_t row_end, void* scratch, Sum* sums, bool fresh) {
    const Layout kept(s);
    const Call c(s, {images, row_begin, row_end, 0, s.group_out()}, scratch, kept, 0);
    if (fresh) clear_corrections(kept, sums);
    for (int64_t group = 0; group < s.groups; ++group) {
      pack_codes(c, static_cast<const uint8_t*>(x), group);
      add_group(c, g, group, sums, fresh);
    }
  }

  // As of WeightGradKernel.
  static void pack(const ConvShape& s, const void* x, int64_t images, int64_t row_begin, int64_t row_end,
                   void* scratch) {
    const Layout kept(s);
    pack_codes(Call(s, {images, row_begin, row_end, 0, s.out_c}, scratch, kept, 0), static_cast<const uint8_t*>(x), 0);
  }
  static void add_outs(const ConvShape& s, const Gradient* g, const WeightGradBlock& b, void* scratch, Sum* sums,
                       bool fresh) {
    ConvShape alone = s;
    alone.out_c = b.out_end - b.out_begin;
    const Layout kept(alone);
    if (fresh) clear_corrections(kept, sums);
    add_group(Call(s, b, scratch, kept, b.out_begin / kOuts), g, 0, sums, fresh);
  }

  // As of FloatWeightGradKernel.
  static void add_block(const ConvShape& s, const void* x, const Gradient* g, const WeightGradBlock& b, void* scratch,
                        Sum* sums, bool fresh) {
    const Layout kept(s);
    const Call c(s, b, scratch, kept, 0);
    pack_codes(c, static_cast<const uint8_t*>(x), 0);
    add_group(c, g, 0, sums, fresh);
  }

  static constexpr auto kernel(const char* name) {
    using Read = WeightGradRead<Isa, Sum, kWinograd>;
    if constexpr (kFloat)
      return FloatWeightGradKernel{name, kOuts, sums, scratch_bytes, add_block, Read::template read<float>, nullptr};
    else
      return WeightGradKernel{
          name,  sums, scratch_bytes, add, Read::template read<int64_t>, Read::template read<int32_t>,
          kOuts, pack, add_outs};
  }
};

}  // namespace
}  // namespace bitstrata
