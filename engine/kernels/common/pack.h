// Codes of 2 to 8 bits as one stream of bits, low bits first: eight codes take `width` bytes.
//
// Like everything in this folder this is compiled once for each instruction set, in an unnamed namespace.
#pragma once

#include <cstdint>
#include <cstring>

#include "unroll.h"

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

// Two codes of 4 bits a byte, in loops that compilers vectorize.
inline void pack_pairs(const uint8_t* codes, int64_t pairs, uint8_t* out) {
  BITSTRATA_INDEPENDENT
  for (int64_t i = 0; i < pairs; ++i) {
    uint16_t two;
    std::memcpy(&two, codes + 2 * i, sizeof two);
    out[i] = static_cast<uint8_t>((two & 15) | (two >> 4 & 0xf0));
  }
}

inline void unpack_pairs(const uint8_t* packed, int64_t pairs, bool is_signed, uint8_t* out) {
  const uint16_t sign = is_signed ? 0x0808 : 0;
  BITSTRATA_INDEPENDENT
  for (int64_t i = 0; i < pairs; ++i) {
    uint16_t two = static_cast<uint16_t>((packed[i] & 15) | (packed[i] >> 4) << 8);
    two = static_cast<uint16_t>(two | (two & sign) * 30);  // 8 * 30 = 0xf0
    std::memcpy(out + 2 * i, &two, sizeof two);
  }
}

// Codes to (count * width + 7) / 8 bytes; unused bits are 0.
inline void pack(const uint8_t* codes, int64_t count, int width, uint8_t* out) {
  if (width == 4) {
    pack_pairs(codes, count / 2, out);
    if (count % 2 != 0) out[count / 2] = codes[count - 1] & 15;
    return;
  }
  if (width == 8) {
    std::memcpy(out, codes, static_cast<size_t>(count));
    return;
  }
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
  if (width == 4) {
    unpack_pairs(packed, count / 2, is_signed, out);
    if (count % 2 != 0) {
      uint8_t two[2];
      unpack_pairs(packed + count / 2, 1, is_signed, two);
      out[count - 1] = two[0];
    }
    return;
  }
  if (width == 8) {
    std::memcpy(out, packed, static_cast<size_t>(count));
    return;
  }
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
