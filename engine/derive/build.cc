// From a plan to the engine's graph.
#include "bitstrata/error.h"
#include "bitstrata/plan.h"

namespace bitstrata {
namespace {

// Adds one operation after another; the results have the plan's indices.
class Builder {
 public:
  explicit Builder(Graph* graph) : graph_(*graph) {}

  void append(const PlanOp& op, const PlanValue& result) {
    op_ = &op;
    result_ = &result;
    std::visit([this](const auto& operation) { add(operation); }, op.operation);
  }

 private:
  const std::string& name() const { return result_->name; }
  int input() const { return op_->inputs[0]; }

  void add(const PlanConv& c) {
    const int8_t* codes = c.codes->data();
    if (c.code_shift > 0) {
      shifted_.resize(c.codes->size());
      for (size_t i = 0; i < shifted_.size(); ++i) shifted_[i] = static_cast<int8_t>(codes[i] >> c.code_shift);
      codes = shifted_.data();
    }
    graph_.conv(name(), input(),
                {codes, c.dims, c.pad_code.data(), static_cast<int64_t>(c.pad_code.size()), c.mul, c.add, c.stride,
                 c.padding, c.dilation, c.groups});
  }

  void add(const PlanRequant& r) {
    graph_.requant(name(), input(),
                   {r.multiplier.data(), r.bias.data(), r.shift.data(), static_cast<int64_t>(r.multiplier.size()), r.lo,
                    r.hi, result_->value.dtype});
  }

  void add(const PlanAdd& a) { graph_.add(name(), op_->inputs[0], op_->inputs[1], a.shift_a, a.shift_b); }
  void add(const PlanClip& c) { graph_.clip(name(), input(), c.lo, c.hi); }
  void add(const PlanMaxPool& p) { graph_.max_pool(name(), input(), p.window); }
  void add(const PlanSumPool& p) {
    if (result_->value.dtype == DType::i32)
      graph_.sum_pool(name(), input(), p.window, p.shift);
    else
      graph_.sum_codes(name(), input(), p.window);
  }
  void add(const PlanSlice& s) { graph_.slice(name(), input(), s.h, s.w, s.c); }
  void add(const PlanPad& p) { graph_.pad(name(), input(), p.h, p.w, p.c); }
  void add(const PlanFlatten&) { graph_.flatten(name(), input()); }

  Graph& graph_;
  const PlanOp* op_ = nullptr;
  const PlanValue* result_ = nullptr;
  std::vector<int8_t> shifted_;  // codes of one convolution, which packs its own copy
};

}  // namespace

void build(const Plan& plan, Graph* graph) {
  const Value& entry = plan.values[0].value;
  graph->input(entry.shape, entry.dtype, entry.lo, entry.hi);
  Builder builder(graph);
  for (size_t i = 0; i < plan.ops.size(); ++i) builder.append(plan.ops[i], plan.values[i + 1]);
  graph->finish(plan.output);
}

}  // namespace bitstrata
