#include "bitstrata/graph.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "aligned.h"
#include "arena.h"
#include "bitstrata/dispatch.h"
#include "checks.h"
#include "ops.h"
#include "thread_pool.h"

namespace bitstrata {
namespace {

constexpr int kMaxThreads = 256;
constexpr int64_t kChunkBytes = 256 << 10;  // what a chunk of images may occupy, to stay in the second-level cache
constexpr int64_t kMaxChunk = 64;
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

// What a thread needs to run a chunk.
struct Graph::Worker {
  AlignedBuffer arena;
  std::vector<uint8_t*> values;
};

Graph::Graph(const std::string& isa, int threads)
    : kernels_(select_kernels(isa)),
      threads_(static_cast<int>(check_range("graph", "threads", threads, 1, kMaxThreads))) {}

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

Operand Graph::operand(const std::string& name, int index) const {
  if (index < 0 || index >= values())
    fail(name, "input value " + str(index) + " does not exist yet, the graph has " + str(values()));
  return {index, values_[static_cast<size_t>(index)]};
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
  lay_out_arena(output, 1);
  chunk_ = std::clamp(kChunkBytes / std::max<int64_t>(arena_bytes_, 1), int64_t{1}, kMaxChunk);
  lay_out_arena(output, chunk_);
  workers_.resize(static_cast<size_t>(threads_));
  if (threads_ > 1) pool_ = std::make_unique<ThreadPool>(threads_);
  output_ = output;
}

// Buffers: the values, then the operations' scratch. Input and output are the caller's.
void Graph::lay_out_arena(int output, int64_t images) {
  std::vector<Lifetime> buffers;
  for (const Value& v : values_) buffers.push_back({v.bytes() * images, 0, 0});
  for (int i = 0; i < static_cast<int>(ops_.size()); ++i) {
    const Op& op = *ops_[static_cast<size_t>(i)];
    Lifetime& result = buffers[static_cast<size_t>(op.output)];
    result.first = result.last = i;
    for (int x : op.inputs) buffers[static_cast<size_t>(x)].last = i;
    buffers.push_back({op.scratch_bytes(images), i, i});
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

void Graph::run(const void* input, int64_t batch, const std::vector<void*>& destinations) {
  if (output_ < 0) throw std::invalid_argument("run: the graph is not finished");
  if (destinations.size() != values_.size() || destinations[static_cast<size_t>(output_)] == nullptr)
    throw std::invalid_argument("run: destinations need one entry a value, and one for the output");
  if (batch == 0) return;
  check_range("run", "batch", batch, 0, kMaxElements);
  check_input(input, batch);
  const Call call{static_cast<const uint8_t*>(input), batch, destinations};
  const std::lock_guard<std::mutex> turn(running_);
  const int64_t images = std::min(chunk_, (batch + threads_ - 1) / threads_);
  const int64_t chunks = (batch + images - 1) / images;
  const bool share_rows = threads_ > 1 && chunks < threads_;
  const int busy = share_rows ? 1 : threads_;
  for (int t = 0; t < busy; ++t) {
    Worker& worker = workers_[static_cast<size_t>(t)];
    if (worker.arena.data() == nullptr) worker.arena = AlignedBuffer(arena_bytes_);
    worker.values.resize(values_.size());
  }
  std::atomic<int64_t> next{0};
  const auto work = [&](int t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < chunks;)
      run_chunk(call, i * images, std::min(images, batch - i * images), workers_[static_cast<size_t>(t)], share_rows);
  };
  if (busy > 1)
    pool_->run(work);
  else
    work(0);
}

void Graph::run_chunk(const Call& call, int64_t begin, int64_t images, Worker& worker, bool share_rows) {
  for (size_t v = 0; v < values_.size(); ++v) {
    uint8_t* destination = static_cast<uint8_t*>(call.destinations[v]);
    worker.values[v] =
        destination != nullptr ? destination + begin * values_[v].bytes() : worker.arena.data() + offsets_[v];
  }
  const uint8_t* input = call.input + begin * values_[0].bytes();
  if (call.destinations[0] != nullptr)
    std::memcpy(worker.values[0], input, static_cast<size_t>(images * values_[0].bytes()));
  worker.values[0] = const_cast<uint8_t*>(input);  // operations only read their inputs
  for (size_t i = 0; i < ops_.size(); ++i) {
    const Op& op = *ops_[i];
    const Frame frame{worker.values.data(), worker.arena.data() + offsets_[values_.size() + i], images};
    const bool share = share_rows && op.cost() * images >= kSharedCost;
    for (int phase = 0; phase < op.phases(); ++phase) {
      const int64_t items = op.items(phase, images);
      if (share)
        pool_->run([&](int t) { op.run(phase, frame, items * t / threads_, items * (t + 1) / threads_); });
      else
        op.run(phase, frame, 0, items);
    }
  }
}

}  // namespace bitstrata
