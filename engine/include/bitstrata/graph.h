// A graph of integer operations over NHWC tensors, built one operation at a time and then run on batches.
//
//   Graph g("", 1);
//   int x = g.input({32, 32, 3}, DType::u8, 0, 255);
//   int y = g.conv("stem", x, {...});
//   g.finish(y);
//   g.run(pixels, batch, destinations);
//
// Everything given is checked when it is given: std::invalid_argument names the operation, the argument and the cause.
// A finished graph is immutable; `run` may be called from several threads at once.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "bitstrata/kernels.h"
#include "bitstrata/resources.h"
#include "bitstrata/types.h"

namespace bitstrata {

class Lease;
class Op;
class Profile;
struct Made;
struct OpWork;
struct Operand;
struct Frame;

struct ConvParams {
  const int8_t* codes;          // (out, in / groups, kernel_h, kernel_w), copied
  std::array<int64_t, 4> dims;  // of codes
  const int32_t* pad_code;      // (in,), copied
  int64_t pad_codes;            // length of pad_code
  int64_t mul, add;
  Pair stride;
  Sides padding;
  Pair dilation;
  int64_t groups;
  std::string kernel = {};  // one of conv_kernels; empty: the row's own choice
};

struct RequantParams {
  const int32_t* multiplier;  // (channels,), copied, as are the next two
  const int64_t* bias;
  const uint8_t* shift;
  int64_t channels;
  int64_t lo, hi;
  DType dtype;  // of the result
};

// out = base[c] + sign[c] * (number of j with x > after[j][c]), of i32 to codes.
struct ThresholdParams {
  const int32_t* after;  // (levels, channels), copied, as are the next two
  const int8_t* sign;    // (channels,), 1 or -1
  const int32_t* base;   // (channels,)
  int64_t levels, channels;
  DType dtype;  // of the result
};

// out = table[min(max(x - first, 0), entries - 1)][c], of i32 to any type.
struct TableParams {
  const int32_t* table;  // (entries, channels), copied
  int64_t entries, channels;
  int32_t first;
  DType dtype;  // of the result
};

struct PoolParams {
  Pair kernel, stride;
  Sides padding;
};

class Graph {
 public:
  // isa: see select_kernels. threads: 1..256; more than one starts threads - 1 workers, of this graph's own.
  Graph(const std::string& isa, int threads);
  // With threads and memory that it shares with other graphs.
  Graph(const std::string& isa, std::shared_ptr<Resources> resources);
  ~Graph();
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  // Each adds an operation and returns the index of its result. `name` is for messages.
  int input(Shape shape, DType dtype, int64_t lo, int64_t hi);  // exactly once, first
  int conv(const std::string& name, int x, const ConvParams& p);
  int requant(const std::string& name, int x, const RequantParams& p);
  int thresholds(const std::string& name, int x, const ThresholdParams& p);
  int table(const std::string& name, int x, const TableParams& p);
  int add(const std::string& name, int a, int b, int64_t shift_a, int64_t shift_b);
  int clip(const std::string& name, int x, int64_t lo, int64_t hi);
  int max_pool(const std::string& name, int x, const PoolParams& p);
  int sum_pool(const std::string& name, int x, const PoolParams& p, int64_t shift);
  int sum_codes(const std::string& name, int x, const PoolParams& p);  // plain sums of u8 or s8, in that type
  int slice(const std::string& name, int x, Triple h, Triple w, Triple c);
  int pad(const std::string& name, int x, Pair h, Pair w, Pair c);
  int flatten(const std::string& name, int x);

  // Names of the kernels that can compute the convolution which makes the value, the row's own choice first; none for
  // other operations.
  std::vector<std::string> conv_kernels(int index) const;

  // What the values of a tile may occupy together, 4 KiB to 64 MiB; before `finish`. Results do not depend on it.
  void tile_bytes(int64_t bytes);

  // Closes the graph: lays out its memory, reserves it for one caller and allows `run`.
  void finish(int output);

