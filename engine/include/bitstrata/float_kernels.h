// Kernels for products of floats in a quantization-aware backward pass: plain structs, raw pointers, no allocation.
//
// One `FloatProducts` table exists for each instruction set that multiplies such floats; a row of the dispatch table
// (kernels.h) names its own, and rows without one use the portable table. bfloat16 is kept as uint16, channels are
// innermost. Sums are float32 or wider, in the kernel's own order, which depends on the convolution's shape alone;
// where all partial sums are integers below 2^24, every kernel computes the same. Numbers below 2^-126 may count as 0.
#pragma once

#include <cstdint>

namespace bitstrata {

struct ConvShape;
struct WeightBlock;

// One way to compute the gradient of a convolution's input from that of its output: out = transposed convolution of g
// with integer weights. Shapes are those of the forward convolution; of `mul`, `add`, bounds and input_dtype nothing is
// read, padding is 0, there is one group, and at most 128 taps.
struct InputGradientKernel {
  const char* name;
  int64_t (*packed_bytes)(const ConvShape&);
  // Weights are packed in parts that threads may share.
  int64_t (*pack_parts)(const ConvShape&);
  // Integers (out_c, in_c, kernel_h, kernel_w): (high << 1) + low, or high alone if low is null; packed: aligned to 64.
  void (*pack)(const ConvShape&, const int8_t* high, const int8_t* low, void* packed, int64_t part);
  // What `run` needs for so many rows, aligned to 64.
  int64_t (*scratch_bytes)(const ConvShape&, int64_t rows);
  // Rows [row_begin, row_end) of one image's gradient; g: (out_h, out_w, out_c), out: (in_h, in_w, in_c), bfloat16.
  void (*run)(const ConvShape&, const void* packed, const uint16_t* g, void* scratch, uint16_t* out, int64_t row_begin,
              int64_t row_end);
};

// Output rows [row_begin, row_end) of each of so many images, and output channels [out_begin, out_end).
struct WeightGradBlock {
  int64_t images, row_begin, row_end, out_begin, out_end;
};

// One way to sum what every weight of a convolution of codes multiplied: over images and output positions, gradient
// times code. Shapes are those of the forward convolution; of `mul`, `add`, bounds and pad codes nothing is read,
// padding is 0, and there is one group. Sums are kept in the kernel's own order, those of each output channel apart
// from all others; what `add` sums up in one call is added to them. The processor may take denormal gradients, sums and
// products for 0.
struct FloatWeightGradKernel {
  const char* name;
  int64_t outs;                       // out_begin of a block is a multiple of this
  int64_t (*sums)(const ConvShape&);  // how many
  // Of `add`, aligned to 64, for so many images and output rows of each.
  int64_t (*scratch_bytes)(const ConvShape&, int64_t images, int64_t rows);
  // x: (images, in_h, in_w, in_c) codes of input_dtype; g: (images, out_h, out_w, out_c) bfloat16; sums: aligned to 64.
  // fresh: sums of the block's output channels are not set yet, and count as 0.
  void (*add)(const ConvShape&, const void* x, const uint16_t* g, const WeightGradBlock&, void* scratch, float* sums,
              bool fresh);
  // Adds the sums of a block of weights to rows, as WeightGradKernel::read.
  void (*read)(const ConvShape&, const float* sums, const WeightBlock&, float* rows, int64_t pitch, bool fresh);
  // The same for whole rows of some output channels, (taps, in_c) each. Null if that is no faster than turning rows.
  void (*read_last)(const ConvShape&, const float* sums, int64_t out_begin, int64_t out_end, float* rows, bool fresh);
};

struct FloatProducts {
  const char* name;
  // largest: no weight is farther from 0.
  const InputGradientKernel* (*input_gradient)(const ConvShape&, int64_t largest);
  const FloatWeightGradKernel* (*weight_grad)(const ConvShape&);
};

}  // namespace bitstrata
