#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>

#include "thread_pool.h"

namespace bitstrata {
namespace {

constexpr int64_t kPiecesPerThread = 4;  // so that a thread that starts late, or runs slower, takes fewer

std::mutex pool_mutex;
std::unique_ptr<ThreadPool> pool;
int pool_threads = 0;

}  // namespace

void parallel_for(int threads, int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  if (count <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  if (threads <= 1 || count <= grain) return body(0, count);
  std::lock_guard<std::mutex> lock(pool_mutex);
  if (threads != pool_threads) {
    pool.reset();
    pool_threads = 0;
    pool = std::make_unique<ThreadPool>(threads);
    pool_threads = threads;
  }
  const int64_t piece = std::max(grain, (count + threads * kPiecesPerThread - 1) / (threads * kPiecesPerThread));
  std::atomic<int64_t> next{0};
  pool->run([&](int) {
    for (int64_t begin; (begin = next.fetch_add(piece)) < count;) body(begin, std::min(count, begin + piece));
  });
}

}  // namespace bitstrata
