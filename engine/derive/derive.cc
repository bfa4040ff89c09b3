#include <algorithm>
#include <cmath>

#include "bitstrata/error.h"
#include "bitstrata/plan.h"
#include "intervals.h"

namespace bitstrata {
namespace {

constexpr double kLeastScale = 1e-30;

// What a node's result is, beside its bounds.
struct Result {
  DType dtype;
  bool scaled;
  double scale;
};

// y = a * x + b, a channel.
struct Line {
  std::vector<double> a, b;
};

DType code_type(const LayerPrecision& p) { return p.input_low >= 0 ? DType::u8 : DType::s8; }

bool any(const Sides& sides) {
  return std::any_of(sides.begin(), sides.end(), [](int64_t n) { return n > 0; });
}

// f of a scale 2^-f.
int exponent_of(const PlanValue& v) {
  int exponent;
  std::frexp(v.scaled ? v.scale : 1.0, &exponent);
  return 1 - exponent;
}

// The largest real magnitude of a clipped line over `bounds`, and of its gains: clipping can leave a channel far
// narrower than a unit of its input. NaN if anything is.
double largest_real(const Line& line, const Bounds& bounds, const RealClip& clip) {
  double largest = 0;
  const auto take = [&](double v) {
    if (!(std::fabs(v) <= largest)) largest = std::isnan(largest) ? largest : std::fabs(v);
  };
  for (size_t c = 0; c < line.a.size(); ++c) {
    for (const int64_t end : {bounds.lo[c], bounds.hi[c]}) {
      double y = line.a[c] * static_cast<double>(end) + line.b[c];
      if (clip.has_low && y < clip.low) y = clip.low;
      if (clip.has_high && y > clip.high) y = clip.high;
      take(y);
    }
    take(line.a[c]);
  }
  return largest;
}

class Derivation {
 public:
  Derivation(const Program& program, const Selection& selection) : program_(program), selection_(selection) {}

  Plan run() {
    check_shared_codes(program_, selection_.map);
    for (node_ = 0; node_ < program_.nodes.size(); ++node_)
      std::visit([this](const auto& attributes) { add(attributes); }, program_.nodes[node_].attributes);
    const auto entry = static_cast<size_t>(program_.input);
    plan_.output = program_.output;
    plan_.input_step = step(program_.values[entry].layer);
    plan_.input_offset = at(program_.values[entry].layer).input_offset;
    return std::move(plan_);
  }

 private:
  // What the program holds at the precisions chosen

  const Node& node() const { return program_.nodes[node_]; }
  const Layer& layer(int index) const { return program_.layers[static_cast<size_t>(index)]; }
  int precision(int layer) const {
    return program_.precisions[static_cast<size_t>(selection_.map[static_cast<size_t>(layer)])];
  }
  const LayerPrecision& at(int index) const {
    return layer(index).at[static_cast<size_t>(selection_.map[static_cast<size_t>(index)])];
  }
  std::string where() const { return "node '" + node().name + "' (" + name_of(node().attributes) + ")"; }

  const Factors& factors(int layer) const {
    const auto& held = program_.factors[static_cast<size_t>(selection_.map[static_cast<size_t>(layer)])];
    if (!held)
      throw ArtifactError(ArtifactError::Kind::request, "",
                          "layer '" + program_.layers[static_cast<size_t>(layer)].name +
                              "': the factors of precision " + std::to_string(precision(layer)) + " are not held");
    return *held;
  }

  double step(int layer) const { return factors(layer).step(layer); }

  Factors::Line affine(int index) const {
    if (selection_.plan >= 0) {
      const auto& held = program_.factors[static_cast<size_t>(program_.factors_of_plan(selection_.plan))];
      if (!held)
        throw ArtifactError(
            ArtifactError::Kind::request, "",
            "plan '" + program_.plans[static_cast<size_t>(selection_.plan)].name + "': its factors are not held");
      const Factors::Line line = held->line(index);
      if (line.mul != nullptr) return line;
    }
    return factors(program_.affines[static_cast<size_t>(index)].owner).line(index);
  }

  // Section 3: (a, b) of y = a * x + b for this node's input after the affines.
  Line line(const std::vector<int>& affines) const {
    const PlanValue& x = value(0);
    const auto channels = static_cast<size_t>(x.value.shape.c);
    Line line{std::vector<double>(channels, x.scaled ? x.scale : 1.0), std::vector<double>(channels, 0.0)};
    for (const int index : affines) {
      const Factors::Line next = affine(index);
      for (size_t c = 0; c < channels; ++c) {
        line.a[c] = next.mul[c] * line.a[c];
        line.b[c] = next.mul[c] * line.b[c] + next.add[c];
      }
    }
    return line;
  }

  // The plan as far as it is built

  size_t input(size_t which) const { return static_cast<size_t>(node().inputs[which]); }
  const PlanValue& value(size_t which) const { return plan_.values[input(which)]; }
  const Bounds& bounds(size_t which) const { return bounds_[input(which)]; }
  Result as_input() const { return {value(0).value.dtype, value(0).scaled, value(0).scale}; }

