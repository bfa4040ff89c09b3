#include "bitstrata/layout.h"

#include <algorithm>
#include <cstring>

namespace bitstrata {
namespace {

constexpr int64_t kBlock = 64;  // pixels moved together, so that what is written stays in the cache

// The usual image: one pass, three streams in and one out.
void three(const uint8_t* x, int64_t pixels, uint8_t* out) {
  const uint8_t *r = x, *g = x + pixels, *b = x + 2 * pixels;
  for (int64_t p = 0; p < pixels; ++p, out += 3) out[0] = r[p], out[1] = g[p], out[2] = b[p];
}

}  // namespace

void channels_last(const uint8_t* planes, int64_t channels, int64_t pixels, uint8_t* out) {
  if (channels == 1) {
    std::memcpy(out, planes, static_cast<size_t>(pixels));
    return;
  }
  if (channels == 3) return three(planes, pixels, out);
  for (int64_t begin = 0; begin < pixels; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, pixels);
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t p = begin; p < end; ++p) out[p * channels + c] = planes[c * pixels + p];
  }
}

}  // namespace bitstrata
