// What the products share.
#pragma once

#include <cstdint>

#include "bitstrata/products.h"
#include "checks.h"

namespace bitstrata {

// Throws std::invalid_argument, naming the operation.
void check_codes(const std::string& op, const ProductCodes&, int64_t channels);

// Starts to fetch, into the second cache, as many bytes as are read from `at` next, but some distance behind them:
// images are read one after the other, in pieces too short for the processor to see that more will follow.
inline void fetch_ahead(const void* at, int64_t bytes) {
  constexpr int64_t kDistance = 8192, kLine = 64;
  for (int64_t i = 0; i < bytes; i += kLine)  // an address that may lie outside of all memory, hence no pointer's
    __builtin_prefetch(
        reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(at) + kDistance + static_cast<uintptr_t>(i)), 0, 2);
}

}  // namespace bitstrata
