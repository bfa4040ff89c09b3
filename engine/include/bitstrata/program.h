// The integer program: a network in integers at several precisions, as an artifact stores it.
//
// A Program is only made by `Artifact` (artifact.h), and what it holds has been checked against spec/artifact.md and
// spec/numerics.md before it is here, so whoever reads one need not check it again:
//
// - the graph: names of nodes, layers, affines and plans are unique; every index lies in its table; a node's inputs are
//   earlier nodes, as many and of the kinds that its operation takes; shapes follow from one another (`values`), with
//   at most 2^16 channels, 2^28 elements a value (padding included) and 2^40 multiply-accumulates an image; windows fit
//   into the padded map; there is exactly one input node, a convolution reads it, and the output is a `fixed` value;
// - attributes: all present, of their type and within the bounds noted below; groups divide the channels; affines have
//   the channels of what they act on, and the first one after a convolution is owned by its layer;
// - layers: every field within the bounds noted below; integer weights mul*c + add within int16 at every precision;
//   pad codes within the input range; as many of them, and of the input offsets, as section 1 of numerics.md allows;
//   pixels have the range [0, 255]; layers that read the same codes agree on range and offset at every *uniform*
//   precision; sums of codes pad only where the offset is 0;
// - plans: one known precision for each layer;
// - weights held: codes within `bits` signed bits; factors held: finite affines, steps within [1e-30, 1e30].
//
// Not checked, because it depends on the precisions chosen: that the weights and factors which they need are held; that
// layers which read the same codes agree at a *mixed* map (`check_shared_codes`); and everything that derivation proves
// (accumulators, requantization constants, fixed point).
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "bitstrata/types.h"

namespace bitstrata {

// Real clip bounds, each absent or within [-1e30, 1e30]; low <= high where both are there.
struct RealClip {
  bool has_low = false, has_high = false;
  double low = 0, high = 0;
};

// Attributes of nodes. Layers and affines are indices into Program::layers and Program::affines. Extents (strides,
// kernels, dilations) are 1..2^16, paddings and margins 0..2^16.
struct InputNode {};
struct ConvNode {
  int layer;
  Pair stride;
  Sides padding;
  Pair dilation;
  int64_t groups;
};
struct RequantNode {
  int layer;  // whose input grid the codes belong to
  std::vector<int> affines;
  RealClip clip;
};
struct RescaleNode {
  std::vector<int> affines;
  RealClip clip;
};
struct AddNode {};
struct ClipNode {
  RealClip clip;
};
struct MaxPoolNode {
  Pair kernel, stride;
  Sides padding;
};
struct AvgPoolNode {
  Pair kernel, stride;
  Sides padding;
};
struct SliceNode {
  Triple c, h, w;  // 0 <= start < stop <= size, step >= 1
};
struct PadNode {
  Pair c, h, w;  // before, after
};
struct FlattenNode {};

using NodeAttributes = std::variant<InputNode, ConvNode, RequantNode, RescaleNode, AddNode, ClipNode, MaxPoolNode,
                                    AvgPoolNode, SliceNode, PadNode, FlattenNode>;

// The operation's name, "input", "conv", ...: its place in the variant.
const char* name_of(const NodeAttributes& attributes);

struct Node {
  std::string name;
  std::vector<int> inputs;  // indices of earlier nodes
  NodeAttributes attributes;
};

// What is known of a node's value without its numbers.
struct NodeValue {
  enum class Kind : uint8_t { code, acc, fixed };
  Shape shape;
  Kind kind = Kind::fixed;
  int layer = -1;       // code: the first layer that takes part in its grid, which gives the step; acc: its layer
  int origin = -1;      // code: the input or requant node that made the codes, seen through slices and poolings
  bool aligned = true;  // fixed: the scale is a power of two
};

// A layer's fields at one precision.
struct LayerPrecision {
  int weight_bits;                   // 1..source_bits
  int mul, add;                      // integer weight = mul * code + add; 1..256, -256..256
  int input_low, input_high;         // ascending, within 0..255 or -128..127
  std::vector<int16_t> pad_code;     // one, or one an input channel; within the input range
  std::vector<double> input_offset;  // one, or one a channel of the network's input; finite
};

struct Layer {
  std::string name;
  bool linear = false;             // for people, the arithmetic is the same
  std::array<int64_t, 4> dims;     // out, in / groups, kernel height, kernel width; at most 2^28 codes, kernels to 2^10
  int source_bits = 0;             // 1..8
  bool planes = false;             // the codes are bit-planes in strata; else they are resident
  std::vector<LayerPrecision> at;  // one a precision, in the order of Program::precisions
  std::string grid;                // for people, may be empty

