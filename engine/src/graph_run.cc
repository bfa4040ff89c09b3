// How a graph runs.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "aligned.h"
#include "bitstrata/graph.h"
#include "checks.h"
#include "graph_parts.h"
#include "lease.h"
#include "timed.h"
#include "upper_halves.h"

namespace bitstrata {
namespace {

constexpr int64_t kSharedCost = 1 << 15;  // work below this is not worth waking the other threads for

// The index of the first element outside [lo, hi], or count (which is not 0).
template <typename T>
int64_t find_outside(const void* data, int64_t count, int32_t lo, int32_t hi) {
  const T* x = static_cast<const T*>(data);
  T least = x[0], most = x[0];  // a reduction that the compiler vectorizes
  for (int64_t i = 1; i < count; ++i) {
    least = std::min(least, x[i]);
    most = std::max(most, x[i]);
  }
  if (least >= lo && most <= hi) return count;
  return std::find_if(x, x + count, [&](T v) { return v < lo || v > hi; }) - x;
}

}  // namespace

Graph::Worker Graph::worker(const Lease& lease, int thread) const {
  uint8_t* memory = lease.memory(thread);
  uint8_t* locals = memory + align_up(static_cast<int64_t>(values_.size() * sizeof(uint8_t*)));
  return {reinterpret_cast<uint8_t**>(memory), locals, locals + align_up(local_bytes_)};
}

void Graph::check_input(const void* input, int64_t batch) const {
  const Value& v = values_[0];
  if (v.lo == lowest(v.dtype) && v.hi == highest(v.dtype)) return;
  const int64_t count = batch * v.shape.elements();
  const auto find = v.dtype == DType::u8   ? find_outside<uint8_t>
                    : v.dtype == DType::s8 ? find_outside<int8_t>
                                           : find_outside<int32_t>;
  const int64_t at = find(input, count, v.lo, v.hi);
  if (at < count)
    throw std::invalid_argument("run: an element of image " + str(at / v.shape.elements()) +
                                " is outside the input's range " + str(v.lo) + ".." + str(v.hi));
}

Graph::Destinations Graph::all(const std::vector<void*>& destinations) const {
  if (output_ >= 0 && (destinations.size() != values_.size() || destinations[static_cast<size_t>(output_)] == nullptr))
    throw std::invalid_argument("run: destinations need one entry a value, and one for the output");
  return {destinations.data(), static_cast<size_t>(output_), nullptr, destinations.size()};
}

Graph::Destinations Graph::only(void* output) const {
  return {nullptr, static_cast<size_t>(output_), output, values_.size()};
}

bool Graph::Destinations::output_alone() const {
  for (size_t v = 0; table != nullptr && v < values; ++v)
    if (v != output && table[v] != nullptr) return false;
  return true;
}

void Graph::check_run(const void* input, int64_t batch) const {
  if (output_ < 0) throw std::invalid_argument("run: the graph is not finished");
  check_range("run", "batch", batch, 0, kMaxElements);
  if (batch > 0) check_input(input, batch);
}

void Graph::run(const void* input, int64_t batch, const std::vector<void*>& destinations, Profile* profile) const {
  run_on_lease(input, batch, all(destinations), profile);
}

void Graph::run(const void* input, int64_t batch, void* output) const {
  run_on_lease(input, batch, only(output), nullptr);
}

void Graph::run_in(void* memory, const void* input, int64_t batch, const std::vector<void*>& destinations) const {
  run_in_memory(memory, input, batch, all(destinations));
}

void Graph::run_in(void* memory, const void* input, int64_t batch, void* output) const {
  run_in_memory(memory, input, batch, only(output));
}

void Graph::run_on_lease(const void* input, int64_t batch, const Destinations& destinations, Profile* profile) const {
  check_run(input, batch);
  if (batch > 0) run_batch(Lease(*resources_, run_bytes()), input, batch, destinations, profile);
}

void Graph::run_in_memory(void* memory, const void* input, int64_t batch, const Destinations& destinations) const {
  check_run(input, batch);
  if (reinterpret_cast<uintptr_t>(memory) % kAlign != 0)
    throw std::invalid_argument("run: the memory must be aligned to " + str(kAlign) + " bytes");
  if (batch > 0) run_batch(Lease(static_cast<uint8_t*>(memory)), input, batch, destinations, nullptr);
}

void Graph::run_batch(const Lease& lease, const void* input, int64_t batch, const Destinations& destinations,
                      Profile* profile) const {
  const int threads = lease.threads();
  const int64_t images = std::min(chunk_, (batch + threads - 1) / threads);
  const int64_t chunks = (batch + images - 1) / images;
  const bool share_rows = threads > 1 && chunks < threads;
  const Call call{lease,   static_cast<const uint8_t*>(input), batch, destinations, threads, share_rows,
                  profile, destinations.output_alone()};
  std::atomic<int64_t> next{0};
  const auto work = [&](int t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < chunks;)
      run_chunk(call, i * images, std::min(images, batch - i * images), t);
  };
  clear_upper_halves();
  if (profile != nullptr) profile->begin();
  if (share_rows)
    work(0);
  else
    lease.run(work);
  if (profile != nullptr) profile->end();
}

