#include "arena.h"

#include <algorithm>
#include <numeric>

#include "aligned.h"

namespace bitstrata {

Layout lay_out(const std::vector<Lifetime>& buffers) {
  std::vector<size_t> order(buffers.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return buffers[a].bytes > buffers[b].bytes; });
  Layout layout{std::vector<int64_t>(buffers.size(), 0), 0};
  std::vector<size_t> placed;  // by offset
  for (size_t i : order) {
    const Lifetime& buffer = buffers[i];
    if (buffer.bytes == 0) continue;
    const int64_t bytes = align_up(buffer.bytes);
    int64_t offset = 0;
    for (size_t j : placed) {
      if (buffers[j].last < buffer.first || buffer.last < buffers[j].first) continue;
      if (offset + bytes <= layout.offset[j]) break;
      offset = std::max(offset, layout.offset[j] + align_up(buffers[j].bytes));
    }
    layout.offset[i] = offset;
    layout.bytes = std::max(layout.bytes, offset + bytes);
    placed.insert(std::upper_bound(placed.begin(), placed.end(), i,
                                   [&](size_t a, size_t b) { return layout.offset[a] < layout.offset[b]; }),
                  i);
  }
  return layout;
}

}  // namespace bitstrata
