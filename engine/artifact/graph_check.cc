#include "graph_check.h"

#include <algorithm>
#include <string>

#include "bitstrata/error.h"
#include "layout.h"
#include "shared_codes.h"

namespace bitstrata::artifact {

namespace {

using Kind = NodeValue::Kind;

constexpr int64_t kMaxChannels = int64_t{1} << 16;
constexpr int64_t kMaxValue = int64_t{1} << 28;  // elements, padding included
constexpr int64_t kMaxMacs = int64_t{1} << 40;   // of the whole program, an image

const char* name_of(Kind kind) { return kind == Kind::code ? "code" : kind == Kind::acc ? "acc" : "fixed"; }

std::string show(const Shape& s) {
  return "(" + std::to_string(s.c) + ", " + std::to_string(s.h) + ", " + std::to_string(s.w) + ")";
}

[[noreturn]] void fail(const std::string& message) {
  throw ArtifactError(ArtifactError::Kind::program, kManifest, message);
}

// Whether more than `limit` elements would be needed; a, b and c are below 2^40 and above 0.
bool exceeds(int64_t a, int64_t b, int64_t c, int64_t limit) {
  return a > limit || b > limit / a || c > limit / (a * b);
}

class Check {
 public:
  explicit Check(Program* program) : program_(*program) {}

  void nodes() {
    for (node_ = 0; node_ < program_.nodes.size(); ++node_) {
      check_inputs();
      const NodeValue found =
          std::visit([this](const auto& attributes) { return infer(attributes); }, node().attributes);
      const Shape& s = found.shape;
      if (s.c > kMaxChannels || exceeds(s.c, s.h, s.w, kMaxValue))
        wrong("result of shape " + show(s) + " exceeds " + std::to_string(kMaxChannels) + " channels or " +
              std::to_string(kMaxValue) + " elements");
      count_macs(found);
      program_.values.push_back(found);
    }
  }

 private:
  const Node& node() const { return program_.nodes[node_]; }
  const NodeValue& source(size_t which) const { return program_.values[node().inputs[which]]; }

  [[noreturn]] void wrong(const std::string& message) const {
    fail("node '" + node().name + "' (" + bitstrata::name_of(node().attributes) + "): " + message);
  }

  // How many inputs the operation takes, and of which kinds.
  void check_inputs() const {
    const NodeAttributes& a = node().attributes;
    const size_t count = std::holds_alternative<InputNode>(a) ? 0 : std::holds_alternative<AddNode>(a) ? 2 : 1;
    if (node().inputs.size() != count)
      wrong("takes " + std::to_string(count) + " inputs, has " + std::to_string(node().inputs.size()));
    const bool conv = std::holds_alternative<ConvNode>(a);
    const bool real = std::holds_alternative<RequantNode>(a) || std::holds_alternative<RescaleNode>(a);
    const bool fixed =
        std::holds_alternative<AddNode>(a) || std::holds_alternative<ClipNode>(a) || std::holds_alternative<PadNode>(a);
    for (size_t i = 0; i < count; ++i) {
      const Kind kind = source(i).kind;
      const bool fits = conv    ? kind == Kind::code
                        : real  ? kind != Kind::code
                        : fixed ? kind == Kind::fixed
                                : kind != Kind::acc;
      if (!fits)
        wrong("input '" + program_.nodes[node().inputs[i]].name + "' is of kind " + name_of(kind) + ", must be " +
              (conv    ? "code"
               : real  ? "acc or fixed"
               : fixed ? "fixed"
                       : "fixed or code"));
    }
  }

  // Windows slid over the padded map: the result's height and width.
  Pair windows(const Shape& map, Pair kernel, Pair stride, Sides padding, Pair dilation) const {
    const Pair padded = {map.h + padding[0] + padding[1], map.w + padding[2] + padding[3]};
    if (exceeds(map.c, padded[0], padded[1], kMaxValue))
      wrong("the padded map " + show({padded[0], padded[1], map.c}) + " exceeds " + std::to_string(kMaxValue) +
            " elements");
    Pair size;
    for (int axis = 0; axis < 2; ++axis) {
      const int64_t span = dilation[axis] * (kernel[axis] - 1) + 1;
      if (span > padded[axis])
        wrong("a window of " + std::to_string(span) + " (kernel " + std::to_string(kernel[axis]) + ", dilation " +
              std::to_string(dilation[axis]) + ") is larger than the padded map of " + std::to_string(padded[axis]) +
              " along its " + (axis == 0 ? "height" : "width"));
      size[axis] = (padded[axis] - span) / stride[axis] + 1;
    }
    return size;
  }

  NodeValue infer(const InputNode&) {
    if (program_.input >= 0) wrong("a program has one input, another is '" + program_.nodes[program_.input].name + "'");
    program_.input = static_cast<int>(node_);
    return {program_.input_shape, Kind::code, -1, program_.input, true};
  }

