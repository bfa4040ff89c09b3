// Random bits of stochastic rounding; see bitstrata/training.h for which belong to which element.
//
// Like everything in this folder this is compiled once for each instruction set, in an unnamed namespace.
#pragma once

#include <cstdint>

#ifdef __AVX512DQ__
#include <immintrin.h>
#endif

#include "bitstrata/training.h"

namespace bitstrata {
namespace {

constexpr int64_t kNoiseBlock = 128;   // elements that sixteen counters serve
constexpr int64_t kNoiseChunk = 4096;  // elements at a time
constexpr int kPhiloxRounds = 7;
constexpr uint32_t kPhiloxM0 = 0xD2511F53, kPhiloxM1 = 0xCD9E8D57, kPhiloxW0 = 0x9E3779B9, kPhiloxW1 = 0xBB67AE85;

#ifdef __AVX512DQ__

// Eight counters in the low halves of 64-bit lanes; the upper halves hold what nothing reads.
inline void philox_eight(__m512i c0, __m512i c1, __m512i c2, __m512i c3, uint32_t k0, uint32_t k1, __m512i* out) {
  const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
  for (int r = 0; r < kPhiloxRounds; ++r, k0 += kPhiloxW0, k1 += kPhiloxW1) {
    const __m512i p0 = _mm512_mul_epu32(c0, m0), p1 = _mm512_mul_epu32(c2, m1);
    c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1, _mm512_set1_epi64(k0), 0x96);
    c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, _mm512_set1_epi64(k1), 0x96);
    c1 = p1;
    c3 = p0;
  }
  out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

inline void noise_block(const Noise& n, int64_t block, uint16_t* out) {
  const __m512i lanes = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  for (int half = 0; half < 2; ++half) {
    const __m512i j = _mm512_add_epi64(_mm512_set1_epi64(block * 16 + half * 8), lanes);
    __m512i words[4];
    philox_eight(j, _mm512_srli_epi64(j, 32), _mm512_set1_epi64(static_cast<int64_t>(n.stream & 0xFFFFFFFF)),
                 _mm512_set1_epi64(static_cast<int64_t>(n.stream >> 32)), static_cast<uint32_t>(n.seed),
                 static_cast<uint32_t>(n.seed >> 32), words);
    for (int w = 0; w < 4; ++w) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + w * 16 + half * 8), _mm512_cvtepi64_epi16(words[w]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 64 + w * 16 + half * 8),
                       _mm512_cvtepi64_epi16(_mm512_srli_epi64(words[w], 16)));
    }
  }
}

#else

inline void noise_block(const Noise& n, int64_t block, uint16_t* out) {
  uint64_t c0[16], c1[16], c2[16], c3[16];
  for (int l = 0; l < 16; ++l) {
    const uint64_t j = static_cast<uint64_t>(block * 16 + l);
    c0[l] = j & 0xFFFFFFFF, c1[l] = j >> 32, c2[l] = n.stream & 0xFFFFFFFF, c3[l] = n.stream >> 32;
  }
  uint32_t k0 = static_cast<uint32_t>(n.seed), k1 = static_cast<uint32_t>(n.seed >> 32);
  for (int r = 0; r < kPhiloxRounds; ++r, k0 += kPhiloxW0, k1 += kPhiloxW1)
    for (int l = 0; l < 16; ++l) {
      const uint64_t p0 = (c0[l] & 0xFFFFFFFF) * kPhiloxM0, p1 = (c2[l] & 0xFFFFFFFF) * kPhiloxM1;
      c0[l] = (p1 >> 32) ^ c1[l] ^ k0;
      c2[l] = (p0 >> 32) ^ c3[l] ^ k1;
      c1[l] = p1 & 0xFFFFFFFF;
      c3[l] = p0 & 0xFFFFFFFF;
    }
  const uint64_t* words[4] = {c0, c1, c2, c3};
  for (int w = 0; w < 4; ++w)
    for (int l = 0; l < 16; ++l) {
      out[w * 16 + l] = static_cast<uint16_t>(words[w][l]);
      out[64 + w * 16 + l] = static_cast<uint16_t>(words[w][l] >> 16);
    }
}

#endif

// The bits of elements start to start + count - 1, count <= kNoiseChunk; buffer: of kNoiseBuffer elements.
constexpr int64_t kNoiseBuffer = kNoiseChunk + 2 * kNoiseBlock;
inline const uint16_t* noise_bits(const Noise& n, int64_t start, int64_t count, uint16_t* buffer) {
  const int64_t first = start / kNoiseBlock, last = (start + count - 1) / kNoiseBlock;
  for (int64_t block = first; block <= last; ++block) noise_block(n, block, buffer + (block - first) * kNoiseBlock);
  return buffer + start % kNoiseBlock;
}

}  // namespace
}  // namespace bitstrata
