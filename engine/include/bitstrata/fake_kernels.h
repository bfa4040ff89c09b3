// Kernels of fake quantization in training: a tensor onto a grid, and its gradients, in one pass over memory each.
//
// Arithmetic is float32, operation by operation as written here, bfloat16 being widened on reading and rounded once, to
// nearest even, on writing. round(x) is to nearest, ties to even. NaN passes through. So results, sums included, depend
// neither on the instruction set nor on the number of threads.
#pragma once

#include <cstdint>

namespace bitstrata {

// u = (x - origin) / divisor (for bfloat16 with `narrow`, rounded to bfloat16; origin counts for kAffine alone); then
//   kUniform, kAffine  code = round(clamp(u, lo, hi))                             level = code
//   kSymmetric         code = floor(clamp(u, lo, hi)), whole u that would get an odd code - lo one less, at most hi - 1
//                                                                                 level = code + 1/2
//   kNested            code = floor(clamp(floor(u), lo, hi) / power)              level = (code + 1/2) power
//   kVertical          code = floor(round(clamp(u, lo, hi)) / power)              level = (code + slope_add) power
//   kUnit              code = round(clamp(u, 0, 1) hi)                            level = code unit
//   kCentred, kTanh    code = round((clamp(u, -1, 1) + 1) / 2 (hi - lo)) + lo     level = (code + 1/2) unit
//   kTanhFloor         code = clamp(floor(-lo u), lo, hi)
//   kScaled            code = clamp(power round(clamp(unit u, lo, hi)), lo, hi), with u = x divisor
//   kSigmoids          as kUnit
// and value = (code + add) scale, add being 0 for kUniform, kUnit, kScaled and kSigmoids, 1/2 for kSymmetric,
// kNested, kCentred and kTanh. For kTanh and kTanhFloor x is a hyperbolic tangent, and the gradient that of what it was
// taken of.
enum class FakeGrid {
  kUniform,
  kAffine,
  kSymmetric,
  kNested,
  kVertical,
  kUnit,
  kCentred,
  kTanh,
  kTanhFloor,
  kScaled,
  kSigmoids
};
constexpr int kFakeGrids = 11;

struct FakeArgs {
  float lo, hi;
  float power;  // 2^(width of the source code - width of the code)
  float unit;
  float slope_add;
  bool narrow;
  bool inside;  // the elements inside count in the sum of `slopes`
  float divisor, origin, scale, add;
  float gain;         // of the gradient of x
  float first, last;  // inside: first <= u <= last; for kUnit and kCentred, first <= x <= last
  // For kSigmoids, of `count` sigmoids of the width `alpha` at the thresholds b: e^((b - 1/2) / alpha).
  const float* ratios;
  int64_t count;
  float alpha, reach;  // (x - 1/2) / alpha is cut to +-reach, where slopes are next to nothing
};

// Sums over elements, added to what is found. slopes: of g (level - u) inside and g level outside, of g u for kTanh and
// kTanhFloor, none for kScaled and kSigmoids; second: of g outside for kAffine, of g level for kNested, else none.
struct FakeSums {
  double slopes, second;
};

// bfloat16 as its bits.
struct FakeKernels {
  using ForwardF32 = void (*)(const FakeArgs&, const float* x, int64_t count, float* out);
  using ForwardBf16 = void (*)(const FakeArgs&, const uint16_t* x, int64_t count, uint16_t* out);
  // out = g gain inside, 0 outside; (g / divisor) (1 - x^2) for kTanh and kTanhFloor; for kSigmoids g gain times the
  // sum of e / (1 + e)^2 with e = ratio e^((1/2 - x) / alpha). out or sums are null where they are not wanted.
  using BackwardF32 = void (*)(const FakeArgs&, const float* g, const float* x, int64_t count, float* out, FakeSums*);
  using BackwardBf16 = void (*)(const FakeArgs&, const uint16_t* g, const uint16_t* x, int64_t count, uint16_t* out,
                                FakeSums*);
  ForwardF32 forward_f32[kFakeGrids];
  ForwardBf16 forward_bf16[kFakeGrids];
  BackwardF32 backward_f32[kFakeGrids];
  BackwardBf16 backward_bf16[kFakeGrids];
};

}  // namespace bitstrata
