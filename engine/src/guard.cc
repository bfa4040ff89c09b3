#include "bitstrata/guard.h"

#include <atomic>
#include <new>

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#include <unistd.h>
#define BITSTRATA_HAVE_PAGES
#endif

namespace bitstrata {
namespace {

constexpr std::align_val_t kLine{64};
std::atomic<bool> guarded{false};

#ifdef BITSTRATA_HAVE_PAGES
Memory allocate_guarded(int64_t bytes, int64_t align) {
  const int64_t page = sysconf(_SC_PAGESIZE), body = (bytes + page - 1) / page * page;
  const size_t size = static_cast<size_t>(body + page);
  void* p = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  uint8_t* pages = static_cast<uint8_t*>(p);
  Memory memory(pages + (body - bytes) / align * align, FreeMemory{pages, body + page});
  if (mprotect(pages + body, static_cast<size_t>(page), PROT_NONE) != 0) throw std::bad_alloc();
  return memory;
}
#endif

}  // namespace

bool guard_memory(bool on) {
#ifdef BITSTRATA_HAVE_PAGES
  guarded = on;
  return true;
#else
  return !on;
#endif
}

void FreeMemory::operator()(uint8_t* data) const {
#ifdef BITSTRATA_HAVE_PAGES
  if (pages != nullptr) {
    munmap(pages, static_cast<size_t>(bytes));
    return;
  }
#endif
  ::operator delete(data, kLine);
}

Memory allocate(int64_t bytes, int64_t align) {
#ifdef BITSTRATA_HAVE_PAGES
  if (guarded) return allocate_guarded(bytes, align);
#else
  static_cast<void>(align);
#endif
  return Memory(static_cast<uint8_t*>(::operator new(static_cast<size_t>(bytes), kLine)), FreeMemory{});
}

}  // namespace bitstrata
