// The contract between the graph and its kernels: plain structs, raw pointers, no allocation and no exceptions.
//
// One `Kernels` row exists for each instruction set (see src/dispatch.cc). Every kernel of every row computes the same
// integers; arithmetic wraps modulo 2^32 (accumulators) or 2^64 (requantization), so no input is undefined behaviour.
// Pointers need no more alignment than their type, except where a comment says otherwise.
#pragma once

#include <cstdint>

#include "bitstrata/float_kernels.h"
#include "bitstrata/training.h"
#include "bitstrata/types.h"

namespace bitstrata {

// A convolution of one NHWC image. The weight is mul * code + add; it fits int16.
struct ConvShape {
  int64_t in_h, in_w, in_c;
  int64_t out_h, out_w, out_c;
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t dilation_h, dilation_w;
  int64_t pad_top, pad_left;  // bottom and right follow from the output's extent
  int64_t groups;
  int32_t mul, add;
  int32_t code_lo, code_hi;    // actual bounds of the weight codes
  int32_t input_lo, input_hi;  // proved bounds of the input, pad codes included
  DType input_dtype;           // u8 or s8

  int64_t group_in() const { return in_c / groups; }
  int64_t group_out() const { return out_c / groups; }
  // Rows and columns of the padded input that windows read.
  int64_t padded_h() const { return (out_h - 1) * stride_h + (kernel_h - 1) * dilation_h + 1; }
  int64_t padded_w() const { return (out_w - 1) * stride_w + (kernel_w - 1) * dilation_w + 1; }
};

// Weight codes anywhere in memory: that of output channel o and input channel i of a group, at tap (ky, kx), is
// data[group * group_step + o * out_step + i * in_step + first_tap + ky * tap_y + kx * tap_x]. A kernel's taps are some
// of those that lie together: `taps` elements from where first_tap, tap_y and tap_x are 0.
struct WeightCodes {
  const int8_t* data;
  int64_t group_step, out_step, in_step;
  int64_t first_tap, tap_y, tap_x;
  int64_t taps;
};

struct RequantArgs;
// A row's fastest products, over and over, on registers where that can be: what a convolution can reach at best.
struct PeakLoop {
  const char* name;  // the instructions
  int64_t products;  // of a round
  void (*run)(int64_t rounds);
};

// One way to convolve. Work on an image has two phases: `stage` copies the input into padded rows of the kernel's own
// format, `run` computes output rows from them. Rows of either phase may be computed in any order by any thread, but
// the staged rows under a window must be complete before `run` reads them. A staged row depends on nothing but its
// input row, so images of one row each may be staged and run as the rows of one image.
struct ConvKernel {
  const char* name;
  int64_t (*packed_bytes)(const ConvShape&);
  // codes: (out_c, in_c / groups, kernel_h, kernel_w); pad: (in_c,); packed: packed_bytes, aligned to 64.
  void (*pack)(const ConvShape&, const int8_t* codes, const int32_t* pad, void* packed);
  // A multiple of 4; staged rows are padded_h() of these. 0: nothing is staged, `run` reads the image itself.
  int64_t (*staged_row_bytes)(const ConvShape&);
  void (*stage)(const ConvShape&, const void* packed, const void* image, void* staged, int64_t row_begin,
                int64_t row_end);
  // staged: aligned to 4, or the image; out: (out_h, out_w, out_c).
  void (*run)(const ConvShape&, const void* packed, const void* staged, int32_t* out, int64_t row_begin,
              int64_t row_end);
  // The same as `pack`, in parts that threads may share, of weights in any order. No parts, or null: only `pack`.
  // factor: (in_c,), what the weights of each input channel are multiplied by, modulo 2^8; null: 1.
  int64_t (*pack_parts)(const ConvShape&) = nullptr;
  void (*pack_part)(const ConvShape&, const WeightCodes&, const uint8_t* factor, const int32_t* pad, void* packed,
                    int64_t part) = nullptr;
  const PeakLoop* peak = nullptr;  // what bounds this kernel; null: the row's
  // `run` and the requantization of its result to 8 bits, all of whose channels have the low or all the high
  // form. Null: none.
  void (*run_codes)(const ConvShape&, const void* packed, const void* staged, const RequantArgs&, uint8_t* out,
                    int64_t row_begin, int64_t row_end) = nullptr;
  // Products of the peak that one product of the convolution takes, where it is not one. Null: 1.
  double (*passes)(const ConvShape&) = nullptr;
};

// How sixteen neighbouring channels are requantized; all forms give the same integers where they may be used.
//   wide: in 64 bits, as RequantArgs says.
//   low: out = (clamp(x, from[c], to[c]) * factor[c] + addend[c]) >> places[c], modulo 2^32 throughout.
//   high: out = clamp(h >> places[c], lo, hi) with h the upper 32 bits of x * factor[c] + bias[c].
//   narrow: out = clamp(y, lo, hi) with y the lower 32 bits of (x * factor[c] + bias[c]) >> shift[c]; shift[c] <= 32.
enum class RequantForm : uint8_t { wide, low, high, narrow };

// out = clamp((x * multiplier[c] + bias[c]) >> shift[c], lo, hi); shift in 0..62, multiplier within int32.
struct RequantArgs {
  const int64_t *multiplier, *bias, *shift;  // (channels,) each
  int64_t channels;
  int32_t lo, hi;
  // The other forms' constants (see src/requant_forms.h), or null. form[i]: of channels 16 i to 16 i + 15.
  const RequantForm* form = nullptr;
  const int32_t *from = nullptr, *to = nullptr, *factor = nullptr, *addend = nullptr, *places = nullptr;  // (channels,)

