// What 256-bit VNNI kernels can reach at best, in the encoding that this file is compiled for.
#pragma once

#include "../common/limits.h"
#include "dot.h"

namespace bitstrata {
namespace {

constexpr int kPeakSums = 12;  // more than the products that run at a time

void peak_products(int64_t rounds) {
  __m256i sum[kPeakSums], a = _mm256_set1_epi8(1), b = _mm256_set1_epi8(2);
  for (auto& s : sum) s = _mm256_setzero_si256();
  for (int64_t round = 0; round < rounds; ++round) {
    __asm__ volatile("" : "+x"(a), "+x"(b));
    for (int i = 0; i < kPeakSums; ++i) sum[i] = dot(sum[i], a, b);
  }
  keep(sum);
}

constexpr Limits kLimits = {{"vpdpbusd, 256 bits", kPeakSums * 32, peak_products}, read_memory<32>, copy_memory<32>};

}  // namespace
}  // namespace bitstrata
