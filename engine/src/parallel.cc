#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>

#if __has_include(<dlfcn.h>)
#include <dlfcn.h>
#endif

#include "bitstrata/threads.h"
#include "thread_pool.h"

namespace bitstrata {
namespace {

constexpr int64_t kPiecesPerThread = 4;  // so that a thread that starts late, or runs slower, takes fewer

std::mutex pool_mutex;
std::unique_ptr<ThreadPool> pool;
int pool_threads = 0;

// How compilers start a parallel region: body(data) on each of at most `threads` threads.
using StartRegion = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
std::atomic<StartRegion> start_region{nullptr};

}  // namespace

bool use_openmp(const std::string& library) {
#if __has_include(<dlfcn.h>)
  void* handle = dlopen(library.c_str(), RTLD_LAZY | RTLD_NOLOAD);  // never closed: its threads outlive every loop
  if (handle == nullptr) return false;
  void* found = dlsym(handle, "GOMP_parallel");
  if (found == nullptr) return false;
  start_region = reinterpret_cast<StartRegion>(found);
  return true;
#else
  static_cast<void>(library);
  return false;
#endif
}

void parallel_for(int threads, int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  if (count <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  if (threads <= 1 || count <= grain) return body(0, count);
  const int64_t piece = std::max(grain, (count + threads * kPiecesPerThread - 1) / (threads * kPiecesPerThread));
  std::atomic<int64_t> next{0};
  auto pieces = [&] {
    for (int64_t begin; (begin = next.fetch_add(piece)) < count;) body(begin, std::min(count, begin + piece));
  };
  if (const StartRegion start = start_region) {
    start([](void* work) { (*static_cast<decltype(pieces)*>(work))(); }, &pieces, static_cast<unsigned>(threads), 0);
    return;
  }
  std::lock_guard<std::mutex> lock(pool_mutex);
  if (threads != pool_threads) {
    pool.reset();
    pool_threads = 0;
    pool = std::make_unique<ThreadPool>(threads);
    pool_threads = threads;
  }
  pool->run([&](int) { pieces(); });
}

}  // namespace bitstrata
