// Nodes of a manifest: names become indices, attributes their types.
#include <cmath>

#include "manifest.h"

namespace bitstrata::artifact {

namespace {

constexpr int64_t kMaxExtent = int64_t{1} << 16;  // of a kernel, stride, dilation or padding
constexpr int64_t kMaxIndex = int64_t{1} << 28;   // of a slice
constexpr int64_t kMaxGroups = int64_t{1} << 16;
constexpr double kMaxBound = 1e30;  // of a clip: far beyond any activation, and safe to divide by a step

// What the attributes of a node refer to.
struct Tables {
  const Names& layers;
  const Names& affines;
};

Pair extents(const Field& attrs, const char* key) { return attrs[key].integers<2>(1, kMaxExtent); }
Pair margins(const Field& attrs, const char* key) { return attrs[key].integers<2>(0, kMaxExtent); }
Sides padding(const Field& attrs) { return attrs["padding"].integers<4>(0, kMaxExtent); }
Triple slice(const Field& attrs, const char* key) { return attrs[key].integers<3>(0, kMaxIndex); }

int layer(const Field& attrs, const char* key, const Tables& tables) {
  return index_of(attrs[key], tables.layers, "the name of a layer");
}

std::vector<int> affines(const Field& attrs, const Tables& tables) {
  std::vector<int> found;
  const Field names = attrs["affine"];
  names.each([&](const Field& name) { found.push_back(index_of(name, tables.affines, "the name of an affine")); });
  return found;
}

// Integers are numbers here too.
double bound(const Field& field) {
  const bool integer = field.is(JsonKind::integer);
  if (!integer && !field.is(JsonKind::real)) field.wrong("a number or null");
  const double value = integer ? static_cast<double>(field.integer(INT64_MIN, INT64_MAX)) : field.real();
  if (std::abs(value) > kMaxBound) field.wrong("a clip bound within 1e30");
  return value;
}

RealClip clip(const Field& attrs) {
  RealClip found;
  if (!attrs.has("clip")) return found;
  const Field field = attrs["clip"];
  field.expect_count(2);
  bool first = true;
  field.each([&](const Field& item) {
    if (!item.is(JsonKind::null)) {
      (first ? found.has_low : found.has_high) = true;
      (first ? found.low : found.high) = bound(item);
    }
    first = false;
  });
  if (found.has_low && found.has_high && found.low > found.high) field.wrong("a lower bound below the upper one");
  return found;
}

template <typename Pool>
NodeAttributes pool(const Field& attrs) {
  attrs.expect_members({"kernel", "stride", "padding"});
  return Pool{extents(attrs, "kernel"), extents(attrs, "stride"), padding(attrs)};
}

template <typename Plain>
NodeAttributes plain(const Field& attrs) {
  attrs.expect_members({});
  return Plain{};
}

NodeAttributes conv(const Field& attrs, const Tables& tables) {
  attrs.expect_members({"layer", "stride", "padding", "dilation", "groups"});
  return ConvNode{layer(attrs, "layer", tables), extents(attrs, "stride"), padding(attrs), extents(attrs, "dilation"),
                  attrs["groups"].integer(1, kMaxGroups)};
}

NodeAttributes decode_attributes(const Field& op, const Field& attrs, const Tables& tables) {
  const std::string name = op.name();
  if (name == "input") return plain<InputNode>(attrs);
  if (name == "conv") return conv(attrs, tables);
  if (name == "requant") {
    attrs.expect_members({"to", "affine"}, "clip");
    return RequantNode{layer(attrs, "to", tables), affines(attrs, tables), clip(attrs)};
  }
  if (name == "rescale") {
    attrs.expect_members({"affine"}, "clip");
    return RescaleNode{affines(attrs, tables), clip(attrs)};
  }
  if (name == "add") return plain<AddNode>(attrs);
  if (name == "clip") {
    attrs.expect_members({"clip"});
    return ClipNode{clip(attrs)};
  }
  if (name == "maxpool") return pool<MaxPoolNode>(attrs);
  if (name == "avgpool") return pool<AvgPoolNode>(attrs);
  if (name == "slice") {
    attrs.expect_members({"c", "h", "w"});
    return SliceNode{slice(attrs, "c"), slice(attrs, "h"), slice(attrs, "w")};
  }
  if (name == "pad") {
    attrs.expect_members({"c", "h", "w"});
    return PadNode{margins(attrs, "c"), margins(attrs, "h"), margins(attrs, "w")};
  }
  if (name == "flatten") return plain<FlattenNode>(attrs);
  op.wrong("an operation of programs");
}

}  // namespace

std::vector<Node> decode_nodes(const Field& field, const Names& layers, const Names& affines) {
  std::vector<Node> nodes;
  Names names;
  field.each([&](const Field& item) {
    item.expect_members({"name", "op", "inputs", "attrs"});
    Node node;
    node.name = item["name"].name();
    const Field inputs = item["inputs"], op = item["op"], attrs = item["attrs"];
    inputs.each(
        [&](const Field& name) { node.inputs.push_back(index_of(name, names, "the name of an earlier node")); });
    node.attributes = decode_attributes(op, attrs, {layers, affines});
    add_name(item["name"], node.name, &names);
    nodes.push_back(std::move(node));
  });
  return nodes;
}

}  // namespace bitstrata::artifact
