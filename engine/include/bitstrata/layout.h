// Moving images from planes (channels, pixels) to neighbouring channels (pixels, channels).
#pragma once

#include <cstdint>

namespace bitstrata {

// out[p * channels + c] = planes[c * pixels + p]. The two must not overlap.
void channels_last(const uint8_t* planes, int64_t channels, int64_t pixels, uint8_t* out);

}  // namespace bitstrata
