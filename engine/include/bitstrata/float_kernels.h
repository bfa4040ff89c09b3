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

// One way to compute the gradient of a convolution's input from that of its output: out = transposed convolution of g
// with integer weights. Shapes are those of the forward convolution; of `mul`, `add`, bounds and input_dtype nothing is
// read, padding is 0, there is one group, and
// at most 128 taps.
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

struct FloatProducts {
  const char* name;
  const InputGradientKernel* (*input_gradient)(const ConvShape&);
};

}  // namespace bitstrata
