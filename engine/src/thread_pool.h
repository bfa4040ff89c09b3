// A fixed set of threads that share loops.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace bitstrata {

class ThreadPool {
 public:
  explicit ThreadPool(int threads);  // the caller counts as one
  ~ThreadPool();

  // Calls body(thread) once on every thread, the caller being thread 0, and returns when all are done.
  // body must not throw. Not reentrant. Allocates nothing.
  template <typename Body>
  void run(const Body& body) {
    run_all([](const void* data, int thread) { (*static_cast<const Body*>(data))(thread); }, &body);
  }

 private:
  using Call = void (*)(const void* body, int thread);
  void run_all(Call call, const void* body);
  void work(int thread);
  void stop();

  std::mutex mutex_;
  std::condition_variable start_, done_;
  Call call_ = nullptr;
  const void* body_ = nullptr;
  std::atomic<uint64_t> generation_{0};  // changes with the mutex held
  std::atomic<int> pending_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

}  // namespace bitstrata
