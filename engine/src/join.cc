#include <algorithm>
#include <mutex>
#include <vector>

#include "bitstrata/quantize.h"
#include "quantize_rows.h"

namespace bitstrata {
namespace {

// Pixels first..first + count - 1 of the map, (count, channels).
void spread(const StridedTensor& x, int64_t channels, int64_t first, int64_t count, float* out) {
  const size_t size = static_cast<size_t>(channels);
  std::fill(out, out + count * channels, 0.0f);
  const int64_t pixels = x.in_h * x.in_w;
  for (int64_t row = first / x.in_w; row * x.in_w < first + count; ++row) {  // of all images
    const int64_t y = row * x.in_w % pixels / x.in_w;
    if (y % x.stride_h != 0) continue;
    const int64_t image = row * x.in_w / pixels, from = (image * x.out_h() + y / x.stride_h) * x.out_w();
    for (int64_t u = 0; u < x.out_w(); ++u) {
      const int64_t pixel = row * x.in_w + u * x.stride_w - first;
      if (pixel < 0 || pixel >= count) continue;
      const int32_t* sums = x.rows.i32 + (from + u) * channels;
      float* to = out + pixel * channels;
      for (size_t c = 0; c < size; ++c) to[c] = static_cast<float>(sums[c]) * x.rows.scale[c];
    }
  }
}

// At most one of add and strided is not null.
float join_any(const Rows& r, const RealTensor& x, const float* add, const StridedTensor* strided, const uint8_t* bits,
               float* out) {
  const Training& k = *r.kernels.training;
  const int64_t period = period_of(r.channels);
  std::vector<float> scale;
  float largest = 0;
  if (x.scale != nullptr) scale = repeated(std::vector<float>(x.scale, x.scale + r.channels), period);
  const float* by = scale.empty() ? nullptr : scale.data();
  std::mutex mutex;
  for_blocks(r, [&](int64_t begin, int64_t all) {
    const int64_t block = strided ? std::min(all, block_rows(r.channels) * r.channels) : all;
    std::vector<float> part(static_cast<size_t>(period), 0.0f), others(static_cast<size_t>(strided ? block : 0));
    for (int64_t at = begin; at < begin + all; at += block) {
      const int64_t count = std::min(block, begin + all - at);
      if (strided) spread(*strided, r.channels, at / r.channels, count / r.channels, others.data());
      const float* other = strided ? others.data() : add ? add + at : nullptr;
      const uint8_t* keep = bits ? bits + at / 8 : nullptr;
      if (x.i32 != nullptr)
        k.join_i32(x.i32 + at, count, period, by, other, keep, out + at, part.data());
      else
        k.join_f32(x.f32 + at, count, period, by, other, keep, out + at, part.data());
    }
    std::lock_guard<std::mutex> lock(mutex);
    for (float range : part) largest = larger(range, largest);
  });
  return largest;
}

}  // namespace

float join(const Rows& r, const RealTensor& x, const float* add, const uint8_t* bits, float* out) {
  return join_any(r, x, add, nullptr, bits, out);
}

float join(const Rows& r, const RealTensor& x, const StridedTensor& add, const uint8_t* bits, float* out) {
  return join_any(r, x, nullptr, &add, bits, out);
}

}  // namespace bitstrata
