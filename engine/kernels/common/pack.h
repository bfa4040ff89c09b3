// Codes of 2 to 8 bits as one stream of bits, low bits first: eight codes take `width` bytes.
//
// Like everything in this folder this is compiled once for each instruction set, in an unnamed namespace.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __BMI2__
#include <immintrin.h>
#endif

namespace bitstrata {
namespace {

constexpr uint64_t kEachByte = 0x0101010101010101;

// Of eight codes, a byte each, the low `width` bits side by side; mask: these bits in each byte.
inline uint64_t gather_bits(uint64_t codes, uint64_t mask, int width) {
#ifdef __BMI2__
  (void)width;
  return _pext_u64(codes, mask);
#else
  uint64_t out = 0;
  codes &= mask;
  for (int i = 0; i < 8; ++i) out |= (codes >> (8 * i) & 255) << (width * i);
  return out;
#endif
}

inline uint64_t spread_bits(uint64_t packed, uint64_t mask, int width) {
#ifdef __BMI2__
  (void)width;
  return _pdep_u64(packed, mask);
#else
  uint64_t out = 0;
  for (int i = 0; i < 8; ++i) out |= (packed >> (width * i) & (mask & 255)) << (8 * i);
  return out;
#endif
}

// Codes to (count * width + 7) / 8 bytes; unused bits are 0.
inline void pack(const uint8_t* codes, int64_t count, int width, uint8_t* out) {
  const uint64_t mask = kEachByte * ((1u << width) - 1);
  const int64_t size = (count * width + 7) / 8;
  for (int64_t i = 0, to = 0; i < count; i += 8, to += width) {
    const int64_t n = count - i < 8 ? count - i : 8;
    uint64_t eight = 0;
    std::memcpy(&eight, codes + i, static_cast<size_t>(n));
    const uint64_t packed = gather_bits(eight, mask, width);
    const int64_t room = size - to < 8 ? size - to : 8;  // what spills over, the next eight codes overwrite
    std::memcpy(out + to, &packed, static_cast<size_t>(room));
  }
}

// The inverse; signed codes are extended to bytes.
inline void unpack(const uint8_t* packed, int64_t count, int width, bool is_signed, uint8_t* out) {
  constexpr int64_t kChunk = 4096;
  const uint64_t mask = kEachByte * ((1u << width) - 1);
  const int64_t size = (count * width + 7) / 8;
  const uint8_t half = static_cast<uint8_t>(1u << (width - 1));
  for (int64_t first = 0; first < count; first += kChunk) {
    const int64_t last = count < first + kChunk ? count : first + kChunk;
    for (int64_t i = first, from = first / 8 * width; i < last; i += 8, from += width) {
      uint64_t eight = 0;
      std::memcpy(&eight, packed + from, static_cast<size_t>(size - from < 8 ? size - from : 8));
      const uint64_t codes = spread_bits(eight, mask, width);
      std::memcpy(out + i, &codes, static_cast<size_t>(last - i < 8 ? last - i : 8));
    }
    if (is_signed)
      for (int64_t i = first; i < last; ++i) out[i] = static_cast<uint8_t>((out[i] ^ half) - half);
  }
}

}  // namespace
}  // namespace bitstrata
