#include "planes.h"

#include <array>
#include <cstring>

namespace bitstrata::artifact {

namespace {

// The eight digits of a byte as eight bytes, the highest first in memory.
using Digits = std::array<uint64_t, 256>;

Digits make_digits() {
  Digits table;
  for (int byte = 0; byte < 256; ++byte) {
    uint8_t digits[8];
    for (int i = 0; i < 8; ++i) digits[i] = static_cast<uint8_t>(byte >> (7 - i) & 1);
    std::memcpy(&table[byte], digits, 8);
  }
  return table;
}

// Eight codes at a time; what a shift moves across a byte's border lands in its lowest bit, which the mask clears.
uint64_t widened(uint64_t codes, uint64_t digits, int held) {
  constexpr uint64_t kAllButLowest = 0xfefefefefefefefeu;
  return held == 0 ? ~(digits * 255) : ((codes << 1) & kAllButLowest) | digits;
}

}  // namespace

void widen(const uint8_t* plane, int64_t weights, int held, int8_t* codes) {
  static const Digits kDigits = make_digits();
  for (int64_t i = 0; i < weights; i += 8) {
    const size_t count = static_cast<size_t>(weights - i < 8 ? weights - i : 8);
    uint64_t eight = 0;
    std::memcpy(&eight, codes + i, count);
    eight = widened(eight, kDigits[plane[i / 8]], held);
    std::memcpy(codes + i, &eight, count);
  }
}

bool padding_is_zero(const uint8_t* plane, int64_t weights) {
  const int unused = static_cast<int>((8 - weights % 8) % 8);
  return (plane[(weights - 1) / 8] & ((1 << unused) - 1)) == 0;
}

}  // namespace bitstrata::artifact
