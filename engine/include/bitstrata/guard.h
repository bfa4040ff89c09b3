// For tests: memory that ends at a page which nobody may touch, so that a kernel that reads or writes too far ends the
// process instead of finding what lies behind.
#pragma once

#include <cstdint>
#include <memory>

namespace bitstrata {

// Whether memory that is allocated from now on, by graphs and for their results, is guarded: slow, and at least two
// pages for each buffer. Returns false where the operating system has no such pages; nothing changes then.
bool guard_memory(bool on);

struct FreeMemory {
  void operator()(uint8_t* data) const;
  uint8_t* pages = nullptr;  // of guarded memory
  int64_t bytes = 0;         // of the pages
};
using Memory = std::unique_ptr<uint8_t, FreeMemory>;

// `bytes` bytes aligned to `align`, a power of two of 64 at most; guarded memory ends less than `align` bytes before
// the page. Throws std::bad_alloc.
Memory allocate(int64_t bytes, int64_t align);

}  // namespace bitstrata