  // destinations[v], if not null, receives value v: batch images of value(v). Other values live in the arena while
  // they are needed. Throws std::invalid_argument if an input element is outside the input's bounds.
  // With a profile, of as many operations and threads, it adds the run's times to that.
  void run(const void* input, int64_t batch, const std::vector<void*>& destinations, Profile* profile = nullptr) const;
  // The same on the caller's thread, in the caller's memory: run_bytes() bytes, aligned to 64.
  void run_in(void* memory, const void* input, int64_t batch, const std::vector<void*>& destinations) const;
  // The same for the output alone; in the caller's memory, these allocate nothing.
  void run(const void* input, int64_t batch, void* output) const;
  void run_in(void* memory, const void* input, int64_t batch, void* output) const;

  const Value& value(int index) const;
  const char* kernel(int index) const;  // name of the convolution kernel that computes the value, or ""
  OpWork work(int index) const;         // of the operation that computes the value, which is not the input
  int values() const { return static_cast<int>(values_.size()); }
  int output() const { return output_; }
  const char* isa() const { return kernels_.isa; }
  int threads() const { return resources_->threads(); }
  int64_t chunk() const { return chunk_; }                             // images that pass through the graph together
  int64_t arena_bytes() const { return arena_bytes_ + local_bytes_; }  // of one thread
  int64_t run_bytes() const;                                           // the same with what finds its values
  int64_t constant_bytes() const;                                      // packed weights and other constants

 private:
  struct Worker;
  struct Group;
  // Where values go: a table of all, or the output alone.
  struct Destinations {
    void* const* table;
    size_t output;
    void* only;
    size_t values;
    bool output_alone() const;
    void* operator[](size_t v) const { return table != nullptr ? table[v] : v == output ? only : nullptr; }
  };
  struct Call {
    const Lease& lease;
    const uint8_t* input;
    int64_t batch;
    const Destinations& destinations;
    int threads;       // of the lease
    bool share_rows;   // all threads work on the same images
    Profile* profile;  // or null
    bool fused;        // nobody wants what lies between
  };

  Operand operand(const std::string& name, int index) const;
  int append(const std::string& name, Made made);
  size_t place(int value) const;
  void bring_readers_forward();
  void form_groups(int output);
  void find_locals(int output, Group* group);
  void find_fusions(int output);
  void find_deferred(int output, Group* group, Group* next);
  bool read_once(size_t i, int value, int output) const;
  void lay_out_locals(int64_t images, Group* group);
  void lay_out_arena(int output, int64_t images);
  Destinations all(const std::vector<void*>& destinations) const;
  Destinations only(void* output) const;
  void run_on_lease(const void* input, int64_t batch, const Destinations& destinations, Profile* profile) const;
  void run_in_memory(void* memory, const void* input, int64_t batch, const Destinations& destinations) const;
  void check_run(const void* input, int64_t batch) const;
  void check_input(const void* input, int64_t batch) const;
  Worker worker(const Lease& lease, int thread) const;
  void run_batch(const Lease& lease, const void* input, int64_t batch, const Destinations& destinations,
                 Profile* profile) const;
  void run_chunk(const Call& call, int64_t begin, int64_t images, int thread) const;
  void run_taken(const Group& group, const Call& call, const Frame& frame, int thread, int64_t begin,
                 int64_t end) const;
  int64_t row_bytes(const Group& group) const;
  void run_streamed(const Group& group, const Call& call, uint8_t* arena, int64_t images, int thread, int64_t begin,
                    int64_t end) const;
  void run_tiles(const Group& group, const Call& call, int64_t images, uint8_t* arena, int thread, int64_t begin,
                 int64_t end) const;

  const Kernels& kernels_;
  const std::shared_ptr<Resources> resources_;
  int output_ = -1;
  int64_t tile_bytes_;
  std::vector<Value> values_;             // 0 is the input
  std::vector<std::unique_ptr<Op>> ops_;  // in the order they run in, which `finish` decides; until then i makes i + 1
  int64_t chunk_ = 1;                     // images that pass through the graph together
  int64_t arena_bytes_ = 0;
  int64_t local_bytes_ = 0;       // of a thread: the largest group's tile
  std::vector<Group> groups_;     // of successive operations, run tile by tile
  std::vector<int64_t> offsets_;  // in the arena: of each value, then of each operation's scratch
};

}  // namespace bitstrata
