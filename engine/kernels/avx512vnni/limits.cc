// What AVX-512 VNNI kernels can reach at best: products on registers.
#include "../common/limits.h"

#include <immintrin.h>

#include "avx512vnni.h"

namespace bitstrata {
namespace {

constexpr int kSums = 16;  // more than the products that run at a time

void products(int64_t rounds) {
  __m512i sum[kSums], a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(2);
  for (auto& s : sum) s = _mm512_setzero_si512();
  for (int64_t round = 0; round < rounds; ++round) {
    __asm__ volatile("" : "+v"(a), "+v"(b));
    for (int i = 0; i < kSums; ++i) sum[i] = _mm512_dpbusd_epi32(sum[i], a, b);
  }
  keep(sum);
}

}  // namespace

extern const Limits kAvx512VnniLimits = {
    {"vpdpbusd, 512 bits", kSums * 64, products}, read_memory<64>, copy_memory<64>};

}  // namespace bitstrata
