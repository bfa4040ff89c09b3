#include "bitstrata/graph.h"

#include <algorithm>

#include "aligned.h"
#include "bitstrata/dispatch.h"
#include "bitstrata/profile.h"
#include "checks.h"
#include "graph_parts.h"
#include "ops.h"

namespace bitstrata {
namespace {

constexpr int64_t kTileBytes = 48 << 10;  // of a tile's values, unless told otherwise
constexpr int64_t kLeastTileBytes = 4 << 10, kMostTileBytes = 64 << 20;

}  // namespace

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
  return index == 0 ? "" : ops_[place(index)]->kernel();
}

std::vector<std::string> Graph::conv_kernels(int index) const {
  value(index);
  return index == 0 ? std::vector<std::string>() : ops_[place(index)]->kernels(kernels_);
}

// Of the operation that computes the value.
size_t Graph::place(int value) const {
  size_t i = 0;
  while (ops_[i]->output != value) ++i;  // they are in another order than they were added in
  return i;
}

void Graph::tile_bytes(int64_t bytes) {
  if (output_ >= 0) fail("graph", "it is finished already");
  tile_bytes_ = check_range("graph", "tile_bytes", bytes, kLeastTileBytes, kMostTileBytes);
}

Operand Graph::operand(const std::string& name, int index) const {
  if (index < 0 || index >= values())
    fail(name, "input value " + str(index) + " does not exist yet, the graph has " + str(values()));
  const size_t i = static_cast<size_t>(index);
  return {index, values_[i], i == 0 ? nullptr : ops_[i - 1].get()};
}

OpWork Graph::work(int index) const {
  value(index);
  if (index == 0) throw std::invalid_argument("value 0 is the input, which no operation computes");
  const size_t i = place(index);
  const Op& op = *ops_[i];
  OpWork work{};
  work.operations = op.operations();
  work.peak = op.peak();
  work.passes = op.passes();
  work.output_bytes = values_[static_cast<size_t>(index)].bytes();
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
int Graph::thresholds(const std::string& name, int x, const ThresholdParams& p) {
  return append(name, make_thresholds(name, operand(name, x), values(), p));
}
int Graph::table(const std::string& name, int x, const TableParams& p) {
  return append(name, make_table(name, operand(name, x), values(), p));
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

int64_t Graph::run_bytes() const {
  return align_up(static_cast<int64_t>(values_.size() * sizeof(uint8_t*))) + align_up(local_bytes_) +
         align_up(arena_bytes_);
}

int64_t Graph::constant_bytes() const {
  int64_t bytes = 0;
  for (const auto& op : ops_) bytes += op->constant_bytes();
  return bytes;
}

}  // namespace bitstrata
