// What the portable kernels can reach at best: products of int16, which the compiler vectorizes, from the first-level
// cache, because portable code cannot keep vectors in registers.
#include "../common/limits.h"

namespace bitstrata {
namespace {

constexpr int64_t kElements = 256, kOutputs = 4, kRepeats = 8;

void products(int64_t rounds) {
  alignas(64) int16_t x[kElements], w[kOutputs][kElements];
  for (int64_t i = 0; i < kElements; ++i) {
    x[i] = static_cast<int16_t>(i);
    for (auto& row : w) row[i] = static_cast<int16_t>(3 * i);
  }
  for (int64_t round = 0; round < rounds * kRepeats; ++round) {
    keep(x), keep(w);  // may have changed: sums cannot be kept from round to round
    uint32_t sum[kOutputs] = {};
    for (int64_t i = 0; i < kElements; ++i)
      for (int64_t k = 0; k < kOutputs; ++k) sum[k] += static_cast<uint32_t>(int32_t{x[i]} * w[k][i]);
    keep(sum);
  }
}

}  // namespace

extern const Limits kGenericLimits;
const Limits kGenericLimits = {
    {"int16 products", kElements * kOutputs * kRepeats, products}, read_memory<16>, copy_memory<16>};

}  // namespace bitstrata
