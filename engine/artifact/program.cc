#include "bitstrata/program.h"

#include <algorithm>
#include <map>
#include <set>

#include "bitstrata/error.h"
#include "layout.h"
#include "shared_codes.h"

namespace bitstrata {

namespace {

[[noreturn]] void no_such(const std::string& message) {
  throw ArtifactError(ArtifactError::Kind::request, "", message);
}

int index_of_precision(const Program& program, int precision) {
  const auto found = std::find(program.precisions.begin(), program.precisions.end(), precision);
  if (found != program.precisions.end()) return static_cast<int>(found - program.precisions.begin());
  std::string known;
  for (int item : program.precisions) known += (known.empty() ? "" : ", ") + std::to_string(item);
  no_such("there is no precision " + std::to_string(precision) + "; there are " + known);
}

// Whether two offsets, each one for all channels or one a channel, are the same.
bool same_offsets(const std::vector<double>& a, const std::vector<double>& b) {
  if (a.size() == b.size()) return a == b;
  if (a.size() != 1 && b.size() != 1) return false;
  const std::vector<double>& longer = a.size() == 1 ? b : a;
  const double one = a.size() == 1 ? a[0] : b[0];
  return std::all_of(longer.begin(), longer.end(), [&](double offset) { return offset == one; });
}

}  // namespace

const char* name_of(const NodeAttributes& attributes) {
  static constexpr const char* kNames[] = {"input",   "conv",    "requant", "rescale", "add",    "clip",
                                           "maxpool", "avgpool", "slice",   "pad",     "flatten"};
  static_assert(std::variant_size_v<NodeAttributes> == sizeof kNames / sizeof kNames[0]);
  return kNames[attributes.index()];
}

Factors::Line Factors::line(int affine) const {
  const auto found = std::lower_bound(affines_.begin(), affines_.end(), affine);
  if (found == affines_.end() || *found != affine) return {nullptr, nullptr};
  const double* mul = lines_.data() + first_[found - affines_.begin()];
  return {mul, mul + first_.back()};
}

Selection select(const Program& program, int precision) {
  return {std::vector<int>(program.layers.size(), index_of_precision(program, precision)), -1};
}

Selection select(const Program& program, const std::string& plan) {
  for (size_t i = 0; i < program.plans.size(); ++i)
    if (program.plans[i].name == plan) return {program.plans[i].map, static_cast<int>(i)};
  no_such("there is no plan '" + plan + "'");
}

Selection select(const Program& program, const std::vector<std::pair<std::string, int>>& map) {
  std::map<std::string, int> chosen;
  for (const auto& [layer, precision] : map)
    if (!chosen.emplace(layer, index_of_precision(program, precision)).second)
      no_such("the precision map names layer '" + layer + "' twice");
  Selection found;
  for (const Layer& layer : program.layers) {
    const auto at = chosen.find(layer.name);
    if (at == chosen.end()) no_such("the precision map leaves out layer '" + layer.name + "'");
    found.map.push_back(at->second);
    chosen.erase(at);
  }
  if (!chosen.empty()) no_such("the precision map names layer '" + chosen.begin()->first + "', which there is not");
  return found;
}

std::vector<std::vector<int>> code_readers(const Program& program) {
  std::vector<std::vector<int>> readers(program.nodes.size());
  std::set<std::pair<int, int>> known;  // origin, layer
  const auto add = [&](int origin, int layer) {
    if (known.emplace(origin, layer).second) readers[origin].push_back(layer);
  };
  for (size_t i = 0; i < program.nodes.size(); ++i) {
    const Node& node = program.nodes[i];
    if (const auto* requant = std::get_if<RequantNode>(&node.attributes)) add(static_cast<int>(i), requant->layer);
    if (const auto* conv = std::get_if<ConvNode>(&node.attributes))
      add(program.values[node.inputs[0]].origin, conv->layer);
  }
  return readers;
}

void artifact::check_shared_codes(const Program& program, const std::vector<std::vector<int>>& readers,
                                  const std::vector<int>& map) {
  for (size_t origin = 0; origin < readers.size(); ++origin) {
    for (int other : readers[origin]) {
      const int first = readers[origin][0];
      const LayerPrecision &a = program.layers[first].at[map[first]], &b = program.layers[other].at[map[other]];
      const bool ranges = a.input_low == b.input_low && a.input_high == b.input_high;
      if (ranges && same_offsets(a.input_offset, b.input_offset)) continue;
      throw ArtifactError(ArtifactError::Kind::program, kManifest,
                          "node '" + program.nodes[origin].name + "': layers '" + program.layers[first].name +
                              "' (precision " + std::to_string(program.precisions[map[first]]) + ") and '" +
                              program.layers[other].name + "' (precision " +
                              std::to_string(program.precisions[map[other]]) + ") share its codes, but their " +
                              (ranges ? "input_offset" : "input_range") + " differs");
    }
  }
}

void check_shared_codes(const Program& program, const std::vector<int>& map) {
  artifact::check_shared_codes(program, code_readers(program), map);
}

}  // namespace bitstrata