  void store_value(Bounds bounds, const Result& result) {
    const Value value{program_.values[node_].shape, result.dtype, static_cast<int32_t>(bounds.least()),
                      static_cast<int32_t>(bounds.most())};
    plan_.values.push_back({node().name, value, result.scaled, result.scale});
    bounds_.push_back(std::move(bounds));
  }

  void store(Bounds bounds, const Result& result, PlanOperation operation) {
    store_value(std::move(bounds), result);
    plan_.ops.push_back({node().inputs, std::move(operation)});
  }

  // Operations

  void add(const InputNode&) {
    const NodeValue& info = program_.values[node_];
    const LayerPrecision& p = at(info.layer);
    const auto channels = static_cast<size_t>(info.shape.c);
    store_value({std::vector<int64_t>(channels, p.input_low), std::vector<int64_t>(channels, p.input_high)},
                {code_type(p), false, 0});
  }

  void add(const ConvNode& n) {
    const Layer& l = layer(n.layer);
    const LayerPrecision& p = at(n.layer);
    const Weights& held = program_.weights[static_cast<size_t>(n.layer)];
    if (p.weight_bits > held.bits)
      throw ArtifactError(ArtifactError::Kind::request, "",
                          "layer '" + l.name + "': precision " + std::to_string(precision(n.layer)) + " needs " +
                              std::to_string(p.weight_bits) + " bits of its weight codes, " +
                              std::to_string(held.bits) + " are held");
    const auto channels = static_cast<size_t>(value(0).value.shape.c);
    std::vector<int32_t> pad_code(p.pad_code.begin(), p.pad_code.end());
    if (pad_code.size() == 1) pad_code.resize(channels, pad_code[0]);
    Bounds inputs = bounds(0);
    for (size_t c = 0; any(n.padding) && c < channels; ++c) {
      inputs.lo[c] = std::min<int64_t>(inputs.lo[c], pad_code[c]);
      inputs.hi[c] = std::max<int64_t>(inputs.hi[c], pad_code[c]);
    }
    const int shift = held.bits - p.weight_bits;
    Bounds result = conv_bounds(
        {held.codes->data(), shift, p.mul, p.add, l.dims[0], l.dims[1], l.dims[2] * l.dims[3], n.groups}, inputs);
    check_accumulators(n.layer, result);
    store(std::move(result), {DType::i32, false, 0},
          PlanConv{n.layer, held.codes, shift, l.dims, p.mul, p.add, n.stride, n.padding, n.dilation, n.groups,
                   std::move(pad_code)});
  }

  void check_accumulators(int index, const Bounds& found) const {
    size_t worst = 0;
    for (size_t c = 1; c < found.channels(); ++c)
      if (magnitude(found, c) > magnitude(found, worst)) worst = c;
    if (magnitude(found, worst) > kInt32Max)
      refuse(where(), "accumulator overflow: layer '" + layer(index).name + "' at precision " +
                          std::to_string(precision(index)) + " can reach [" + std::to_string(found.lo[worst]) + ", " +
                          std::to_string(found.hi[worst]) + "] in output channel " + std::to_string(worst) +
                          ", beyond 32 bits");
  }

  void add(const RequantNode& n) {
    const LayerPrecision& p = at(n.layer);
    const double to = step(n.layer), offset = p.input_offset[0];  // of an inner layer it is one
    const Interval limits = code_clamp(n.clip, to, offset, {p.input_low, p.input_high});
    store_requant(line(n.affines), to, offset, limits, {code_type(p), false, 0});
  }

  void add(const RescaleNode& n) {
    Line y = line(n.affines);
    const double largest = largest_real(y, bounds(0), n.clip);
    const double unit = std::ldexp(1.0, -fraction_bits(largest, where()));
    const Interval limits = clamp_range(n.clip, unit, {-kInt32Max, kInt32Max}, where());
    store_requant(std::move(y), unit, 0.0, limits, {DType::i32, true, unit});
  }

  // Section 3, common to requant and rescale.
  void store_requant(Line y, double to, double offset, Interval limits, const Result& result) {
    for (size_t c = 0; c < y.a.size(); ++c) {
      y.a[c] = y.a[c] / to;
      y.b[c] = y.b[c] / to - offset;
    }
    RequantConstants k = requant_constants(y.a, y.b, bounds(0), where());
    Bounds image = requant_image(k, bounds(0), limits);
    store(std::move(image), result,
          PlanRequant{std::move(k.multiplier), std::move(k.bias), std::move(k.shift), limits.lo, limits.hi});
  }