  RequantForm form_of(int64_t channel) const { return form == nullptr ? RequantForm::wide : form[channel / 16]; }
};
using RequantFn = void (*)(const RequantArgs&, const void* x, void* out, int64_t pixels);

// out = align(a, shift_a) + align(b, shift_b); shifts in -31..62, positive is a right shift, rounding half up.
using AddFn = void (*)(const int32_t* a, const int32_t* b, int32_t* out, int64_t count, int shift_a, int shift_b);

using ClipFn = void (*)(const void* x, void* out, int64_t count, int32_t lo, int32_t hi);

struct PoolShape {
  int64_t in_h, in_w, channels;
  int64_t out_h, out_w;
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t pad_top, pad_left;
  int32_t shift;  // of a sum
};
// Output rows [row_begin, row_end) of one image. A maximum's windows each hold at least one position of the map.
using PoolFn = void (*)(const PoolShape&, const void* x, void* out, int64_t row_begin, int64_t row_end);

// Weights of output channels [out_begin, out_end) and of input channels [in_begin, in_end) of their groups.
struct WeightBlock {
  int64_t out_begin, out_end, in_begin, in_end;
};

// One way to sum what every weight of a convolution multiplied: over images and output positions, gradient times input.
// Shapes are those of the forward convolution, with the bounds of the gradient in the place of the weight's; of `mul`
// and `add` nothing is read, padding is 0. Sums are kept in the kernel's own order. They are exact for up to
// INT32_MAX / (128 * 255) positions: who adds more reads in between.
struct WeightGradKernel {
  const char* name;
  int64_t (*sums)(const ConvShape&);  // how many
  // Of `add`, aligned to 64, for so many images and output rows of each.
  int64_t (*scratch_bytes)(const ConvShape&, int64_t images, int64_t rows);
  // Adds output rows [row_begin, row_end) of each image; sums: aligned to 64. x: (images, in_h, in_w, in_c) of
  // input_dtype; g: (images, out_h, out_w, out_c). fresh: sums are not set yet, and count as 0.
  void (*add)(const ConvShape&, const void* x, const int8_t* g, int64_t images, int64_t row_begin, int64_t row_end,
              void* scratch, int32_t* sums, bool fresh);
  // Adds the sums of a block of weights to rows, one for each of its output channels, `pitch` elements apart, in the
  // order (input channel of the block, kernel_h, kernel_w); fresh: rows are not set yet, and count as 0. read_short:
  // modulo 2^32.
  void (*read)(const ConvShape&, const int32_t* sums, const WeightBlock&, int64_t* rows, int64_t pitch, bool fresh);
  void (*read_short)(const ConvShape&, const int32_t* sums, const WeightBlock&, int32_t* rows, int64_t pitch,
                     bool fresh);
  // The sums of some output channels alone, where there is one group: out_begin is a multiple of `outs`, and the sums
  // are those of a convolution with no other output channels. `pack` puts into scratch (of scratch_bytes) what add_outs
  // reads of x, for any blocks of these images and rows. 0 and null: only `add`.
  int64_t outs = 0;
  void (*pack)(const ConvShape&, const void* x, int64_t images, int64_t row_begin, int64_t row_end,
               void* scratch) = nullptr;
  void (*add_outs)(const ConvShape&, const int8_t* g, const WeightGradBlock&, void* scratch, int32_t* sums,
                   bool fresh) = nullptr;
};

// Integer products of a training step: weight gradients, and the loops around products. Channels are the innermost
// dimension.
struct ProductKernels {
  const WeightGradKernel* (*weight_grad)(const ConvShape&);  // the best for this convolution
  // out[i] = x[i] * factor[i mod period], modulo 2^8.
  void (*multiply_codes)(const uint8_t* x, const uint8_t* factor, uint8_t* out, int64_t count, int64_t period);
  // lo[c] = min(lo[c], x[., c]), hi[c] = max(hi[c], x[., c]).
  void (*bounds)(const int32_t* x, int64_t pixels, int64_t channels, int32_t* lo, int32_t* hi);
  // x[i] = (x[i] << shift) + part[i], modulo 2^32.
  void (*shift_add)(int32_t* x, const int32_t* part, int64_t count, int shift);
  // out[p, c] = float(x[p, c]) * factor[c] (+ bias[c], null for none).
  void (*scale)(const int32_t* x, const float* factor, const float* bias, float* out, int64_t pixels, int64_t channels);
  // out[i] = float(double(x[i]) * (outer * inner[i])).
  void (*scale_sums)(const int64_t* x, double outer, const double* inner, float* out, int64_t count);
  void (*scale_short_sums)(const int32_t* x, double outer, const double* inner, float* out, int64_t count);
};

// What a row could do at best, for the profiler to measure.
struct Limits {
  PeakLoop products;
  // bytes: a multiple of 64, as are the addresses. copy inverts every bit, so that it is no library's copy.
  void (*read)(const void* from, int64_t bytes);
  void (*copy)(const void* from, void* to, int64_t bytes);
};

// A row of the dispatch table. Arrays are indexed by DType.
struct Kernels {
  const char* isa;
  bool (*supported)();                          // by this processor and its operating system
  const ConvKernel* (*conv)(const ConvShape&);  // the best kernel that is exact for this convolution
  RequantFn requant[kDTypes][kDTypes];          // [input][output]
  AddFn add;
  ClipFn clip[kDTypes];
  PoolFn max_pool[kDTypes];
  PoolFn sum_pool[kDTypes];    // the result is i32
  PoolFn sum_codes[kDTypes];   // the result has the input's type and wraps; none for i32
  bool requant_forms = false;  // requant uses RequantArgs::form
  const Training* training;    // quantization and normalization of a training step
  const ProductKernels* products;
  // The first thing that the processor or its operating system lacks, null if `supported`. If there is no such
  // function, it is not known.
  const char* (*lacks)() = nullptr;
  const Limits* (*limits)() = nullptr;  // null: the generic row's
  // Products of floats that this processor multiplies fast; null, or no function: the generic row's.
  const FloatProducts* (*float_products)() = nullptr;
  // Another kernel of the row that is exact for a convolution, for which `conv` has an estimate only: on some processor
  // it may be faster. Null, or no function: none.
  const ConvKernel* (*other_conv)(const ConvShape&) = nullptr;
};

}  // namespace bitstrata
