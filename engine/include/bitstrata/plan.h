// A plan: the integer operations of a program at one choice of precisions, every constant resolved and proved not to
// overflow (spec/numerics.md).
//
//   Plan plan = derive(program, select(program, 2));
//   Graph graph("", 1);
//   build(plan, &graph);
//
// Tensors are NHWC. An operation computes the value of the same index as its own, plus one: value 0 is the input.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "bitstrata/graph.h"
#include "bitstrata/program.h"
#include "bitstrata/types.h"

namespace bitstrata {

// A tensor of the plan. dtype, lo and hi as of a graph's value: lo and hi are proved bounds of its integers.
struct PlanValue {
  std::string name;
  Value value;
  bool scaled = false;  // has a scale; codes and accumulators have none
  double scale = 0;     // real value of one unit
};

// acc = sum over the window of (mul * (codes >> code_shift) + add) * x, x = pad_code outside the map.
struct PlanConv {
  int layer;
  std::shared_ptr<const std::vector<int8_t>> codes;  // as they are held, of `dims`
  int code_shift;                                    // from the bits held to the bits in use
  std::array<int64_t, 4> dims;
  int64_t mul, add;
  Pair stride;
  Sides padding;
  Pair dilation;
  int64_t groups;
  std::vector<int32_t> pad_code;  // (input channels,)
};

// out = clamp((x * multiplier + bias) >> shift, lo, hi) a channel, in int64: codes or fixed point, as the value says.
struct PlanRequant {
  std::vector<int32_t> multiplier;
  std::vector<int64_t> bias;
  std::vector<uint8_t> shift;
  int64_t lo, hi;
};

struct PlanAdd {
  int64_t shift_a, shift_b;
};
struct PlanClip {
  int64_t lo, hi;
};
struct PlanMaxPool {
  PoolParams window;
};
// out = (sum over the window + half) >> shift; of codes their sum, in their own type, with shift 0.
struct PlanSumPool {
  PoolParams window;
  int64_t shift;
};
struct PlanSlice {
  Triple h, w, c;
};
struct PlanPad {
  Pair h, w, c;
};
struct PlanFlatten {};

using PlanOperation =
    std::variant<PlanConv, PlanRequant, PlanAdd, PlanClip, PlanMaxPool, PlanSumPool, PlanSlice, PlanPad, PlanFlatten>;

struct PlanOp {
  std::vector<int> inputs;  // values
  PlanOperation operation;
};

struct Plan {
  std::vector<PlanValue> values;
  std::vector<PlanOp> ops;
  int output = -1;                   // value
  double input_step = 0;             // input value = step * (code + offset)
  std::vector<double> input_offset;  // one, or one an input channel
};

// The plan of `program` at `selection`; its convolutions share the codes that the program holds. Throws ArtifactError:
// request if the weights or factors that the selection needs are not held; program if layers that share codes disagree
// on them at the selection, or if an accumulator or a constant would not fit ("accumulator overflow", ...).
Plan derive(const Program& program, const Selection& selection);

// Adds the plan's operations to an empty graph and finishes it.
void build(const Plan& plan, Graph* graph);

}  // namespace bitstrata
