#include "sha256.h"

#include <algorithm>
#include <cstring>

namespace bitstrata::artifact {

namespace {

constexpr uint32_t kRounds[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

uint32_t rotate(uint32_t value, int by) { return (value >> by) | (value << (32 - by)); }

inline void round(uint32_t a, uint32_t b, uint32_t c, uint32_t* d, uint32_t e, uint32_t f, uint32_t g, uint32_t* h,
                  uint32_t addend) {
  const uint32_t choice = g ^ (e & (f ^ g)), majority = (a & b) | (c & (a | b));
  *h += (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) + choice + addend;
  *d += *h;
  *h += (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + majority;
}

}  // namespace

void Sha256::add(const void* data, size_t size) {
  const uint8_t* bytes = static_cast<const uint8_t*>(data);
  const size_t held = size_ % 64;
  size_ += size;
  if (held > 0) {
    const size_t taken = std::min(size, 64 - held);
    std::copy_n(bytes, taken, rest_ + held);
    bytes += taken, size -= taken;
    if (held + taken < 64) return;
    block(rest_);
  }
  for (; size >= 64; bytes += 64, size -= 64) block(bytes);
  std::copy_n(bytes, size, rest_);
}

std::string Sha256::hex() {
  const uint64_t bits = size_ * 8;
  const uint8_t one = 0x80, zero = 0;
  add(&one, 1);
  while (size_ % 64 != 56) add(&zero, 1);
  uint8_t length[8];
  for (int i = 0; i < 8; ++i) length[i] = static_cast<uint8_t>(bits >> (56 - 8 * i));
  add(length, 8);
  std::string text;
  for (uint32_t word : state_)
    for (int shift = 28; shift >= 0; shift -= 4) text += "0123456789abcdef"[(word >> shift) & 15];
  return text;
}

void Sha256::block(const uint8_t* bytes) {
  uint32_t w[64];
  for (int i = 0; i < 16; ++i) {
    w[i] = uint32_t{bytes[4 * i]} << 24 | uint32_t{bytes[4 * i + 1]} << 16 | uint32_t{bytes[4 * i + 2]} << 8 |
           uint32_t{bytes[4 * i + 3]};
  }
  for (int i = 16; i < 64; ++i) {
    const uint32_t a = w[i - 15], b = w[i - 2];
    w[i] =
        w[i - 16] + (rotate(a, 7) ^ rotate(a, 18) ^ (a >> 3)) + w[i - 7] + (rotate(b, 17) ^ rotate(b, 19) ^ (b >> 10));
  }
  // The roles of the eight words move on by one a round; within eight rounds each keeps its variable.
  uint32_t a = state_[0], b = state_[1], c = state_[2], d = state_[3];
  uint32_t e = state_[4], f = state_[5], g = state_[6], h = state_[7];
  for (int i = 0; i < 64; i += 8) {
    round(a, b, c, &d, e, f, g, &h, kRounds[i] + w[i]);
    round(h, a, b, &c, d, e, f, &g, kRounds[i + 1] + w[i + 1]);
    round(g, h, a, &b, c, d, e, &f, kRounds[i + 2] + w[i + 2]);
    round(f, g, h, &a, b, c, d, &e, kRounds[i + 3] + w[i + 3]);
    round(e, f, g, &h, a, b, c, &d, kRounds[i + 4] + w[i + 4]);
    round(d, e, f, &g, h, a, b, &c, kRounds[i + 5] + w[i + 5]);
    round(c, d, e, &f, g, h, a, &b, kRounds[i + 6] + w[i + 6]);
    round(b, c, d, &e, f, g, h, &a, kRounds[i + 7] + w[i + 7]);
  }
  const uint32_t sums[8] = {a, b, c, d, e, f, g, h};
  for (int i = 0; i < 8; ++i) state_[i] += sums[i];
}

std::string sha256_hex(const void* data, size_t size) {
  Sha256 hash;
  hash.add(data, size);
  return hash.hex();
}

}  // namespace bitstrata::artifact
