#include "bitstrata/graph.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "aligned.h"
#include "arena.h"
#include "bitstrata/dispatch.h"
#include "checks.h"
#include "lease.h"
#include "ops.h"
#include "timed.h"

namespace bitstrata {
namespace {

constexpr int64_t kChunkBytes = 256 << 10;  // what a chunk of images may occupy, to stay in the second-level cache
constexpr int64_t kMaxChunk = 64;
constexpr int64_t kTileBytes = 48 << 10;  // of a tile's values, unless told otherwise
constexpr int64_t kLeastTileBytes = 4 << 10, kMostTileBytes = 64 << 20;
constexpr int64_t kLeastTile = 64;        // pixels, over which a convolution's weights are read once
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

// Where a thread has what it needs to run a chunk, all in the memory that is leased for it.
struct Graph::Worker {
  uint8_t** values;
  uint8_t* locals;  // of the group that runs
  uint8_t* arena;   // values and scratch, of this thread's images or, where threads share images, of all
};

// Operations that are run one after the other on a tile of pixels while it is in the cache, then on the next tile: one
// that computes pixels in order, and those after it that compute each pixel from the same pixel of their inputs.
struct Graph::Group {
  struct Local {
    int value;
    int64_t pixel_bytes;
    int last;    // operation that reads it
    int64_t at;  // in the thread's buffer
  };
  size_t first, end;          // operations
  size_t fused;               // the operation that runs together with the next one; end: none
  int64_t pixels;             // of an image
  int64_t unit;               // pixels that the first operation computes at once; 0: it does not work in pixels
  std::vector<Local> locals;  // values that nothing outside reads: only a tile of them exists
  int64_t most;               // pixels of a tile, a multiple of the unit
  int64_t tile;               // the same, no more than there are
};

Graph::Graph(const std::string& isa, int threads) : Graph(isa, std::make_shared<Resources>(threads)) {}

Graph::Graph(const std::string& isa, std::shared_ptr<Resources> resources)
    : kernels_(select_kernels(isa)), resources_(std::move(resources)), tile_bytes_(kTileBytes) {}

Graph::~Graph() = default;

const Value& Graph::value(int index) const {
  if (index < 0 || index >= values())
    throw std::invalid_argument("value " + str(index) + " does not exist, the graph has " + str(values()));
  return values_[static_cast<size_t>(index)];
}

const char* Graph::kernel(int index) const {
  value(index);
  return index == 0 ? "" : ops_[static_cast<size_t>(index - 1)]->kernel();
}

std::vector<std::string> Graph::conv_kernels(int index) const {
  value(index);
  return index == 0 ? std::vector<std::string>() : ops_[static_cast<size_t>(index - 1)]->kernels(kernels_);
}

void Graph::tile_bytes(int64_t bytes) {
  if (output_ >= 0) fail("graph", "it is finished already");
  tile_bytes_ = check_range("graph", "tile_bytes", bytes, kLeastTileBytes, kMostTileBytes);
}

Operand Graph::operand(const std::string& name, int index) const {
  if (index < 0 || index >= values())
    fail(name, "input value " + str(index) + " does not exist yet, the graph has " + str(values()));
  return {index, values_[static_cast<size_t>(index)]};
}

OpWork Graph::work(int index) const {
  value(index);
  if (index == 0) throw std::invalid_argument("value 0 is the input, which no operation computes");
  const size_t i = static_cast<size_t>(index - 1);
  const Op& op = *ops_[i];
  OpWork work{};
  work.operations = op.operations();
  work.peak = op.peak();
  work.output_bytes = values_[i + 1].bytes();
  work.weight_bytes = op.constant_bytes();
  work.scratch_bytes = op.scratch_bytes(1);
  for (int x : op.inputs) work.input_bytes += values_[static_cast<size_t>(x)].bytes();
  work.input_bytes = op.read_bytes(work.input_bytes);
  while (static_cast<size_t>(work.group) < groups_.size() && groups_[static_cast<size_t>(work.group)].end <= i)
    ++work.group;
  if (groups_.empty()) return work;
  const Group& group = groups_[static_cast<size_t>(work.group)];
  for (const Group::Local& local : group.locals) {
    work.output_in_tile = work.output_in_tile || local.value == index;
    work.input_in_tile =
        work.input_in_tile || std::find(op.inputs.begin(), op.inputs.end(), local.value) != op.inputs.end();
  }
  return work;
}

int Graph::append(const std::string& name, Made made) {
  if (output_ >= 0) fail(name, "the graph is finished");
  ops_.push_back(std::move(made.op));
  values_.push_back(made.result);
  return values() - 1;
}

int Graph::input(Shape shape, DType dtype, int64_t lo, int64_t hi) {
  if (!values_.empty()) fail("input", "the graph has an input already");
  check_shape("input", "shape", shape);
  check_range("input", "lo", lo, lowest(dtype), highest(dtype));
  check_range("input", "hi", hi, lo, highest(dtype));
  values_.push_back({shape, dtype, static_cast<int32_t>(lo), static_cast<int32_t>(hi)});
  return 0;
}

int Graph::conv(const std::string& name, int x, const ConvParams& p) {
  return append(name, make_conv(kernels_, name, operand(name, x), values(), p));
}
int Graph::requant(const std::string& name, int x, const RequantParams& p) {
  return append(name, make_requant(kernels_, name, operand(name, x), values(), p));
}
int Graph::add(const std::string& name, int a, int b, int64_t shift_a, int64_t shift_b) {
  return append(name, make_add(kernels_, name, operand(name, a), operand(name, b), values(), shift_a, shift_b));
}
int Graph::clip(const std::string& name, int x, int64_t lo, int64_t hi) {
  return append(name, make_clip(kernels_, name, operand(name, x), values(), lo, hi));
}
int Graph::max_pool(const std::string& name, int x, const PoolParams& p) {
  return append(name, make_max_pool(kernels_, name, operand(name, x), values(), p));
}
int Graph::sum_pool(const std::string& name, int x, const PoolParams& p, int64_t shift) {
  return append(name, make_sum_pool(kernels_, name, operand(name, x), values(), p, shift));
}
int Graph::sum_codes(const std::string& name, int x, const PoolParams& p) {
  return append(name, make_sum_codes(kernels_, name, operand(name, x), values(), p));
}
int Graph::slice(const std::string& name, int x, Triple h, Triple w, Triple c) {
  return append(name, make_slice(name, operand(name, x), values(), h, w, c));
}
int Graph::pad(const std::string& name, int x, Pair h, Pair w, Pair c) {
  return append(name, make_pad(name, operand(name, x), values(), h, w, c));
}
int Graph::flatten(const std::string& name, int x) {
  return append(name, make_flatten(name, operand(name, x), values()));
}

void Graph::finish(int output) {
  if (output_ >= 0) fail("graph", "it is finished already");
  value(output);
  form_groups(output);
  lay_out_arena(output, 1);
  chunk_ = std::clamp(kChunkBytes / std::max<int64_t>(arena_bytes_, 1), int64_t{1}, kMaxChunk);
  lay_out_arena(output, chunk_);
  resources_->reserve(run_bytes());
  output_ = output;
}

int64_t Graph::run_bytes() const {
  return align_up(static_cast<int64_t>(values_.size() * sizeof(uint8_t*))) + align_up(local_bytes_) +
         align_up(arena_bytes_);
}

Graph::Worker Graph::worker(const Lease& lease, int thread) const {
  uint8_t* memory = lease.memory(thread);
  uint8_t* locals = memory + align_up(static_cast<int64_t>(values_.size() * sizeof(uint8_t*)));
  return {reinterpret_cast<uint8_t**>(memory), locals, locals + align_up(local_bytes_)};
}

int64_t Graph::constant_bytes() const {
  int64_t bytes = 0;
  for (const auto& op : ops_) bytes += op->constant_bytes();
  return bytes;
}

void Graph::form_groups(int output) {
  for (size_t i = 0; i < ops_.size(); ++i) {
    const Op& op = *ops_[i];
    const int64_t pixels = values_[i + 1].shape.pixels();
    if (op.items_of_pixel() > 0 && !groups_.empty() && groups_.back().unit > 0 && groups_.back().pixels == pixels)
      groups_.back().end = i + 1;
    else
      groups_.push_back({i, i + 1, i + 1, pixels, op.items_of_pixel() > 0 ? 1 : op.pixels_of_item(), {}, 0, 0});
  }
  for (Group& group : groups_) {
    find_locals(output, &group);
    find_fused(&group);
  }
}

// The first operation of a group and the second run as one where that is all that becomes of the first one's result.
void Graph::find_fused(Group* group) {
  group->fused = group->end;
  if (group->end - group->first < 2 || group->locals.empty()) return;
  const Group::Local& made = group->locals.front();
  const int second = static_cast<int>(group->first) + 1;
  if (made.value != second || made.last != second) return;  // operation i makes value i + 1
  for (size_t j = group->first + 2; j < group->end; ++j)
    for (int x : ops_[j]->inputs)
      if (x == made.value) return;
  if (ops_[group->first]->fuse(*ops_[group->first + 1])) group->fused = group->first;
}

void Graph::find_locals(int output, Group* group) {
  if (group->unit == 0) return;
  int64_t pixel_bytes = 1;
  for (size_t i = group->first; i < group->end; ++i) {
    const int v = static_cast<int>(i) + 1;
    const auto reads = [&](const auto& op) {
      return std::find(op->inputs.begin(), op->inputs.end(), v) != op->inputs.end();
    };
    const auto end = ops_.begin() + static_cast<std::ptrdiff_t>(group->end);
    if (v == output || std::any_of(end, ops_.end(), reads)) continue;
    int last = v - 1;
    for (size_t j = i + 1; j < group->end; ++j)
      if (reads(ops_[j])) last = static_cast<int>(j);
    group->locals.push_back({v, values_[i + 1].bytes() / group->pixels, last, 0});
    pixel_bytes += group->locals.back().pixel_bytes;
  }
  const int64_t wanted = std::max(tile_bytes_ / pixel_bytes, kLeastTile);
  group->most = (wanted + group->unit - 1) / group->unit * group->unit;
}

void Graph::lay_out_locals(int64_t images, Group* group) {
  group->tile = std::min(group->most, group->pixels * images);
  std::vector<Lifetime> buffers;
  for (const Group::Local& l : group->locals) buffers.push_back({l.pixel_bytes * group->tile, l.value - 1, l.last});
  const Layout layout = lay_out(buffers);
  for (size_t i = 0; i < buffers.size(); ++i) group->locals[i].at = layout.offset[i];
  local_bytes_ = std::max(local_bytes_, layout.bytes);
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
      Lifetime& result = buffers[static_cast<size_t>(op.output)];
      result.first = result.last = g;
      for (int x : op.inputs) buffers[static_cast<size_t>(x)].last = g;
      buffers.push_back({op.scratch_bytes(images), g, g});
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
  return {destinations.data(), 0, nullptr};
}

Graph::Destinations Graph::only(void* output) const { return {nullptr, static_cast<size_t>(output_), output}; }

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
  const Call call{lease, static_cast<const uint8_t*>(input), batch, destinations, threads, share_rows, profile};
  std::atomic<int64_t> next{0};
  const auto work = [&](int t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < chunks;)
      run_chunk(call, i * images, std::min(images, batch - i * images), t);
  };
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
  for (const Group& group : groups_) {
    int64_t cost = 0;
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
      divide(op.items(phase, images), [&](int t, int64_t from, int64_t to) {
        run_op(call.profile, t, group.first, op, phase, frame, from, to);
      });
    if (group.unit > 0)
      divide(group.pixels * images / group.unit, [&](int t, int64_t from, int64_t to) {
        run_tiles(group, call, images, worker.arena, t, from * group.unit, to * group.unit);
      });
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
      if (i == group.fused && call.destinations[static_cast<size_t>(op.output)] == nullptr) {
        run_timed(call.profile, thread, i, [&] { op.run_fused(frame, from / group.unit, to / group.unit); });
        ++i;
      } else if (each > 0)
        run_op(call.profile, thread, i, op, op.phases() - 1, frame, from * each, to * each);
      else
        run_op(call.profile, thread, i, op, op.phases() - 1, frame, from / group.unit, to / group.unit);
    }
  }
}

}  // namespace bitstrata
