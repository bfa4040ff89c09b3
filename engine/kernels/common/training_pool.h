// Maximum pooling of a normalization's result, and its gradient; see bitstrata/training.h.
//
// Like everything in this folder this is compiled once for each instruction set, in an unnamed namespace.
#pragma once

#include <limits>

#include "training_loops.h"

namespace bitstrata {
namespace {

constexpr int64_t kPoolChannels = 64;  // at a time: their maxima stay in registers

// Calls body(input pixel, position in the window) for the positions of output pixel (y, x) that lie in the map.
template <typename Body>
inline void each_position(const PoolMap& s, int64_t y, int64_t x, const Body& body) {
  const int64_t top = y * s.stride_h - s.pad_h, left = x * s.stride_w - s.pad_w;
  for (int64_t ky = 0; ky < s.kernel_h; ++ky) {
    if (top + ky < 0 || top + ky >= s.in_h) continue;
    for (int64_t kx = 0; kx < s.kernel_w; ++kx)
      if (left + kx >= 0 && left + kx < s.in_w)
        body((top + ky) * s.in_w + left + kx, static_cast<int32_t>(ky * s.kernel_w + kx));
  }
}

inline void max_pool(const int8_t* h, const PoolMap& s, const AffineArgs& f, float* out, uint8_t* places, float* most) {
  for (int64_t y = 0; y < s.out_h; ++y)
    for (int64_t x = 0; x < s.out_w; ++x, out += s.channels, places += s.channels)
      for (int64_t c = 0; c < s.channels; c += kPoolChannels) {
        const int64_t n = least(kPoolChannels, s.channels - c);
        const float *scale = f.scale + c, *offset = f.offset + c, floor = f.floor;
        float best[kPoolChannels];
        int32_t place[kPoolChannels] = {};
        for (float& b : best) b = -std::numeric_limits<float>::infinity();
        each_position(s, y, x, [&](int64_t pixel, int32_t position) {
          const int8_t* from = h + pixel * s.channels + c;
          BITSTRATA_INDEPENDENT
          for (int64_t j = 0; j < n; ++j) {
            const float value = greater(static_cast<float>(from[j]) * scale[j] + offset[j], floor);
            place[j] = value > best[j] ? position : place[j];  // the first of equals
            best[j] = greater(value, best[j]);
          }
        });
        BITSTRATA_INDEPENDENT
        for (int64_t j = 0; j < n; ++j) {
          out[c + j] = best[j];
          places[c + j] = static_cast<uint8_t>(place[j]);
          most[c + j] = greater(magnitude(best[j]), most[c + j]);
        }
      }
}

inline void max_pool_gradient(const float* g, const uint8_t* places, const PoolMap& s, float* out) {
  std::memset(out, 0, static_cast<size_t>(s.in_h * s.in_w * s.channels) * sizeof(float));
  for (int64_t y = 0; y < s.out_h; ++y)
    for (int64_t x = 0; x < s.out_w; ++x, g += s.channels, places += s.channels)
      each_position(s, y, x, [&](int64_t pixel, int32_t position) {
        float* to = out + pixel * s.channels;
        BITSTRATA_INDEPENDENT
        for (int64_t c = 0; c < s.channels; ++c) to[c] += places[c] == position ? g[c] : 0.0f;
      });
}

}  // namespace
}  // namespace bitstrata