void Graph::run_chunk(const Call& call, int64_t begin, int64_t images, int thread) const {
  const Worker worker = this->worker(call.lease, thread);
  for (size_t v = 0; v < values_.size(); ++v) {
    uint8_t* destination = static_cast<uint8_t*>(call.destinations[v]);
    worker.values[v] = destination != nullptr ? destination + begin * values_[v].bytes() : worker.arena + offsets_[v];
  }
  const uint8_t* input = call.input + begin * values_[0].bytes();
  if (call.destinations[0] != nullptr)
    std::memcpy(worker.values[0], input, static_cast<size_t>(images * values_[0].bytes()));
  worker.values[0] = const_cast<uint8_t*>(input);  // operations only read their inputs
  if (call.share_rows)
    for (int t = 1; t < call.threads; ++t)
      std::copy_n(worker.values, values_.size(), this->worker(call.lease, t).values);
  int64_t cost = 0;
  for (const Group& group : groups_) {
    const bool defers = call.fused && group.deferred != group.end;
    for (size_t i = group.first; i < group.end; ++i) cost += ops_[i]->cost() * images;
    const auto divide = [&](int64_t items, const auto& work) {
      if (call.share_rows && cost >= kSharedCost)
        call.lease.run([&](int t) { work(t, items * t / call.threads, items * (t + 1) / call.threads); });
      else
        work(thread, int64_t{0}, items);
    };
    const Op& op = *ops_[group.first];
    const Frame frame{worker.values, worker.arena + offsets_[values_.size() + group.first], images};
    const int untiled = group.unit > 0 ? op.phases() - 1 : op.phases();
    for (int phase = 0; phase < untiled; ++phase)
      divide(op.items(phase, images),
             [&](int t, int64_t from, int64_t to) { run_op(call.profile, t, op, phase, frame, from, to); });
    if (defers) continue;  // the next group computes its sums
    if (group.unit > 0)
      divide(group.pixels * images / group.unit, [&](int t, int64_t from, int64_t to) {
        run_tiles(group, call, images, worker.arena, t, from * group.unit, to * group.unit);
      });
    cost = 0;
  }
}

// The last phase of a group for the pixels [begin, end) of all images, on a thread.
void Graph::run_tiles(const Group& group, const Call& call, int64_t images, uint8_t* arena, int thread, int64_t begin,
                      int64_t end) const {
  const Worker worker = this->worker(call.lease, thread);
  for (int64_t from = begin; from < end; from += group.tile) {
    const int64_t to = std::min(from + group.tile, end);
    // Operations address a pixel from the start of its value, of which only the tile exists.
    for (const Group::Local& l : group.locals)
      if (call.destinations[static_cast<size_t>(l.value)] == nullptr)
        worker.values[l.value] = reinterpret_cast<uint8_t*>(reinterpret_cast<uintptr_t>(worker.locals + l.at) -
                                                            static_cast<uintptr_t>(from * l.pixel_bytes));
    for (size_t i = group.first; i < group.end; ++i) {
      const Op& op = *ops_[i];
      const Frame frame{worker.values, arena + offsets_[values_.size() + i], images};
      const int64_t each = op.items_of_pixel();
      if (call.fused && group.fused && i == group.first) {
        run_timed(call.profile, thread, profile_index(op),
                  [&] { op.run_fused(frame, from / group.unit, to / group.unit); });
        ++i;
      } else if (call.fused && group.taken != group.end && i == group.first) {
        run_streamed(group, call, arena, images, thread, from / group.unit, to / group.unit);
        run_taken(group, call, frame, thread, from, to);
      } else if (each > 0) {
        run_op(call.profile, thread, op, op.phases() - 1, frame, from * each, to * each);
      } else {
        run_op(call.profile, thread, op, op.phases() - 1, frame, from / group.unit, to / group.unit);
      }
    }
  }
}

// Items [begin, end) of a maximum pooling, over sums of the group before that are computed as they are needed: the rows
// of an item's windows exist, in the thread's window; those that it shares with the item before are moved up.
void Graph::run_streamed(const Group& group, const Call& call, uint8_t* arena, int64_t images, int thread,
                         int64_t begin, int64_t end) const {
  const Worker worker = this->worker(call.lease, thread);
  const size_t maker = group.first - 2;  // its sums, then the requantization that is left out
  const Op &pooling = *ops_[group.first], &sums = *ops_[maker];
  const Frame frame{worker.values, arena + offsets_[values_.size() + maker], images};
  const int64_t bytes = row_bytes(group), width = values_[static_cast<size_t>(sums.output)].shape.w;
  const int64_t each = sums.items_of_pixel();
  const auto items = [&](int64_t row) { return each > 0 ? row * width * each : row * width / sums.pixels_of_item(); };
  uint8_t* window = worker.locals + group.at;
  Rows held{0, 0};
  for (int64_t item = begin; item < end; ++item) {
    const Rows rows = pooling.rows_read(item);
    const int64_t kept = rows.begin >= held.begin ? std::max<int64_t>(held.end - rows.begin, 0) : 0;
    std::memmove(window, window + (held.end - held.begin - kept) * bytes, static_cast<size_t>(kept * bytes));
    // Rows are addressed from the start of the value, of which only these exist.
    worker.values[sums.output] = worker.values[ops_[group.taken]->output] =
        reinterpret_cast<uint8_t*>(reinterpret_cast<uintptr_t>(window) - static_cast<uintptr_t>(rows.begin * bytes));
    if (rows.begin + kept < rows.end)
      run_op(call.profile, thread, sums, sums.phases() - 1, frame, items(rows.begin + kept), items(rows.end));
    run_op(call.profile, thread, pooling, 0, frame, item, item + 1);
    held = rows;
  }
}

// The requantization that the group before has left, of the maxima of pixels [begin, end), in place.
void Graph::run_taken(const Group& group, const Call& call, const Frame& frame, int thread, int64_t begin,
                      int64_t end) const {
  const Op& op = *ops_[group.taken];
  uint8_t *&x = frame.values[op.inputs[0]], *&y = frame.values[op.output];
  uint8_t *const before_x = x, *const before_y = y;
  x = y = frame.values[ops_[group.first]->output];
  run_op(call.profile, thread, op, 0, frame, begin, end);
  x = before_x, y = before_y;
}

}  // namespace bitstrata
