// What AVX2 kernels can reach at best: products on registers.
#include "../common/limits.h"

#include <immintrin.h>

#include "avx2.h"

namespace bitstrata {
namespace {

constexpr int kSums = 8;  // independent of each other

// Sums of `Step`, whose factors might change from one to the next.
template <typename Step>
inline void repeat(int64_t rounds, const Step& step) {
  __m256i sum[kSums], a = _mm256_set1_epi8(1), b = _mm256_set1_epi8(2);
  for (auto& s : sum) s = _mm256_setzero_si256();
  for (int64_t round = 0; round < rounds; ++round)
    for (int i = 0; i < kSums; ++i) {
      __asm__ volatile("" : "+x"(a), "+x"(b));
      sum[i] = step(sum[i], a, b);
    }
  keep(sum);
}

void narrow(int64_t rounds) {
  repeat(rounds, [](__m256i s, __m256i a, __m256i b) { return _mm256_add_epi16(s, _mm256_maddubs_epi16(a, b)); });
}
void wide(int64_t rounds) {
  repeat(rounds, [](__m256i s, __m256i a, __m256i b) { return _mm256_add_epi32(s, _mm256_madd_epi16(a, b)); });
}

// The places in a table, which a carry out of four bits would turn into zeros.
void tables(int64_t rounds) {
  repeat(rounds, [](__m256i s, __m256i a, __m256i b) { return _mm256_add_epi8(s, _mm256_shuffle_epi8(a, b)); });
}

// The same for two pixels, whose sums share a byte for three steps.
void table_pairs(int64_t rounds) {
  repeat(rounds, [](__m256i s, __m256i a, __m256i b) {
    __m256i few = _mm256_shuffle_epi8(a, b);
    for (int step = 1; step < 3; ++step) {
      __asm__ volatile("" : "+x"(a), "+x"(b));
      few = _mm256_add_epi8(few, _mm256_shuffle_epi8(a, b));
    }
    __asm__ volatile("" : "+x"(few));
    return _mm256_add_epi8(_mm256_add_epi8(s, few), _mm256_srli_epi16(few, 4));
  });
}

}  // namespace

extern const PeakLoop kAvx2PairPeak = {"3 vpshufb + 4 vpaddb + vpsrlw", kSums * 32 * 4 * 2 * 3, table_pairs};
extern const PeakLoop kAvx2TablePeak = {"vpshufb + vpaddb", kSums * 32 * 4, tables};
extern const PeakLoop kAvx2WidePeak = {"vpmaddwd + vpaddd", kSums * 16, wide};
extern const Limits kAvx2Limits = {{"vpmaddubsw + vpaddw", kSums * 32, narrow}, read_memory<32>, copy_memory<32>};

}  // namespace bitstrata
