// Reading the sums of the weight gradient with lanes (weight_grad_lanes.h). See pointwise.h for the unnamed namespace.
#pragma once

#include <cstdint>

#include "bitstrata/kernels.h"
#include "weight_grad_layout.h"
#include "weight_sums.h"

namespace bitstrata {
namespace {

template <typename Isa, typename Sum, bool kWinograd>
struct WeightGradRead {
  static constexpr int kLanes = Isa::kLanes, kOuts = Isa::kOuts;
  using Layout = WeightGradLayout<Isa, kWinograd>;

  static int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
  static int64_t least(int64_t a, int64_t b) { return b < a ? b : a; }

  static Sum corrected(Sum sum, Sum correction) { return Isa::kOffset == 0 ? sum : added(sum, correction); }

  // Sums of successive lanes to places kTaps (0: `taps`) elements apart.
  template <bool kFresh, int kTaps, typename To>
  static void read_lanes(const Sum* from, Sum correction, int64_t count, int64_t taps, To* to) {
    const int64_t step = kTaps != 0 ? kTaps : taps;
    for (int64_t n = 0; n < count; ++n) {
      const Sum sum = corrected(from[n], correction);
      to[n * step] = kFresh ? sum : added(to[n * step], sum);
    }
  }

  // Outputs of one panel of a group, which b counts from the group's first. A few channels with all their taps at a
  // time: those of one output lie together in its row, those of one vector together in the sums.
  template <bool kFresh, int kTaps, typename To>
  static void read_columns(const ConvShape& s, const Layout& l, const Sum* sums, int64_t group, const WeightBlock& b,
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

  // The three taps of a kernel row, of successive lanes, from the four forms (see weight_grad_winograd.h), to places
  // kTaps (0: `taps`) elements apart.
  template <bool kFresh, int kTaps, typename To>
  static void read_winograd_lanes(const Sum* from, int64_t form, const Sum* corrections, int64_t form_corrections,
                                  int64_t count, int64_t taps, To* to) {
    const int64_t step = kTaps != 0 ? kTaps : taps;
    Sum by[4];
    for (int f = 0; f < 4; ++f) by[f] = Isa::kOffset == 0 ? Sum(0) : corrections[f * form_corrections];
    const Sum *first = from, *plus = first + form, *minus = plus + form, *last = minus + form;
    for (int64_t n = 0; n < count; ++n) {
      const Sum p = corrected(plus[n], by[1]), half = added(p, corrected(minus[n], by[2])) >> 1;
      const Sum taps_of[3] = {added(corrected(first[n], by[0]), half), added(p, -half),
                              added(corrected(last[n], by[3]), half)};
      for (int k = 0; k < 3; ++k) to[n * step + k] = kFresh ? taps_of[k] : added(to[n * step + k], taps_of[k]);
    }
  }

  // As read_columns; there is one group.
  template <bool kFresh, int kTaps, typename To>
  static void read_winograd(const ConvShape& s, const Layout& l, const Sum* sums, int64_t, const WeightBlock& b,
                            To* rows, int64_t pitch) {
    const int64_t panel = b.out_begin / kOuts, outs = b.out_end - b.out_begin, taps = s.kernel_h * 3;
    const Sum* corrections = sums + l.corrections_at + b.out_begin;
    const Sum* of_panel = sums + panel * l.panel_sums + b.out_begin % kOuts * kLanes;
    for (int64_t e = b.in_begin, run; e < b.in_end; e += run) {
      run = least(b.in_end, up(e + 1, kLanes)) - e;  // within one vector
      const Sum* of_vector = of_panel + e / kLanes * l.vector_sums + e % kLanes;
      for (int64_t ky = 0; ky < s.kernel_h; ++ky)
        for (int64_t o = 0; o < outs; ++o)
          read_winograd_lanes<kFresh, kTaps>(of_vector + (ky * kOuts + o) * kLanes, l.form_sums,
                                             corrections + ky * l.panels * kOuts + o, l.form_corrections, run, taps,
                                             rows + o * pitch + (e - b.in_begin) * taps + ky * 3);
    }
  }

  template <bool kFresh, int kTaps, typename To>
  static void read_panel(const ConvShape& s, const Layout& l, const Sum* sums, int64_t group, const WeightBlock& b,
                         To* rows, int64_t pitch) {
    if constexpr (kWinograd)
      read_winograd<kFresh, kTaps>(s, l, sums, group, b, rows, pitch);
    else
      read_columns<kFresh, kTaps>(s, l, sums, group, b, rows, pitch);
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
};

}  // namespace
}  // namespace bitstrata
