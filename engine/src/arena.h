// Placing buffers of known lifetimes in one block of memory.
#pragma once

#include <cstdint>
#include <vector>

namespace bitstrata {

// A buffer is in use from step `first` to step `last`, both included. bytes = 0: not placed.
struct Lifetime {
  int64_t bytes;
  int first, last;
};

struct Layout {
  std::vector<int64_t> offset;  // of each buffer, aligned
  int64_t bytes;                // of the block
};

// Largest first, each at the lowest offset where it overlaps no buffer that lives at the same time.
Layout lay_out(const std::vector<Lifetime>& buffers);

}  // namespace bitstrata