  int64_t weights() const { return dims[0] * dims[1] * dims[2] * dims[3]; }
};

struct Affine {
  std::string name;
  int owner;         // layer, whose precision chooses the factors
  int64_t channels;  // 1..2^16
};

struct NamedPlan {
  std::string name;
  std::vector<int> map;      // a layer: index into Program::precisions
  std::vector<int> affines;  // ascending: the affines that the plan's factors replace
};

// Codes of a layer as far as they are held: the first `bits` bit-planes, in C order of Layer::dims, each within
// [-2^(bits-1), 2^(bits-1) - 1]. At b <= bits they are code >> (bits - b). Null and 0: nothing is held.
struct Weights {
  std::shared_ptr<const std::vector<int8_t>> codes;
  int bits = 0;
};

// The float64 factors of one precision, or of one plan: y = mul*x + add of some affines, and the steps of the layers'
// input grids (a plan has none).
class Factors {
 public:
  struct Line {
    const double* mul;  // (channels,); null if the affine is not among these factors
    const double* add;
  };

  Line line(int affine) const;
  double step(int layer) const { return steps_[layer]; }
  const std::vector<int>& affines() const { return affines_; }  // ascending
  const std::vector<double>& steps() const { return steps_; }

  // affines: ascending; first: of each, the channels of those before it, and at the end their sum C; lines: (2, C).
  Factors(std::vector<int> affines, std::vector<int64_t> first, std::vector<double> lines, std::vector<double> steps)
      : affines_(std::move(affines)), first_(std::move(first)), lines_(std::move(lines)), steps_(std::move(steps)) {}

 private:
  std::vector<int> affines_;
  std::vector<int64_t> first_;
  std::vector<double> lines_, steps_;
};

struct Program {
  Shape input_shape;
  bool pixels =
      false;  // the input are uint8 pixels, which are the codes; else floats that enter through step and offset
  std::vector<int> precisions;    // ascending, each 1..64
  std::vector<Node> nodes;        // in execution order
  std::vector<NodeValue> values;  // of each node
  int input = -1;                 // node
  int output = -1;                // node whose `fixed` value the program returns
  std::vector<Layer> layers;
  std::vector<Affine> affines;
  std::vector<NamedPlan> plans;
  std::string provenance;  // canonical JSON

  std::vector<Weights> weights;                         // of each layer
  std::vector<std::shared_ptr<const Factors>> factors;  // of each precision, then of each plan; null: not held

  int factors_of_plan(int plan) const { return static_cast<int>(precisions.size()) + plan; }
};

// A choice of precisions: of each layer an index into Program::precisions, and the plan it comes from, or -1.
struct Selection {
  std::vector<int> map;
  int plan = -1;
};

// One precision for all layers; a named plan; or a complete map from layers' names to precisions. Throw ArtifactError
// (request) for a precision, plan or layer that is not there, a layer named twice, or one left out.
Selection select(const Program& program, int precision);
Selection select(const Program& program, const std::string& plan);
Selection select(const Program& program, const std::vector<std::pair<std::string, int>>& map);

// Throws ArtifactError (program) unless layers that read the same codes have equal ranges and offsets at `map`.
void check_shared_codes(const Program& program, const std::vector<int>& map);

// The layers that take part in the grid of the codes that a node makes, each once, in order of nodes; the first gives
// the step.
// Empty for nodes that make no codes.
std::vector<std::vector<int>> code_readers(const Program& program);

}  // namespace bitstrata
