// A fixed set of threads that share loops.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace bitstrata {

class ThreadPool {
 public:
  explicit ThreadPool(int threads);  // the caller counts as one
  ~ThreadPool();

  // Calls body(thread) once on every thread, the caller being thread 0, and returns when all are done.
  // body must not throw. Not reentrant.
  void run(const std::function<void(int)>& body);

 private:
  void work(int thread);
  void stop();

  std::mutex mutex_;
  std::condition_variable start_, done_;
  const std::function<void(int)>* body_ = nullptr;
  uint64_t generation_ = 0;
  int pending_ = 0;
  bool stop_ = false;
  std::vector<std::thread> workers_;
};

}  // namespace bitstrata
