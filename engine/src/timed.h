// The clock of profiled runs.
#pragma once

#include <cstdint>
#if !defined(__x86_64__) && !defined(__i386__)
#include <chrono>
#endif

#include "bitstrata/profile.h"
#include "ops.h"

namespace bitstrata {

// Some clock that is cheap beside a tile's operation. Profile finds out how long a tick is.
inline uint64_t ticks() {
#if defined(__x86_64__) || defined(__i386__)
  return __builtin_ia32_rdtsc();
#else
  return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
#endif
}

// Runs a part of the work that counts as operation number `index`.
template <typename Work>
void run_timed(Profile* profile, int thread, size_t index, const Work& work) {
  if (profile == nullptr) return work();
  const uint64_t start = ticks();
  work();
  profile->add(thread, index, ticks() - start);
}

// What counts the operation's time: in the order in which operations were added, whatever order they run in.
inline size_t profile_index(const Op& op) { return static_cast<size_t>(op.output) - 1; }

// Runs a part of an operation on a thread; profile: null if nobody asks for times.
inline void run_op(Profile* profile, int thread, const Op& op, int phase, const Frame& frame, int64_t begin,
                   int64_t end) {
  run_timed(profile, thread, profile_index(op), [&] { op.run(phase, frame, begin, end); });
}

}  // namespace bitstrata
