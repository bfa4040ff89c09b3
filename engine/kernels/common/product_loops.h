// The loops around integer products, for the compiler to vectorize. See pointwise.h for the unnamed namespace.
#pragma once

#include <cstdint>
#include <cstring>

#include "bitstrata/kernels.h"

namespace bitstrata {
namespace {

void multiply_codes(const uint8_t* x, const uint8_t* factor, uint8_t* out, int64_t count, int64_t period) {
  for (int64_t first = 0; first < count; first += period) {
    const int64_t some = count - first < period ? count - first : period;
    for (int64_t i = 0; i < some; ++i) out[first + i] = static_cast<uint8_t>(x[first + i] * factor[i]);
  }
}

inline int32_t least(int32_t a, int32_t b) { return b < a ? b : a; }
inline int32_t most(int32_t a, int32_t b) { return a < b ? b : a; }

constexpr int64_t kBoundsTogether = 16;     // channels whose bounds stay in registers
constexpr int64_t kBoundsInRegisters = 64;  // with more channels, pixels are too far apart for that

// Of kBoundsTogether channels. A vector of the compiler's, because it would keep an array in memory.
inline void bounds_of_some(const int32_t* x, int64_t pixels, int64_t pitch, int32_t* lo, int32_t* hi) {
  typedef int32_t Some __attribute__((vector_size(kBoundsTogether * 4)));
  Some low, high, v;
  std::memcpy(&low, lo, sizeof(low));
  std::memcpy(&high, hi, sizeof(high));
  for (int64_t p = 0; p < pixels; ++p, x += pitch) {
    std::memcpy(&v, x, sizeof(v));
    low = v < low ? v : low;
    high = v > high ? v : high;
  }
  std::memcpy(lo, &low, sizeof(low));
  std::memcpy(hi, &high, sizeof(high));
}

void bounds(const int32_t* x, int64_t pixels, int64_t channels, int32_t* lo, int32_t* hi) {
  int64_t first = 0;
  if (channels <= kBoundsInRegisters)
    for (; first + kBoundsTogether <= channels; first += kBoundsTogether)
      bounds_of_some(x + first, pixels, channels, lo + first, hi + first);
  if (first == channels) return;
  int64_t p = 0;
  for (; p + 4 <= pixels; p += 4) {
    const int32_t* a = x + p * channels;
    const int32_t *b = a + channels, *c = b + channels, *d = c + channels;
    for (int64_t i = first; i < channels; ++i) {
      lo[i] = least(lo[i], least(least(a[i], b[i]), least(c[i], d[i])));
      hi[i] = most(hi[i], most(most(a[i], b[i]), most(c[i], d[i])));
    }
  }
  for (; p < pixels; ++p)
    for (int64_t i = first; i < channels; ++i) {
      lo[i] = least(lo[i], x[p * channels + i]);
      hi[i] = most(hi[i], x[p * channels + i]);
    }
}

void shift_add(int32_t* x, const int32_t* part, int64_t count, int shift) {
  for (int64_t i = 0; i < count; ++i)
    x[i] = static_cast<int32_t>((static_cast<uint32_t>(x[i]) << shift) + static_cast<uint32_t>(part[i]));
}

void scale(const int32_t* x, const float* factor, const float* bias, float* out, int64_t pixels, int64_t channels) {
  for (int64_t p = 0; p < pixels; ++p, x += channels, out += channels)
    if (bias == nullptr)
      for (int64_t c = 0; c < channels; ++c) out[c] = static_cast<float>(x[c]) * factor[c];
    else
      for (int64_t c = 0; c < channels; ++c) out[c] = static_cast<float>(x[c]) * factor[c] + bias[c];
}

template <typename Sum>
void scale_sums(const Sum* x, double outer, const double* inner, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(static_cast<double>(x[i]) * (outer * inner[i]));
}

constexpr ProductKernels product_kernels(const WeightGradKernel* (*weight_grad)(const ConvShape&)) {
  return {weight_grad, multiply_codes, bounds, shift_add, scale, scale_sums<int64_t>, scale_sums<int32_t>};
}

}  // namespace
}  // namespace bitstrata
