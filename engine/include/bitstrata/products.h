// The three integer products of a training step, of convolutions and (as 1x1 convolutions) of matrices.
//
// Codes are NHWC, u8 or s8; weights s8 in the order (out_c, in_c / groups, kernel_h, kernel_w). Padding is code 0.
// A linear layer is a 1x1 convolution of a batch of 1x1 maps. Sums are int32, modulo 2^32: the caller bounds them.
// All functions throw std::invalid_argument on a shape that does not fit, before they write anything.
#pragma once

#include <cstdint>
#include <string>

#include "bitstrata/kernels.h"

namespace bitstrata {

struct ProductShape {
  int64_t batch;
  int64_t in_h, in_w, in_c;
  int64_t out_h, out_w, out_c;
  int64_t kernel_h, kernel_w;
  int64_t stride_h = 1, stride_w = 1;
  int64_t dilation_h = 1, dilation_w = 1;
  int64_t pad_top = 0, pad_left = 0, pad_bottom = 0, pad_right = 0;
  int64_t groups = 1;

  int64_t group_in() const { return in_c / groups; }
  int64_t group_out() const { return out_c / groups; }
};

// Codes, and what is known of them. shift, if any: (channels,), in 0..23; a code counts as code << shift of its
// channel. The shifts go into the codes and the weights as far as these remain 8-bit; what is left (8-bit codes in
// several groups) is done by one convolution for each shift, on its channels.
struct ProductCodes {
  const void* data;
  DType dtype;     // u8 or s8
  int32_t lo, hi;  // every code lies within
  const uint8_t* shift = nullptr;
};

// Reads sums while they are in the cache. `count` sums, whole pixels, from element `at` of the result on, by one of
// several threads, whose number is `thread`.
class SumReader {
 public:
  virtual ~SumReader() = default;
  virtual void begin(int threads) = 0;  // how many there are at most; before all else
  virtual void read(int thread, const int32_t* sums, int64_t at, int64_t count) = 0;
};

// Where the sums of conv_forward and conv_input_grad go; each may be null.
struct ProductResult {
  int32_t* acc = nullptr;                // NHWC
  int32_t *lo = nullptr, *hi = nullptr;  // (channels,) least and largest sum of each channel, over the whole batch
  float* values = nullptr;               // NHWC, float(sum) * factor of its channel (+ bias of its channel)
  const float* factor = nullptr;         // (channels,), for values
  const float* bias = nullptr;           // (channels,), for values; null for none
  SumReader* reader = nullptr;
  int64_t first = 0;  // element of the whole result at which the above begin, for the reader
};

// y = conv(x, w): sums over in_c / groups, kernel_h, kernel_w.
void conv_forward(const Kernels&, int threads, const ProductShape&, const ProductCodes& x, const int8_t* w,
                  const ProductResult& y);

// The gradient of that convolution's input from the gradient g of its output.
void conv_input_grad(const Kernels&, int threads, const ProductShape&, const ProductCodes& g, const int8_t* w,
                     const ProductResult& x);

// The gradient of its weights: sums over the batch, out_h and out_w, which do not wrap. Codes of g are s8; shifts are
// not applied, they factor out. Either result may be null: gw: (out_c, in_c / groups, kernel_h, kernel_w); values, in
// the same order: float(sum * (out_factor[o] * in_factor[i])), in double until the last conversion, with
// in_factor: (in_c,).
struct WeightGradResult {
  int64_t* gw = nullptr;
  float* values = nullptr;
  const double *out_factor = nullptr, *in_factor = nullptr;
};
void conv_weight_grad(const Kernels&, int threads, const ProductShape&, const ProductCodes& g, const ProductCodes& x,
                      const WeightGradResult&);

// Throws std::invalid_argument, naming the operation, on a shape that is none or does not agree with itself.
void check_product(const std::string& op, const ProductShape&);

// Names of the kernels that conv_forward and conv_weight_grad take for codes within lo..hi and weights, or gradients,
// within w_lo..w_hi.
const char* forward_kernel(const Kernels&, const ProductShape&, DType, int32_t lo, int32_t hi, int32_t w_lo,
                           int32_t w_hi);
const char* weight_grad_kernel(const Kernels&, const ProductShape&, DType, int32_t lo, int32_t hi, int32_t w_lo,
                               int32_t w_hi);

}  // namespace bitstrata