  NodeValue infer(const ConvNode& a) {
    const Layer& layer = program_.layers[a.layer];
    const Shape& map = source(0).shape;
    if (layer.dims[1] * a.groups != map.c || layer.dims[0] % a.groups != 0)
      wrong("layer '" + layer.name + "' with groups = " + std::to_string(a.groups) + " takes " +
            std::to_string(layer.dims[1] * a.groups) + " input channels, and groups must divide its " +
            std::to_string(layer.dims[0]) + " output channels; the input has " + std::to_string(map.c) + " channels");
    for (size_t i = 0; i < layer.at.size(); ++i) {
      const size_t pads = layer.at[i].pad_code.size();
      if (pads != 1 && static_cast<int64_t>(pads) != map.c)
        wrong("layer '" + layer.name + "': pad_code of precision " + std::to_string(program_.precisions[i]) + " has " +
              std::to_string(pads) + " entries, the input " + std::to_string(map.c) + " channels");
    }
    const Pair size = windows(map, {layer.dims[2], layer.dims[3]}, a.stride, a.padding, a.dilation);
    return {{size[0], size[1], layer.dims[0]}, Kind::acc, a.layer, -1, true};
  }

  void check_affines(const std::vector<int>& affines) const {
    for (int index : affines) {
      const Affine& affine = program_.affines[index];
      if (affine.channels != source(0).shape.c)
        wrong("affine '" + affine.name + "' has " + std::to_string(affine.channels) + " channels, the input " +
              std::to_string(source(0).shape.c));
    }
    if (source(0).kind != Kind::acc) return;
    if (affines.empty() || program_.affines[affines[0]].owner != source(0).layer)
      wrong("the input is an accumulator of layer '" + program_.layers[source(0).layer].name +
            "', so the first affine must be owned by that layer");
  }

  NodeValue infer(const RequantNode& a) {
    check_affines(a.affines);
    return {source(0).shape, Kind::code, a.layer, static_cast<int>(node_), true};
  }

  NodeValue infer(const RescaleNode& a) {
    check_affines(a.affines);
    return {source(0).shape, Kind::fixed, -1, -1, true};
  }

  NodeValue infer(const AddNode&) {
    if (source(0).shape != source(1).shape)
      wrong("inputs have different shapes: " + show(source(0).shape) + " and " + show(source(1).shape));
    for (size_t i = 0; i < 2; ++i)
      if (!source(i).aligned)
        wrong("input '" + program_.nodes[node().inputs[i]].name +
              "' was pooled with a divisor that is no power of two; rescale it before adding");
    return {source(0).shape, Kind::fixed, -1, -1, true};
  }

  NodeValue infer(const ClipNode&) { return source(0); }

  NodeValue pooled(Pair kernel, Pair stride, Sides padding) const {
    NodeValue found = source(0);
    const Pair size = windows(found.shape, kernel, stride, padding, {1, 1});
    found.shape = {size[0], size[1], found.shape.c};
    return found;
  }

  NodeValue infer(const MaxPoolNode& a) {
    if (std::max(a.padding[0], a.padding[1]) >= a.kernel[0] || std::max(a.padding[2], a.padding[3]) >= a.kernel[1])
      wrong("the padding reaches the kernel's size: a window could lie outside the map, where there is no maximum");
    return pooled(a.kernel, a.stride, a.padding);
  }

  NodeValue infer(const AvgPoolNode& a) {
    NodeValue found = pooled(a.kernel, a.stride, a.padding);
    const int64_t divisor = a.kernel[0] * a.kernel[1];
    found.aligned &= (divisor & (divisor - 1)) == 0;
    return found;
  }

  int64_t sliced(char axis, const Triple& bounds, int64_t size) const {
    const auto [start, stop, step] = bounds;
    if (start >= stop || stop > size || step < 1)
      wrong(std::string("attribute '") + axis + "': must be [start, stop, step] with 0 <= start < stop <= " +
            std::to_string(size) + " (the size of the input's axis) and step >= 1");
    return (stop - start + step - 1) / step;
  }

  NodeValue infer(const SliceNode& a) {
    NodeValue found = source(0);
    Shape& s = found.shape;
    s = {sliced('h', a.h, s.h), sliced('w', a.w, s.w), sliced('c', a.c, s.c)};
    return found;
  }

  NodeValue infer(const PadNode& a) {
    NodeValue found = source(0);
    Shape& s = found.shape;
    s = {s.h + a.h[0] + a.h[1], s.w + a.w[0] + a.w[1], s.c + a.c[0] + a.c[1]};
    return found;
  }

