// How a graph's operations are grouped and where their values are.
#include <algorithm>

#include "aligned.h"
#include "arena.h"
#include "bitstrata/graph.h"
#include "checks.h"
#include "graph_parts.h"

namespace bitstrata {
namespace {

constexpr int64_t kChunkBytes = 256 << 10;  // what a chunk of images may occupy, to stay in the second-level cache
constexpr int64_t kMaxChunk = 64;
constexpr int64_t kLeastTile = 64;  // pixels, over which a convolution's weights are read once

}  // namespace

void Graph::finish(int output) {
  if (output_ >= 0) fail("graph", "it is finished already");
  value(output);
  bring_readers_forward();
  form_groups(output);
  lay_out_arena(output, 1);
  chunk_ = std::clamp(kChunkBytes / std::max<int64_t>(arena_bytes_, 1), int64_t{1}, kMaxChunk);
  lay_out_arena(output, chunk_);
  resources_->reserve(run_bytes());
  output_ = output;
}

// What computes pixels from the same pixels of a sum of branches, or of what was made of one, comes right behind it, so
// that it runs in its tiles and the sum need not be read again: what a shortcut does with it waits else until the other
// branch is done. Not what makes something larger, nor rescaling, whose result is no smaller and read soon after.
void Graph::bring_readers_forward() {
  for (size_t i = 0; i < ops_.size(); ++i) {
    const Op& from = *ops_[i];
    if (from.items_of_pixel() == 0 || from.inputs.size() != 2) continue;
    std::vector<int> made{from.output};  // in the group that `from` belongs to
    size_t next = i + 1;
    for (size_t j = next; j < ops_.size(); ++j) {
      const Op& op = *ops_[j];
      if (op.items_of_pixel() == 0 || op.inputs.size() != 1 || op.part().kind == Part::rescale) continue;
      if (std::find(made.begin(), made.end(), op.inputs[0]) == made.end()) continue;
      const Value &x = values_[static_cast<size_t>(op.inputs[0])], &y = values_[static_cast<size_t>(op.output)];
      if (y.bytes() > x.bytes()) continue;
      std::rotate(ops_.begin() + static_cast<std::ptrdiff_t>(next), ops_.begin() + static_cast<std::ptrdiff_t>(j),
                  ops_.begin() + static_cast<std::ptrdiff_t>(j) + 1);
      made.push_back(ops_[next++]->output);
    }
  }
}

void Graph::form_groups(int output) {
  for (size_t i = 0; i < ops_.size(); ++i) {
    const Op& op = *ops_[i];
    const int64_t pixels = values_[static_cast<size_t>(op.output)].shape.pixels();
    if (op.items_of_pixel() > 0 && !groups_.empty() && groups_.back().unit > 0 && groups_.back().pixels == pixels)
      groups_.back().end = i + 1;
    else
      groups_.push_back(
          {i, i + 1, pixels, op.items_of_pixel() > 0 ? 1 : op.pixels_of_item(), {}, 0, 0, false, 0, 0, 0, 0});
  }
  for (Group& group : groups_) find_locals(output, &group);
  find_fusions(output);
}

void Graph::find_locals(int output, Group* group) {
  if (group->unit == 0) return;
  int64_t pixel_bytes = 1;
  for (size_t i = group->first; i < group->end; ++i) {
    const int v = ops_[i]->output;
    const auto reads = [&](const auto& op) {
      return std::find(op->inputs.begin(), op->inputs.end(), v) != op->inputs.end();
    };
    const auto end = ops_.begin() + static_cast<std::ptrdiff_t>(group->end);
    if (v == output || std::any_of(end, ops_.end(), reads)) continue;
    size_t last = i;
    for (size_t j = i + 1; j < group->end; ++j)
      if (reads(ops_[j])) last = j;
    const int64_t bytes = values_[static_cast<size_t>(v)].bytes() / group->pixels;
    group->locals.push_back({v, bytes, static_cast<int>(i), static_cast<int>(last), 0});
    pixel_bytes += group->locals.back().pixel_bytes;
  }
  const int64_t wanted = std::max(tile_bytes_ / pixel_bytes, kLeastTile);
  group->most = (wanted + group->unit - 1) / group->unit * group->unit;
}

void Graph::lay_out_locals(int64_t images, Group* group) {
  group->tile = std::min(group->most, group->pixels * images);
  std::vector<Lifetime> buffers;
  for (const Group::Local& l : group->locals) buffers.push_back({l.pixel_bytes * group->tile, l.first, l.last});
  const Layout layout = lay_out(buffers);
  for (size_t i = 0; i < buffers.size(); ++i) group->locals[i].at = layout.offset[i];
  group->at = align_up(layout.bytes);
  const int64_t window = group->window > 0 ? group->window * row_bytes(*group) : 0;
  local_bytes_ = std::max(local_bytes_, group->at + window);
}

// Of the sums that the group before has deferred.
int64_t Graph::row_bytes(const Group& group) const {
  const Value& sums = values_[static_cast<size_t>(ops_[group.taken]->output)];
  return sums.shape.w * sums.shape.c * size_of(sums.dtype);
}

// Buffers: the values and the operations' scratch. Input and output are the caller's, local values are elsewhere. Time
// is counted in groups.
void Graph::lay_out_arena(int output, int64_t images) {
  std::vector<Lifetime> buffers;
  for (const Value& v : values_) buffers.push_back({v.bytes() * images, 0, 0});
  for (int g = 0; g < static_cast<int>(groups_.size()); ++g) {
    const Group& group = groups_[static_cast<size_t>(g)];
    for (size_t i = group.first; i < group.end; ++i) {
      const Op& op = *ops_[i];
      const int last = group.deferred == group.end ? g : g + 1;  // the next group runs its convolution
      Lifetime& result = buffers[static_cast<size_t>(op.output)];
      result.first = result.last = g;
      for (int x : op.inputs) buffers[static_cast<size_t>(x)].last = last;
      buffers.push_back({op.scratch_bytes(images), g, last});
    }
  }
  for (Group& group : groups_) {
    lay_out_locals(images, &group);
    for (const Group::Local& local : group.locals) buffers[static_cast<size_t>(local.value)].bytes = 0;
  }
  buffers[0].bytes = buffers[static_cast<size_t>(output)].bytes = 0;
  Layout layout = lay_out(buffers);
  offsets_ = std::move(layout.offset);
  arena_bytes_ = layout.bytes;
}

}  // namespace bitstrata
