// Random bits of stochastic rounding; see bitstrata/training.h for which belong to which element.
//
// Like everything in this folder this is compiled once for each instruction set, in an unnamed namespace.
#pragma once

#include <cstdint>

#if defined(__AVX512DQ__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "bitstrata/training.h"

namespace bitstrata {
namespace {

constexpr int64_t kNoiseBlock = 128;   // elements that sixteen counters serve
constexpr int64_t kNoiseChunk = 8192;  // elements at a time
constexpr int kPhiloxRounds = 7;
constexpr uint32_t kPhiloxM0 = 0xD2511F53, kPhiloxM1 = 0xCD9E8D57, kPhiloxW0 = 0x9E3779B9, kPhiloxW1 = 0xBB67AE85;

// Counters in the low halves of 64-bit lanes; the upper halves hold what nothing reads.
#if defined(__AVX512DQ__)
struct Lanes {
  static constexpr int kCount = 8;
  static Lanes all(uint64_t v) { return {_mm512_set1_epi64(static_cast<int64_t>(v))}; }
  static Lanes every_second(uint64_t first) {
    const __m512i steps = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
    return {_mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(first)), steps)};
  }
  Lanes times(Lanes o) const { return {_mm512_mul_epu32(v, o.v)}; }
  Lanes high() const { return {_mm512_srli_epi64(v, 32)}; }
  static Lanes mixed(Lanes a, Lanes b, Lanes c) { return {_mm512_ternarylogic_epi64(a.v, b.v, c.v, 0x96)}; }
  // Words of this and of `odd` in turn.
  void store(Lanes odd, uint16_t* to) const {
    _mm512_storeu_si512(to, _mm512_mask_blend_epi32(0xAAAA, v, _mm512_slli_epi64(odd.v, 32)));
  }
  __m512i v;
};
#elif defined(__AVX2__)
struct Lanes {
  static constexpr int kCount = 4;
  static Lanes all(uint64_t v) { return {_mm256_set1_epi64x(static_cast<int64_t>(v))}; }
  static Lanes every_second(uint64_t first) {
    return {_mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(first)), _mm256_setr_epi64x(0, 2, 4, 6))};
  }
  Lanes times(Lanes o) const { return {_mm256_mul_epu32(v, o.v)}; }
  Lanes high() const { return {_mm256_srli_epi64(v, 32)}; }
  static Lanes mixed(Lanes a, Lanes b, Lanes c) { return {_mm256_xor_si256(_mm256_xor_si256(a.v, b.v), c.v)}; }
  void store(Lanes odd, uint16_t* to) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_blend_epi32(v, _mm256_slli_epi64(odd.v, 32), 0xAA));
  }
  __m256i v;
};
#else
struct Lanes {
  static constexpr int kCount = 1;
  static Lanes all(uint64_t v) { return {v}; }
  static Lanes every_second(uint64_t first) { return {first}; }
  Lanes times(Lanes o) const { return {(v & 0xFFFFFFFF) * (o.v & 0xFFFFFFFF)}; }
  Lanes high() const { return {v >> 32}; }
  static Lanes mixed(Lanes a, Lanes b, Lanes c) { return {a.v ^ b.v ^ c.v}; }
  void store(Lanes odd, uint16_t* to) const {
    to[0] = static_cast<uint16_t>(v), to[1] = static_cast<uint16_t>(v >> 16);
    to[2] = static_cast<uint16_t>(odd.v), to[3] = static_cast<uint16_t>(odd.v >> 16);
  }
  uint64_t v;
};
#endif

// The four words of the counters from `first` on, every second one.
inline void philox(const Noise& n, uint64_t first, Lanes* words) {
  const Lanes m0 = Lanes::all(kPhiloxM0), m1 = Lanes::all(kPhiloxM1);
  Lanes c0 = Lanes::every_second(first), c1 = c0.high(), c2 = Lanes::all(n.stream), c3 = Lanes::all(n.stream >> 32);
  uint32_t k0 = static_cast<uint32_t>(n.seed), k1 = static_cast<uint32_t>(n.seed >> 32);
  for (int r = 0; r < kPhiloxRounds; ++r, k0 += kPhiloxW0, k1 += kPhiloxW1) {
    const Lanes p0 = c0.times(m0), p1 = c2.times(m1);
    c0 = Lanes::mixed(p1.high(), c1, Lanes::all(k0));
    c2 = Lanes::mixed(p0.high(), c3, Lanes::all(k1));
    c1 = p1;
    c3 = p0;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

inline void noise_block(const Noise& n, int64_t block, uint16_t* out) {
  for (int first = 0; first < 16; first += 2 * Lanes::kCount) {
    Lanes even[4], odd[4];
    const uint64_t counter = static_cast<uint64_t>(block) * 16 + static_cast<uint64_t>(first);
    philox(n, counter, even);
    philox(n, counter + 1, odd);
    for (int w = 0; w < 4; ++w) even[w].store(odd[w], out + w * 32 + first * 2);
  }
}

// The bits of elements start to start + count - 1, count <= kNoiseChunk; buffer: of kNoiseBuffer elements.
constexpr int64_t kNoiseBuffer = kNoiseChunk + 2 * kNoiseBlock;
inline const uint16_t* noise_bits(const Noise& n, int64_t start, int64_t count, uint16_t* buffer) {
  const int64_t first = start / kNoiseBlock, last = (start + count - 1) / kNoiseBlock;
  for (int64_t block = first; block <= last; ++block) noise_block(n, block, buffer + (block - first) * kNoiseBlock);
  return buffer + start % kNoiseBlock;
}

}  // namespace
}  // namespace bitstrata