  NodeValue infer(const FlattenNode&) {
    NodeValue found = source(0);
    found.shape = {1, 1, found.shape.elements()};
    return found;
  }

  void count_macs(const NodeValue& found) {
    const ConvNode* conv = std::get_if<ConvNode>(&node().attributes);
    if (conv == nullptr) return;
    const auto& dims = program_.layers[conv->layer].dims;
    macs_ += found.shape.elements() * (dims[1] * dims[2] * dims[3]);  // both factors at most 2^28
    if (macs_ > kMaxMacs)
      fail("the program's multiply-accumulates an image exceed the limit of " + std::to_string(kMaxMacs));
  }

  Program& program_;
  size_t node_ = 0;
  int64_t macs_ = 0;
};

void check_first_layer(const Program& program, const Layer& layer) {
  const int64_t channels = program.input_shape.c;
  for (size_t i = 0; i < layer.at.size(); ++i) {
    const LayerPrecision& at = layer.at[i];
    const std::string where = "layer '" + layer.name + "' at precision " + std::to_string(program.precisions[i]);
    const size_t offsets = at.input_offset.size();
    if (offsets != 1 && static_cast<int64_t>(offsets) != channels)
      fail(where + ": input_offset has " + std::to_string(offsets) + " entries, the network's input that it reads " +
           std::to_string(channels) + " channels; give one entry, or one a channel");
    if (program.pixels && (at.input_low != 0 || at.input_high != 255))
      fail(where + ": input_range is [" + std::to_string(at.input_low) + ", " + std::to_string(at.input_high) +
           "], but the layer reads pixels, whose range is [0, 255]");
  }
}

void check_inner_offset(const Program& program, const Node& origin, const Layer& layer) {
  for (size_t i = 0; i < layer.at.size(); ++i)
    if (layer.at[i].input_offset.size() != 1)
      fail("node '" + origin.name + "': its codes are on the grid of layer '" + layer.name +
           "', whose input_offset at precision " + std::to_string(program.precisions[i]) + " has " +
           std::to_string(layer.at[i].input_offset.size()) +
           " entries; only the network's input may have one a channel");
}

bool has_offset(const Layer& layer) {
  for (const LayerPrecision& at : layer.at)
    for (double offset : at.input_offset)
      if (offset != 0) return true;
  return false;
}

// What a pooling of codes adds outside the map is the code 0, which must mean the value 0.
void check_padded_sums(const Program& program, const std::vector<std::vector<int>>& readers) {
  std::vector<bool> offset(program.layers.size()), shifted(program.nodes.size());
  for (size_t i = 0; i < program.layers.size(); ++i) offset[i] = has_offset(program.layers[i]);
  for (size_t i = 0; i < readers.size(); ++i)
    shifted[i] = std::any_of(readers[i].begin(), readers[i].end(), [&](int layer) { return offset[layer]; });
  for (size_t i = 0; i < program.nodes.size(); ++i) {
    const AvgPoolNode* pool = std::get_if<AvgPoolNode>(&program.nodes[i].attributes);
    const NodeValue& value = program.values[i];
    if (pool == nullptr || value.kind != Kind::code || pool->padding == Sides{0, 0, 0, 0}) continue;
    if (shifted[value.origin])
      fail("node '" + program.nodes[i].name +
           "' (avgpool): the codes are on a grid whose input_offset is not 0, so code 0 is not the value 0; pool "
           "without padding");
  }
}

void check_ends(const Program& program, const std::vector<std::vector<int>>& readers) {
  if (program.input < 0) fail("the program has no input node");
  if (readers[program.input].empty())
    fail("node '" + program.nodes[program.input].name + "' (input): no conv reads it, so its codes have no grid");
  const Kind kind = program.values[program.output].kind;
  if (kind != Kind::fixed)
    fail("output '" + program.nodes[program.output].name + "' is of kind " + name_of(kind) + ", must be fixed");
  for (int layer : readers[program.input]) check_first_layer(program, program.layers[layer]);
  for (size_t i = 0; i < readers.size(); ++i) {
    if (static_cast<int>(i) == program.input) continue;
    for (int layer : readers[i]) check_inner_offset(program, program.nodes[i], program.layers[layer]);
  }
}

}  // namespace

void check_graph(Program* program) {
  Check(program).nodes();
  const std::vector<std::vector<int>> readers = code_readers(*program);
  check_ends(*program, readers);
  check_padded_sums(*program, readers);
  const std::vector<int> chosen(program->layers.size(), 0);
  for (size_t i = 0; i < program->precisions.size(); ++i)
    check_shared_codes(*program, readers, std::vector<int>(chosen.size(), static_cast<int>(i)));
  for (NodeValue& value : program->values)
    if (value.kind == Kind::code) value.layer = readers[value.origin][0];
}

}  // namespace bitstrata::artifact
