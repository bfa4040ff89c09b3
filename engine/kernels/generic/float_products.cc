// The portable products of floats: short loops that the others are tested against.
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

// To nearest, ties to even; NaN stays NaN.
uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

int64_t weights(const ConvShape& s) { return s.out_c * s.in_c * s.kernel_h * s.kernel_w; }

int64_t packed_bytes(const ConvShape& s) { return weights(s) * 4; }
int64_t pack_parts(const ConvShape&) { return 1; }
void pack(const ConvShape& s, const int8_t* high, const int8_t* low, void* packed, int64_t) {
  float* w = static_cast<float*>(packed);
  for (int64_t i = 0; i < weights(s); ++i) w[i] = static_cast<float>(low == nullptr ? high[i] : 2 * high[i] + low[i]);
}
int64_t scratch_bytes(const ConvShape&, int64_t) { return 0; }

// The output position whose window has tap `tap` at position `at` of the input, or -1.
int64_t reached(int64_t at, int64_t tap, int64_t stride, int64_t dilation, int64_t pad, int64_t count) {
  const int64_t from = at + pad - tap * dilation;
  return from >= 0 && from % stride == 0 && from / stride < count ? from / stride : -1;
}

float gradient(const ConvShape& s, const float* w, const uint16_t* g, int64_t y, int64_t x, int64_t c) {
  double sum = 0;
  for (int64_t ky = 0; ky < s.kernel_h; ++ky) {
    const int64_t v = reached(y, ky, s.stride_h, s.dilation_h, s.pad_top, s.out_h);
    if (v < 0) continue;
    for (int64_t kx = 0; kx < s.kernel_w; ++kx) {
      const int64_t u = reached(x, kx, s.stride_w, s.dilation_w, s.pad_left, s.out_w);
      if (u < 0) continue;
      for (int64_t o = 0; o < s.out_c; ++o)
        sum += static_cast<double>(from_bf16(g[(v * s.out_w + u) * s.out_c + o])) *
               static_cast<double>(w[((o * s.in_c + c) * s.kernel_h + ky) * s.kernel_w + kx]);
    }
  }
  return static_cast<float>(sum);
}

void run(const ConvShape& s, const void* packed, const uint16_t* g, void*, uint16_t* out, int64_t row_begin,
         int64_t row_end) {
  for (int64_t y = row_begin; y < row_end; ++y)
    for (int64_t x = 0; x < s.in_w; ++x)
      for (int64_t c = 0; c < s.in_c; ++c)
        out[(y * s.in_w + x) * s.in_c + c] = to_bf16(gradient(s, static_cast<const float*>(packed), g, y, x, c));
}

constexpr InputGradientKernel kInputGradient = {"generic", packed_bytes, pack_parts, pack, scratch_bytes, run};

// The weight gradient: sums are in the order of the weights.
int64_t block_bytes(const ConvShape&, int64_t, int64_t) { return 0; }

// The code at a position of an image's map, 0 outside of it.
double code(const ConvShape& s, const uint8_t* x, int64_t row, int64_t column, int64_t channel) {
  if (row < 0 || column < 0 || row >= s.in_h || column >= s.in_w) return 0;
  const uint8_t byte = x[(row * s.in_w + column) * s.in_c + channel];
  return s.input_dtype == DType::u8 ? byte : static_cast<int8_t>(byte);
}

// Of the weight (o, i, ky, kx), over the block's positions.
float sum(const ConvShape& s, const uint8_t* x, const uint16_t* g, const WeightGradBlock& b, int64_t o, int64_t i,
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

void add(const ConvShape& s, const void* x, const uint16_t* g, const WeightGradBlock& b, void*, float* sums,
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

constexpr FloatWeightGradKernel kWeightGrad = {"generic", 1, weights, block_bytes, add, read, nullptr};

}  // namespace

extern const FloatProducts kGenericFloatProducts;
const FloatProducts kGenericFloatProducts = {"generic", [](const ConvShape&, int64_t) { return &kInputGradient; },
                                             [](const ConvShape&) { return &kWeightGrad; }};

}  // namespace bitstrata
