// Kernels of quantization-aware training: what lies between the integer sums of one convolution and the codes of the
// next, forward and backward.
//
// A tensor is rows of channels as in bitstrata/training.h; what belongs to a channel is repeated to `period` elements.
// An element x is an integer sum or a float and stands for u = max(x * scale[c] + offset[c], floor), computed in
// float32 with a rounding after each operation. Floats are rounded to bf16 to nearest, ties to even.
#pragma once

#include <cstdint>

namespace bitstrata {

struct PoolMap;

// What elements are; floats come last, and tables of floats alone have an entry for each of those.
enum class QatType { i16, i32, f32, bf16 };
constexpr int kQatTypes = 4, kQatReals = 2;

constexpr bool is_real(QatType t) { return t == QatType::f32 || t == QatType::bf16; }
constexpr int real_index(QatType t) { return static_cast<int>(t) - static_cast<int>(QatType::f32); }

struct QatLine {
  const float *scale, *offset;  // (period,) each
  float floor;                  // 0 behind a rectifier, else -infinity
};

// code = clamp(round(u), lo, hi)
struct QatLevels {
  float lo, hi;
};

// How a gradient g of quantized values goes back: where first <= u <= last it passes; `add`, if any, is added; where
// x * scale[c] + offset[c] < keep all is 0 (a rectifier). The gradient of the step is g * (code - u) * inner where g
// passes and g * code elsewhere.
struct QatPass {
  QatLine line;
  bool quantized;  // else all of g passes, and nothing below is read
  float first, last;
  QatLevels levels;
  float inner;
  float keep;
};

struct QatGradient {
  const void *g, *add;  // floats of one type; add: null for none
};

// Adds, for each channel, the sums of what passed, of that times (x - center), and of the step's gradient.
struct QatSums {
  const float* center;          // (period,)
  double *sum, *moment, *step;  // (period,) each
};

// out = passed * factor[c] + ((x - center[c]) * slope[c] + constant[c])
struct QatBackward {
  const float *factor, *constant, *slope, *center;  // (period,) each
};

struct QatKernels {
  // For each channel the sum of x, of its squares, the least and the most, (channels,) each, added to what is found;
  // x itself in 16 bits, modulo 2^16, if `narrow` is not null. count is at most 2^16 elements.
  void (*sums)(const int32_t* x, int64_t count, int64_t channels, int16_t* narrow, int64_t* sum, int64_t* square,
               int32_t* lo, int32_t* hi);
  // Codes, as bytes and as floats; NaN becomes some code.
  void (*codes[kQatTypes])(const void* x, int64_t count, int64_t period, const QatLine&, QatLevels, uint8_t* out);
  void (*code_values[kQatTypes][kQatReals])(const void* x, int64_t count, int64_t period, const QatLine&, QatLevels,
                                            void* out);
  // max(x * scale[c] + offset[c] + add, floor); add: null for none.
  void (*values[kQatTypes][kQatReals])(const void* x, int64_t count, int64_t period, const QatLine&, const void* add,
                                       void* out);
  void (*gradient_sums[kQatTypes][kQatReals])(const void* x, int64_t count, int64_t period, const QatPass&,
                                              const QatGradient&, const QatSums&);
  void (*gradient[kQatTypes][kQatReals])(const void* x, int64_t count, int64_t period, const QatPass&,
                                         const QatGradient&, const QatBackward&, void* out);
  // What passed; step: (period,), as in QatSums.
  void (*pass[kQatTypes][kQatReals])(const void* x, int64_t count, int64_t period, const QatPass&, const QatGradient&,
                                     double* step, void* out);
  // The largest u of each window and its place, the first of equals; the gradient of the pooled map, summed in float32
  // over windows in the order of their pixels.
  void (*max_pool[kQatTypes][kQatReals])(const void* x, const PoolMap&, const QatLine&, void* out, uint8_t* places);
  void (*max_pool_gradient[kQatReals])(const void* g, const uint8_t* places, const PoolMap&, void* out);
};

}  // namespace bitstrata
