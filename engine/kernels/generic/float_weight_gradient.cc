// The portable weight gradient in floats: short loops that the others are tested against. Sums are in the order of the
// weights.
#include <cstring>

#include "bitstrata/kernels.h"

namespace bitstrata {
namespace {

float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

int64_t sums(const ConvShape& s) { return s.out_c * s.in_c * s.kernel_h * s.kernel_w; }
int64_t scratch_bytes(const ConvShape&, int64_t, int64_t) { return 0; }

// The code at a position of an image's map, 0 outside of it.
double code(const ConvShape& s, const uint8_t* x, int64_t row, int64_t column, int64_t channel) {
  if (row < 0 || column < 0 || row >= s.in_h || column >= s.in_w) return 0;
  const uint8_t byte = x[(row * s.in_w + column) * s.in_c + channel];
  return s.input_dtype == DType::u8 ? byte : static_cast<int8_t>(byte);
}

// Of the weight (o, i, ky, kx), over the block's positions.
float sum(const ConvShape& s, const uint8_t* x, const uint16_t* g, const FloatWeightGradBlock& b, int64_t o, int64_t i,
          int64_t ky, int64_t kx) {
  double all = 0;
  for (int64_t image = 0; image < b.images; ++image, x += s.in_h * s.in_w * s.in_c)
    for (int64_t y = b.row_begin; y < b.row_end; ++y)
      for (int64_t u = 0; u < s.out_w; ++u)
        all += static_cast<double>(from_bf16(g[((image * s.out_h + y) * s.out_w + u) * s.out_c + o])) *
               code(s, x, y * s.stride_h - s.pad_top + ky * s.dilation_h,
                    u * s.stride_w - s.pad_left + kx * s.dilation_w, i);
  return static_cast<float>(all);
}

void add(const ConvShape& s, const void* x, const uint16_t* g, const FloatWeightGradBlock& b, void*, float* sums,
         bool fresh) {
  const int64_t taps = s.kernel_h * s.kernel_w;
  for (int64_t o = b.out_begin; o < b.out_end; ++o)
    for (int64_t i = 0; i < s.in_c; ++i)
      for (int64_t tap = 0; tap < taps; ++tap) {
        const float found = sum(s, static_cast<const uint8_t*>(x), g, b, o, i, tap / s.kernel_w, tap % s.kernel_w);
        float& to = sums[(o * s.in_c + i) * taps + tap];
        to = fresh ? found : to + found;
      }
}

void read(const ConvShape& s, const float* sums, const WeightBlock& b, float* rows, int64_t pitch, bool fresh) {
  const int64_t taps = s.kernel_h * s.kernel_w, count = (b.in_end - b.in_begin) * taps;
  for (int64_t o = b.out_begin; o < b.out_end; ++o, rows += pitch) {
    const float* from = sums + (o * s.in_c + b.in_begin) * taps;
    for (int64_t n = 0; n < count; ++n) rows[n] = fresh ? from[n] : rows[n] + from[n];
  }
}

}  // namespace

extern const FloatWeightGradKernel kGenericFloatWeightGrad;
const FloatWeightGradKernel kGenericFloatWeightGrad = {"generic", 1, sums, scratch_bytes, add, read};

}  // namespace bitstrata
