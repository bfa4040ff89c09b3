// Quantization-aware training on integer sums: a convolution of codes is exact in integers, and what follows up to the
// next codes is one pass forward and two backward. Kernels and their arithmetic: qat_kernels.h.
//
// Nothing depends on the number of threads: sums of integers are exact, sums of floats are taken over blocks of rows
// whose size depends on the tensor alone, and added in their order.
#pragma once

#include <cstdint>
#include <vector>

#include "bitstrata/products.h"
#include "bitstrata/qat_kernels.h"
#include "bitstrata/quantize.h"

namespace bitstrata {

// A weight of integers: value = (high << 1) + low, or high alone, if low is null.
struct QatWeight {
  const int8_t *high, *low;
};

// Integers from a weight's values, which are integers times unit[o] but for rounding: as in QatWeight, (out, in, taps).
// values: in that order, or with `channels_last` (out, taps, in). False if a value is not finite, or an integer not in
// -256..255, or, without `low`, not in -128..127; then nothing written is of use.
bool qat_integers(int threads, const float* values, int64_t out, int64_t in, int64_t taps, bool channels_last,
                  const double* unit, int8_t* high, int8_t* low);

// Of the sums of each channel, (channels,) each.
struct QatMoments {
  std::vector<double> mean, variance;  // of the batch, biased; each is rounded once
  std::vector<int32_t> least, most;
};

// The sums of a convolution, in 16 or in 32 bits: one of both may be null. Returns false if some sum does not fit into
// the 16 bits; then `narrow` is of no use. moments: null for none. Sums must lie within 2^28, else
// std::invalid_argument is thrown, before anything is written.
bool qat_convolution(const Kernels&, int threads, const ProductShape&, const ProductCodes& x, const QatWeight&,
                     int16_t* narrow, int32_t* wide, QatMoments* moments);

// A tensor of elements of a type, and what they stand for; scale and offset are (channels,).
struct QatTensor {
  const void* data;
  QatType type;
  const float *scale, *offset;
  float floor;
};

void qat_codes(const Rows&, const QatTensor&, QatLevels, uint8_t* out);
void qat_code_values(const Rows&, const QatTensor&, QatLevels, QatType real, void* out);
// Their values (+ add, null for none).
void qat_values(const Rows&, const QatTensor&, QatType real, const void* add, void* out);

// Of QatPass, all but its line.
using QatRule = QatPass;

struct QatChannelSums {
  std::vector<double> sum, moment;  // (channels,) each
  double step;
};
QatChannelSums qat_gradient_sums(const Rows&, const QatTensor&, const QatRule&, QatType real, const QatGradient&,
                                 const float* center);
// factor, constant, slope, center of `line`: (channels,) each. out may be g or add.
void qat_gradient(const Rows&, const QatTensor&, const QatRule&, QatType real, const QatGradient&,
                  const QatBackward& line, void* out);
// Returns the step's gradient. out may be g or add.
double qat_pass(const Rows&, const QatTensor&, const QatRule&, QatType real, const QatGradient&, void* out);

void qat_max_pool(const Rows&, const QatTensor&, const PoolMap&, int64_t images, QatType real, void* out,
                  uint8_t* places);
void qat_max_pool_gradient(const Kernels&, int threads, const PoolMap&, int64_t images, QatType real,
                           const void* gradient, const uint8_t* places, void* out);

}  // namespace bitstrata
