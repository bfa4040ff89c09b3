// Loops shared by threads, for operations that are called one at a time from outside and not as part of a graph.
#pragma once

#include <cstdint>
#include <functional>

namespace bitstrata {

// Calls body(begin, end) on pieces of [0, count) that together cover it, on at most `threads` threads, the caller among
// them; returns when all are done. Pieces hold at least `grain` items, but for the last. Calls from several threads
// take turns. body must not throw.
void parallel_for(int threads, int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

}  // namespace bitstrata
