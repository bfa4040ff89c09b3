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

// Calls body(index of an input pixel's first channel, of the output pixel's, position in the window).
template <typename Body>
inline void each_window(const PoolMap& s, const Body& body) {
  for (int64_t y = 0; y < s.out_h; ++y)
    for (int64_t x = 0; x < s.out_w; ++x)
      each_position(s, y, x, [&](int64_t pixel, int32_t position) {
        body(pixel * s.channels, (y * s.out_w + x) * s.channels, static_cast<uint8_t>(position));
      });
}

// Code i + k * sign_bytes has bits 2k and 2k + 1 of byte i, so that neighbours stay neighbours.
inline void keep_maxima(const int8_t* h, const uint8_t* places, const PoolMap& s, int8_t* maxima, uint8_t* signs) {
  each_window(s, [=](int64_t in, int64_t out, uint8_t position) {
    BITSTRATA_INDEPENDENT
    for (int64_t c = 0; c < s.channels; ++c) {
      const int8_t here = h[in + c], before = maxima[out + c];  // read whichever is kept: vectors can
      maxima[out + c] = places[out + c] == position ? here : before;
    }
  });
  const auto sign = [](int8_t v) { return static_cast<uint8_t>((v > 0) + 2 * (v < 0)); };
  const int64_t bytes = s.sign_bytes();
  for (int64_t k = 0; k < 4; ++k) {
    const int8_t* from = h + k * bytes;
    const int64_t count = least(bytes, s.in_size() - k * bytes);
    const auto factor = static_cast<uint8_t>(1 << 2 * k);
    BITSTRATA_INDEPENDENT
    for (int64_t i = 0; i < count; ++i)
      signs[i] = static_cast<uint8_t>((k == 0 ? 0 : signs[i]) + sign(from[i]) * factor);
  }
}

inline void put_maxima(const int8_t* maxima, const uint8_t* signs, const uint8_t* places, const PoolMap& s, int8_t* h) {
  const int64_t bytes = s.sign_bytes();
  for (int64_t k = 0; k < 4; ++k) {
    int8_t* to = h + k * bytes;
    const int64_t count = least(bytes, s.in_size() - k * bytes);
    const auto above = static_cast<uint8_t>(1 << 2 * k), below = static_cast<uint8_t>(2 << 2 * k);
    BITSTRATA_INDEPENDENT
    for (int64_t i = 0; i < count; ++i)
      to[i] = static_cast<int8_t>(((signs[i] & above) != 0) - ((signs[i] & below) != 0));
  }
  each_window(s, [=](int64_t in, int64_t out, uint8_t position) {
    BITSTRATA_INDEPENDENT
    for (int64_t c = 0; c < s.channels; ++c) {
      const int8_t maximum = maxima[out + c], before = h[in + c];
      h[in + c] = places[out + c] == position ? maximum : before;
    }
  });
}

}  // namespace
}  // namespace bitstrata
