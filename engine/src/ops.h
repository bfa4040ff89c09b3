// Operations of a graph. A maker checks everything it is given, so that running is free of checks.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bitstrata/graph.h"
#include "bounds.h"

namespace bitstrata {

// Where an operation finds its operands: values[v] points to `images` images of value v.
struct Frame {
  uint8_t** values;
  uint8_t* scratch;  // scratch_bytes(images), aligned
  int64_t images;
};

// A requantization, as far as others can take it over.
struct Part {
  enum Kind { other, rescale, codes } kind = other;
  const RequantArgs* requant = nullptr;  // rescale: from i32 to i32; codes: to 8 bits, all channels low or all high
};

// [begin, end).
struct Rows {
  int64_t begin, end;
};

class Op {
 public:
  Op(std::vector<int> inputs, int output) : inputs(std::move(inputs)), output(output) {}
  virtual ~Op() = default;

  // Work comes in phases, each a range of items over all images that may be cut anywhere; a phase starts when the one
  // before it is complete.
  virtual int phases() const { return 1; }
  virtual int64_t items(int phase, int64_t images) const = 0;
  virtual void run(int phase, const Frame& frame, int64_t begin, int64_t end) const = 0;
  // How many consecutive output pixels an item of the last phase computes; 0: items are something else.
  virtual int64_t pixels_of_item() const { return 0; }
  // How many items an output pixel is made of that depends on the same pixel of each input alone; 0: it does not.
  virtual int64_t items_of_pixel() const { return 0; }
  virtual int64_t scratch_bytes(int64_t /*images*/) const { return 0; }
  virtual int64_t cost() const = 0;  // of one image, in elements moved: decides whether to share the work
  virtual const char* kernel() const { return ""; }
  virtual std::vector<std::string> kernels(const Kernels&) const { return {}; }  // that could compute the same
  virtual int64_t constant_bytes() const { return 0; }  // weights as the kernel reads them, tables
  // For the profiler: see OpWork.
  virtual int64_t operations() const { return cost(); }
  virtual int64_t read_bytes(int64_t input_bytes) const { return input_bytes; }
  virtual const PeakLoop* peak() const { return nullptr; }
  virtual double passes() const { return 1; }
  // Of each channel of the result, if more is proved than the Value says; else empty.
  virtual std::vector<Bounds> bounds() const { return {}; }

  // What the operation is to those that may run it together with others.
  virtual Part part() const { return {}; }
  virtual bool takes_maximum() const { return false; }  // of windows of fixed point, all of which hold some
  // Rows of its one input, of all images, that item `item` is made of; only of operations that take a maximum.
  virtual Rows rows_read(int64_t /*item*/) const { return {0, 0}; }
  // Whether the last phase can be run together with `next`, an operation that alone reads the result. From then on
  // run_fused does that: it computes the result of `next`, and not its own.
  virtual bool fuse(const Op& /*next*/) { return false; }
  virtual void run_fused(const Frame& /*frame*/, int64_t /*begin*/, int64_t /*end*/) const {}

  const std::vector<int> inputs;
  const int output;
};

// An operation and what is known of its result.
struct Made {
  std::unique_ptr<Op> op;
  Value result;
};

// An operand: its index, what is known of it, and the operation whose result it is (null: the graph's input).
struct Operand {
  int index;
  const Value& value;
  const Op* op;
};

// `output` is the index the result will have.
Made make_conv(const Kernels&, const std::string& name, Operand x, int output, const ConvParams&);
Made make_requant(const Kernels&, const std::string& name, Operand x, int output, const RequantParams&);
Made make_thresholds(const std::string& name, Operand x, int output, const ThresholdParams&);
Made make_table(const std::string& name, Operand x, int output, const TableParams&);
Made make_add(const Kernels&, const std::string& name, Operand a, Operand b, int output, int64_t shift_a,
              int64_t shift_b);
Made make_clip(const Kernels&, const std::string& name, Operand x, int output, int64_t lo, int64_t hi);
Made make_max_pool(const Kernels&, const std::string& name, Operand x, int output, const PoolParams&);
Made make_sum_pool(const Kernels&, const std::string& name, Operand x, int output, const PoolParams&, int64_t shift);
Made make_sum_codes(const Kernels&, const std::string& name, Operand x, int output, const PoolParams&);
Made make_slice(const std::string& name, Operand x, int output, Triple h, Triple w, Triple c);
Made make_pad(const std::string& name, Operand x, int output, Pair h, Pair w, Pair c);
Made make_flatten(const std::string& name, Operand x, int output);

}  // namespace bitstrata
