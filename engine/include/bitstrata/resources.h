// What runs of graphs need besides the graphs: threads, and memory for the values in between.
//
// Several graphs may share one: a network's precisions do. Every run has memory of its own. One run at a time has the
// threads; a run that finds them taken works on its caller's thread alone, with the same results.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace bitstrata {

class Lease;

class Resources {
 public:
  // threads: 1..256, the caller of a run being one. callers: 1..4096, how many runs may be under way at once, those
  // beyond it wait; 0: one a processor, and at least 4. Throws std::invalid_argument, std::system_error.
  explicit Resources(int threads, int callers = 0);
  ~Resources();
  Resources(const Resources&) = delete;
  Resources& operator=(const Resources&) = delete;

  // For runs that begin from now on; runs under way keep the threads they have.
  void set_threads(int threads);
  int threads() const;
  int callers() const { return callers_; }

  // Makes sure that a caller, and every thread, finds `bytes` bytes, so that a run allocates nothing unless several
  // are under way for the first time.
  void reserve(int64_t bytes);
  // Gives back what no run uses, but for `bytes` bytes a thread.
  void trim(int64_t bytes);
  // Memory held, in use or not; at most callers() + threads() - 1 times what was reserved.
  int64_t bytes() const { return held_; }

 private:
  friend class Lease;
  class Block;
  struct Team;

  std::shared_ptr<Team> make_team(int threads);
  void reserve_locked(int64_t bytes);

  const int callers_;
  std::atomic<int64_t> held_{0};
  mutable std::mutex mutex_;  // of what follows
  std::condition_variable returned_;
  int64_t reserved_ = 0;     // bytes
  int leased_ = 0;           // blocks that runs have
  std::vector<Block> idle_;  // together with them at most callers_
  int threads_;
  std::shared_ptr<Team> team_;  // null: one thread
};

}  // namespace bitstrata
