// Which operations run as one. What is left out on the way is computed nonetheless where somebody wants it.
#include <algorithm>

#include "bitstrata/graph.h"
#include "graph_parts.h"

namespace bitstrata {
namespace {

// Whether a requantization never falls where its input rises, for any int32 and without wrapping.
bool rises(const RequantArgs& a) {
  for (int64_t c = 0; c < a.channels; ++c) {
    const uint64_t most = static_cast<uint64_t>(a.multiplier[c]) << 31;
    const uint64_t bias = a.bias[c] < 0 ? -static_cast<uint64_t>(a.bias[c]) : static_cast<uint64_t>(a.bias[c]);
    if (a.multiplier[c] < 0 || most + bias > static_cast<uint64_t>(INT64_MAX)) return false;
  }
  return true;
}

}  // namespace

// Whether operation i alone reads the value, and once.
bool Graph::read_once(size_t i, int value, int output) const {
  if (value == output) return false;  // the caller reads it
  int64_t reads = 0;
  for (const auto& op : ops_) reads += std::count(op->inputs.begin(), op->inputs.end(), value);
  return reads == 1 && std::count(ops_[i]->inputs.begin(), ops_[i]->inputs.end(), value) == 1;
}

void Graph::find_fusions(int output) {
  for (Group& group : groups_) {
    group.fused = false;
    group.deferred = group.taken = group.end;
    const size_t first = group.first;
    if (group.unit == 0 || first + 1 == group.end || !read_once(first + 1, ops_[first]->output, output)) continue;
    group.fused = ops_[first]->fuse(*ops_[first + 1]);
  }
  for (size_t g = 0; g + 1 < groups_.size(); ++g) find_deferred(output, &groups_[g], &groups_[g + 1]);
}

// A maximum of requantized values is the requantized maximum, where the requantization never falls: a group that ends
// with one leaves it to the next group, which begins with a maximum pooling and has fewer pixels. That group also has
// the sums computed, row by row as its windows need them, so that they are read from the cache.
void Graph::find_deferred(int output, Group* group, Group* next) {
  const size_t last = group->end - 1, pool = next->first;
  if (group->unit == 0 || last != group->first + 1 || group->fused || pool != group->end) return;
  if (group->taken != group->end) return;  // it is not there to have its own rows computed from elsewhere
  const Part part = ops_[last]->part();
  const Op& pooling = *ops_[pool];
  if (part.kind != Part::rescale || !pooling.takes_maximum() || pooling.inputs[0] != ops_[last]->output) return;
  if (!read_once(pool, ops_[last]->output, output) || ops_[last]->inputs[0] != ops_[group->first]->output) return;
  if (!read_once(last, ops_[group->first]->output, output) || !rises(*part.requant)) return;
  group->deferred = next->taken = last;
  for (int64_t item = 0; item < pooling.items(0, 1); ++item) {
    const Rows rows = pooling.rows_read(item);
    next->window = std::max(next->window, rows.end - rows.begin);
  }
}

}  // namespace bitstrata
