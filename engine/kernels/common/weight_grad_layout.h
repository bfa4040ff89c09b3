// Where the weight gradient with lanes (weight_grad_lanes.h) keeps its sums and what it packs. See pointwise.h for the
// unnamed namespace.
#pragma once

#include <cstdint>

#include "bitstrata/kernels.h"

namespace bitstrata {
namespace {

// Sums are, in each group, [form][vector][panel of outputs][kernel row][output][lane]; then what takes off the offset:
// [group][form][kernel row][output], none without an offset. Vectors of a form are multiplied in sets of nearly equal
// size.
template <typename Isa, bool kWinograd>
struct WeightGradLayout {
  static constexpr int kForms = kWinograd ? 4 : 1, kColumns = kWinograd ? 2 : 1;  // output columns of a position

  explicit WeightGradLayout(const ConvShape& s)
      : elements(kWinograd ? s.in_c : s.kernel_w * s.group_in()),
        form_vectors((elements + Isa::kLanes - 1) / Isa::kLanes),
        form_sets((form_vectors + Isa::kVectors - 1) / Isa::kVectors),
        sets(kForms * form_sets),
        panels((s.group_out() + Isa::kOuts - 1) / Isa::kOuts),
        panel_sums(s.kernel_h * Isa::kOuts * Isa::kLanes),
        vector_sums(panels * panel_sums),
        form_sums(form_vectors * vector_sums),
        group_sums(kForms * form_sums),
        corrections_at(s.groups * group_sums),
        form_corrections(Isa::kOffset == 0 ? 0 : s.kernel_h * panels * Isa::kOuts),
        corrections(kForms * form_corrections),
        sums(corrections_at + s.groups * corrections) {}
  // Counting the vectors of all forms.
  int64_t first_vector(int64_t set) const {
    return set / form_sets * form_vectors + set % form_sets * form_vectors / form_sets;
  }
  int64_t elements, form_vectors, form_sets, sets, panels;
  int64_t panel_sums, vector_sums, form_sums, group_sums;
  int64_t corrections_at, form_corrections, corrections, sums;
};

// What is packed, for so many images and output rows: a row of the gradient, or of the input at the positions of one
// kernel row, takes `steps` vectors. Input rows are ordered by their remainder modulo the stride, so that successive
// output rows find theirs one after the other.
template <typename Isa, bool kWinograd, int64_t kGradient>
struct WeightGradPacked {
  using Layout = WeightGradLayout<Isa, kWinograd>;
  static constexpr int64_t kLanes = Isa::kLanes, kStep = Isa::kStep, kOuts = Isa::kOuts;
  static constexpr int64_t kColumns = Layout::kColumns, kForms = Layout::kForms;

  WeightGradPacked(const ConvShape& s, const Layout& l, int64_t images, int64_t rows)
      : steps(((s.out_w + kColumns - 1) / kColumns + kStep - 1) / kStep),
        columns(steps * kStep * kColumns),
        in_rows((rows - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1),
        per_remainder((in_rows + s.stride_h - 1) / s.stride_h),
        x_image(s.stride_h * per_remainder * steps),
        x_vector(images * x_image),
        g_image(rows * steps),
        g_panel(images * g_image),
        g_form(l.panels * g_panel),
        whole(s.groups == 1 && (s.dilation_w == 1 || s.kernel_w == 1)),
        pitch(whole ? s.stride_w * s.in_c : l.elements),
        g_at(up(kForms * l.form_vectors * x_vector * kLanes * 4, 64)),
        row_at(up(g_at + kForms * g_form * kOuts * 4, 64)),
        row_bytes(most(most((columns + (kWinograd ? 2 : 0)) * pitch + l.form_vectors * kLanes, s.padded_w() * s.in_c),
                       (columns * s.group_out() + l.panels * kOuts) * kGradient)),
        bytes(row_at + row_bytes + 64) {}
  int64_t steps;
  int64_t columns;  // of a row of the gradient, with those that fill up the last step
  int64_t in_rows, per_remainder;
  int64_t x_image, x_vector, g_image, g_panel, g_form;  // distances, in vectors or gradients
  bool whole;     // windows are read from a padded row, else they are copied apart
  int64_t pitch;  // from window to window (kWinograd: column to column), in bytes
  int64_t g_at, row_at, row_bytes, bytes;

 private:
  static int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
  static int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }
};

}  // namespace
}  // namespace bitstrata
