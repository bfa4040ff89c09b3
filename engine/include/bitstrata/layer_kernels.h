// Kernels of the quantized layer normalization. A tensor is rows of `features` neighbours; a kernel is given whole
// rows, or, where it says `count`, any elements. What belongs to rows or features comes as arrays of so many elements.
//
// Floats as in bitstrata/training.h: float32, operation by operation as written, round(x) to nearest, ties to even.
#pragma once

#include <cstdint>

namespace bitstrata {

struct Noise;

// Of the codes of each row: their sum and its squares' (null: not wanted), the least and the most. (rows,) each.
struct LayerSums {
  int64_t *sum, *squares;
  int8_t *least, *most;
};

// Codes up to below[r] are under the row's mean, those beyond up_to[r] over it.
struct LayerSides {
  const int8_t *below, *up_to;  // (rows,) each
};

// h = round((x * step - mean[r]) * gain[r]); y = h * scale[f] + offset[f].
struct LayerResult {
  float step;
  const float *mean, *gain;     // (rows,) each
  const float *scale, *offset;  // (features,) each
};

// Of the gradient's codes g, with p = g * weight[f]: for each row, sums of p, of p * h, and of h or, if `signs`, of its
// signs; added to what is found, for each feature, sums of g and of g * h.
struct LayerGradientSums {
  const int8_t* weight;  // (features,)
  bool signs;
  int64_t *p, *ph, *h;              // (rows,) each
  int64_t *feature_g, *feature_gh;  // (features,) each
};

// l1: dx = coefficient[r] * p - constant[sign(h) + 1][r];  l2: dx = (coefficient[r] * p - constant[1][r]) - h *
// slope[r].
struct LayerGradient {
  const float* weight;                             // codes, (features,)
  const float *coefficient, *constant[3], *slope;  // (rows,) each; null where not read
};

struct LayerKernels {
  // max |x|; NaN is above all else.
  float (*range)(const float* x, int64_t count);
  // code = clamp(R(x * inverse), -bound, bound); see Noise; null: to nearest.
  void (*codes)(const float* x, int64_t count, float inverse, float bound, const Noise*, int8_t* out);
  void (*sums)(const int8_t* x, int64_t rows, int64_t features, const LayerSums&);
  // For each row, numbers of codes below and above its mean, and the sum of those above.
  void (*sides)(const int8_t* x, int64_t rows, int64_t features, const LayerSides&, int64_t* below, int64_t* above,
                int64_t* sum_above);
  // h in the place of x, y to `out`.
  void (*result)(int8_t* x, int64_t rows, int64_t features, const LayerResult&, float* out);
  void (*gradient_sums)(const int8_t* g, const int8_t* h, int64_t rows, int64_t features, const LayerGradientSums&);
  void (*l1_gradient)(const int8_t* g, const int8_t* h, int64_t rows, int64_t features, const LayerGradient&,
                      float* out);
  void (*l2_gradient)(const int8_t* g, const int8_t* h, int64_t rows, int64_t features, const LayerGradient&,
                      float* out);
};

}  // namespace bitstrata
