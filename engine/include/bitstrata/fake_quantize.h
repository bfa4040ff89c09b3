// Fake quantization of whole tensors and its gradients: the formulas of src/bitstrata/functional, in float32.
#pragma once

#include <cstdint>

#include "bitstrata/kernels.h"

namespace bitstrata {

// Which grid, and where gradients pass.
struct FakeRule {
  FakeGrid grid = FakeGrid::kUniform;
  int lo = 0, hi = 1;       // codes, at the source width
  int shift = 0;            // source width less the width, for kNested and kVertical
  float add = 0;            // value = scale (code + add), for kVertical
  float slope_add = 0;      // the same in the gradient of the step
  bool open_range = false;  // values on a bound are outside
  bool everywhere = false;  // gradients pass outside too
  bool calibrated = false;  // elements inside count in the gradient of a clipping level
  float factor = 1;         // of x for kScaled; the width of the sigmoids for kSigmoids
  float rounded = 1;        // for kScaled: x factor rounded is what is rounded
  float gain = 1;           // of the gradient of x, for kScaled and kSigmoids
};

// Elements in the order of memory, as (outer, channels, inner). step and extra: (channels,) each; what they mean:
//   kUniform, kSymmetric, kVertical  step s
//   kAffine                          step s, extra the offset beta
//   kNested                          source step D, extra the ratio r
//   kUnit, kCentred                  clipping level alpha; |alpha| counts
//   kTanh, kTanhFloor                the divisor of x, positive
//   kScaled, kSigmoids               nothing
// Steps, ratios and levels below 1e-8 count as 1e-8.
struct FakeTensor {
  int64_t outer, channels, inner;
  bool bf16;    // as its bits, else float32
  bool narrow;  // x / step is rounded to bfloat16
  const float *step, *extra;
  int64_t elements() const { return outer * channels * inner; }
};

void fake_quantize(const Kernels&, int threads, const FakeRule&, const FakeTensor&, const void* x, void* out);

// Gradients for g of the result. dx (like x), dstep and dextra (channels,) are null where they are not wanted; the last
// two are multiplied by `factor`.
void fake_quantize_gradient(const Kernels&, int threads, const FakeRule&, const FakeTensor&, double factor,
                            const void* g, const void* x, void* dx, float* dstep, float* dextra);

}  // namespace bitstrata
