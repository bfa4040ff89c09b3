#include "thread_pool.h"

#include <chrono>

namespace bitstrata {
namespace {

// Loops follow one another closely, and waking a thread takes longer than many of them: for a while a thread that waits
// looks for itself, giving its processor to whoever else wants it, and only then sleeps.
constexpr auto kPatience = std::chrono::microseconds(200);

template <typename Condition>
bool soon(const Condition& condition) {
  const auto end = std::chrono::steady_clock::now() + kPatience;
  do {
    for (int i = 0; i < 64; ++i) {
      if (condition()) return true;
#if defined(__x86_64__) || defined(__i386__)
      __builtin_ia32_pause();
#endif
    }
    std::this_thread::yield();
  } while (std::chrono::steady_clock::now() < end);
  return condition();
}

}  // namespace

ThreadPool::ThreadPool(int threads) {
  try {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
  } catch (...) {
    stop();
    throw;
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  start_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void ThreadPool::run_all(Call call, const void* body) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    call_ = call;
    body_ = body;
    pending_ = static_cast<int>(workers_.size());
    ++generation_;
  }
  start_.notify_all();
  call(body, 0);
  const auto finished = [this] { return pending_ == 0; };
  if (soon(finished)) return;
  std::unique_lock<std::mutex> lock(mutex_);
  done_.wait(lock, finished);
}

void ThreadPool::work(int thread) {
  uint64_t seen = 0;
  for (;;) {
    const auto called = [&] { return stop_ || generation_ != seen; };
    if (!soon(called)) {
      std::unique_lock<std::mutex> lock(mutex_);
      start_.wait(lock, called);
    }
    Call call;
    const void* body;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (stop_) return;
      seen = generation_;
      call = call_;
      body = body_;
    }
    call(body, thread);
    if (--pending_ == 0) {
      std::lock_guard<std::mutex> lock(mutex_);  // between the caller's look and its sleep there is no gap
      done_.notify_one();
    }
  }
}

}  // namespace bitstrata