  // Section 4: both inputs come to one power-of-two scale, the finest that the sum's bound allows.
  void add(const AddNode&) {
    double largest = 0;
    const double scale_a = value(0).scaled ? value(0).scale : 1.0, scale_b = value(1).scaled ? value(1).scale : 1.0;
    for (size_t c = 0; c < bounds(0).channels(); ++c) {
      const double a = static_cast<double>(magnitude(bounds(0), c)) * scale_a;
      const double b = static_cast<double>(magnitude(bounds(1), c)) * scale_b;
      largest = std::max(largest, a + b);
    }
    const int places_a = exponent_of(value(0)), places_b = exponent_of(value(1));
    const int f = std::min(std::max(places_a, places_b), fraction_bits(largest, where()));
    const int shift_a = places_a - f, shift_b = places_b - f;
    if (f < 0 || std::max(std::abs(shift_a), std::abs(shift_b)) > 62)
      refuse(where(), "scales 2^-" + std::to_string(places_a) + " and 2^-" + std::to_string(places_b) +
                          " cannot be brought to one scale");
    Bounds sum = align_bounds(bounds(0), shift_a);
    const Bounds other = align_bounds(bounds(1), shift_b);
    for (size_t c = 0; c < sum.channels(); ++c) {
      sum.lo[c] += other.lo[c];
      sum.hi[c] += other.hi[c];
    }
    store(std::move(sum), {DType::i32, true, std::ldexp(1.0, -f)}, PlanAdd{shift_a, shift_b});
  }

  void add(const ClipNode& n) {
    const double unit = value(0).scaled ? value(0).scale : 1.0;
    const Interval limits = clamp_range(n.clip, unit, {-kInt32Max - 1, kInt32Max}, where());
    store(clamp_bounds(bounds(0), limits), as_input(), PlanClip{limits.lo, limits.hi});
  }

  void add(const MaxPoolNode& n) { store(bounds(0), as_input(), PlanMaxPool{{n.kernel, n.stride, n.padding}}); }

  void add(const AvgPoolNode& n) {
    const int64_t window = n.kernel[0] * n.kernel[1];
    Bounds sums = any(n.padding) ? join(bounds(0), 0) : bounds(0);
    for (size_t c = 0; c < sums.channels(); ++c) {
      sums.lo[c] *= window;
      sums.hi[c] *= window;
    }
    const PoolParams pool{n.kernel, n.stride, n.padding};
    if (program_.values[node_].kind == NodeValue::Kind::code) {
      check_code_sums(sums);
      store(std::move(sums), as_input(), PlanSumPool{pool, 0});
      return;
    }
    int shift = 0;
    while (align_value(sums.least(), shift) < -kInt32Max || align_value(sums.most(), shift) > kInt32Max) ++shift;
    const double scale = std::ldexp(value(0).scaled ? value(0).scale : 1.0, shift) / static_cast<double>(window);
    if (scale < kLeastScale)
      refuse(where(), "the scale of the result, " + str(scale) + ", is below " + str(kLeastScale));
    store(align_bounds(std::move(sums), shift), {DType::i32, true, scale}, PlanSumPool{pool, shift});
  }

  // Section 4: sums of codes stay in the codes' own 8 bits.
  void check_code_sums(const Bounds& sums) const {
    const DType type = value(0).value.dtype;
    if (sums.least() < lowest(type) || sums.most() > highest(type))
      refuse(where(), "sums of codes can reach [" + std::to_string(sums.least()) + ", " + std::to_string(sums.most()) +
                          "], beyond the range [" + std::to_string(lowest(type)) + ", " +
                          std::to_string(highest(type)) + "] of " + name_of(type) +
                          "; pool fixed point instead, or fewer codes");
  }

  void add(const SliceNode& n) {
    Bounds kept;
    for (int64_t c = n.c[0]; c < n.c[1]; c += n.c[2]) {
      kept.lo.push_back(bounds(0).lo[static_cast<size_t>(c)]);
      kept.hi.push_back(bounds(0).hi[static_cast<size_t>(c)]);
    }
    store(std::move(kept), as_input(), PlanSlice{n.h, n.w, n.c});
  }

  void add(const PadNode& n) {
    Bounds padded = join(bounds(0), 0);
    for (std::vector<int64_t>* ends : {&padded.lo, &padded.hi}) {
      ends->insert(ends->begin(), static_cast<size_t>(n.c[0]), 0);
      ends->insert(ends->end(), static_cast<size_t>(n.c[1]), 0);
    }
    store(std::move(padded), as_input(), PlanPad{n.h, n.w, n.c});
  }

  void add(const FlattenNode&) {
    Bounds flat;
    const auto pixels = static_cast<size_t>(value(0).value.shape.pixels());
    for (size_t c = 0; c < bounds(0).channels(); ++c) {
      flat.lo.insert(flat.lo.end(), pixels, bounds(0).lo[c]);
      flat.hi.insert(flat.hi.end(), pixels, bounds(0).hi[c]);
    }
    store(std::move(flat), as_input(), PlanFlatten{});
  }

  const Program& program_;
  const Selection& selection_;
  size_t node_ = 0;
  Plan plan_;
  std::vector<Bounds> bounds_;  // of each value
};

}  // namespace

Plan derive(const Program& program, const Selection& selection) { return Derivation(program, selection).run(); }

}  // namespace bitstrata
