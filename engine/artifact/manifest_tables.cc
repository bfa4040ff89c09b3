// Layers, affines and plans of a manifest.
#include <algorithm>
#include <limits>

#include "manifest.h"

namespace bitstrata::artifact {

namespace {

constexpr int64_t kMaxChannels = int64_t{1} << 16;
constexpr int64_t kMaxKernel = int64_t{1} << 10;
constexpr int64_t kMaxLayerWeights = int64_t{1} << 28;
constexpr int64_t kMaxWeights = int64_t{1} << 31;  // of all layers together
constexpr int64_t kMaxFactor = 256;                // |mul|, |add| of an integer form
constexpr size_t kMaxPlans = 1024;
constexpr size_t kMaxPlanName = 64;

void decode_dims(const Field& field, Layer* layer) {
  layer->dims = field.integers<4>(1, kMaxChannels);
  // The first product stays below 2^32, the other two within the kernel's bound.
  const int64_t rows = layer->dims[0] * layer->dims[1], kernel = layer->dims[2] * layer->dims[3];
  if (layer->dims[2] > kMaxKernel || layer->dims[3] > kMaxKernel || rows * kernel > kMaxLayerWeights)
    field.wrong("kernels up to " + std::to_string(kMaxKernel) + " and at most " + std::to_string(kMaxLayerWeights) +
                " weights");
}

void decode_form(const Field& field, LayerPrecision* at) {
  const auto [mul, add] = field.integers<2>(std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max());
  if (mul < 1 || mul > kMaxFactor || add < -kMaxFactor || add > kMaxFactor)
    field.wrong("mul from 1 to " + std::to_string(kMaxFactor) + " and add within " + std::to_string(kMaxFactor));
  const int64_t half = int64_t{1} << (at->weight_bits - 1);
  if (add - mul * half < -32768 || add + mul * (half - 1) > 32767)
    field.wrong("integer weights of " + std::to_string(at->weight_bits) + " bits within int16");
  at->mul = static_cast<int>(mul), at->add = static_cast<int>(add);
}

void decode_range(const Field& field, LayerPrecision* at) {
  const auto [low, high] = field.integers<2>(-128, 255);
  if (low > high || (low < 0 && high > 127)) field.wrong("ranges within 0..255 or -128..127");
  at->input_low = static_cast<int>(low), at->input_high = static_cast<int>(high);
}

void decode_pads(const Field& field, LayerPrecision* at) {
  field.each([&](const Field& item) {
    at->pad_code.push_back(static_cast<int16_t>(item.integer(at->input_low, at->input_high)));
  });
  if (at->pad_code.empty()) field.wrong("one or more numbers");
}

void decode_offsets(const Field& field, LayerPrecision* at) {
  field.each([&](const Field& item) { at->input_offset.push_back(item.real()); });
  if (at->input_offset.empty()) field.wrong("one or more numbers");
}

// A list with one item a precision.
template <typename Use>
void each_precision(const Field& field, Layer* layer, Use use) {
  field.expect_count(layer->at.size());
  size_t index = 0;
  field.each([&](const Field& item) { use(item, &layer->at[index++]); });
}

Layer decode_layer(const Field& field, size_t precisions) {
  field.expect_members({"name", "kind", "shape", "source_bits", "planes", "weight_bits", "integer_form", "input_range",
                        "pad_code", "input_offset", "grid"});
  Layer layer;
  layer.name = field["name"].name();
  const Field kind = field["kind"], grid = field["grid"];
  if (!kind.is("\"conv\"") && !kind.is("\"linear\"")) kind.wrong("\"conv\" or \"linear\"");
  layer.linear = kind.is("\"linear\"");
  decode_dims(field["shape"], &layer);
  layer.source_bits = static_cast<int>(field["source_bits"].integer(1, 8));
  layer.planes = field["planes"].boolean();
  layer.grid = grid.is("\"\"") ? "" : grid.name();
  layer.at.resize(precisions);
  each_precision(field["weight_bits"], &layer, [&](const Field& item, LayerPrecision* at) {
    at->weight_bits = static_cast<int>(item.integer(1, layer.source_bits));
  });
  each_precision(field["integer_form"], &layer, decode_form);
  each_precision(field["input_range"], &layer, decode_range);
  each_precision(field["pad_code"], &layer, decode_pads);
  each_precision(field["input_offset"], &layer, decode_offsets);
  return layer;
}

// What becomes part of a file's name; that it starts with a letter keeps it off the precisions.
std::string plan_name(const Field& field) {
  const std::string name = field.name();
  const char* allowed = "abcdefghijklmnopqrstuvwxyz0123456789._-";
  const bool starts = name[0] >= 'a' && name[0] <= 'z';
  if (!starts || name.size() > kMaxPlanName || name.find_first_not_of(allowed) != std::string::npos)
    field.wrong("a letter a-z, then up to 63 of a-z 0-9 . _ -");
  return name;
}

NamedPlan decode_plan(const Field& field, const Program& program, const Names& affines) {
  field.expect_members({"name", "precisions", "affines"});
  NamedPlan plan;
  plan.name = plan_name(field["name"]);
  const Field map = field["precisions"], replaced = field["affines"];
  map.expect_count(program.layers.size());
  map.each([&](const Field& item) {
    const auto begin = program.precisions.begin(), end = program.precisions.end();
    const auto found = std::find(begin, end, static_cast<int>(item.integer(1, 64)));
    if (found == end) item.wrong("one of the program's precisions");
    plan.map.push_back(static_cast<int>(found - begin));
  });
  replaced.each([&](const Field& item) {
    const int affine = index_of(item, affines, "the name of an affine");
    if (!plan.affines.empty() && affine <= plan.affines.back())
      item.wrong("each name at most once, in the manifest's order");
    plan.affines.push_back(affine);
  });
  return plan;
}

}  // namespace

std::vector<Layer> decode_layers(const Field& field, const std::vector<int>& precisions) {
  std::vector<Layer> layers;
  Names names;
  int64_t weights = 0;
  field.each([&](const Field& item) {
    layers.push_back(decode_layer(item, precisions.size()));
    add_name(item["name"], layers.back().name, &names);
    weights += layers.back().weights();
  });
  if (weights > kMaxWeights)
    field.fail(std::to_string(weights) + " weights, at most " + std::to_string(kMaxWeights) + " are allowed");
  return layers;
}

std::vector<Affine> decode_affines(const Field& field, const Names& layers) {
  std::vector<Affine> affines;
  Names names;
  field.each([&](const Field& item) {
    item.expect_members({"name", "owner", "channels"});
    affines.push_back({item["name"].name(), index_of(item["owner"], layers, "the name of a layer"),
                       item["channels"].integer(1, kMaxChannels)});
    add_name(item["name"], affines.back().name, &names);
  });
  return affines;
}

std::vector<NamedPlan> decode_plans(const Field& field, const Program& program, const Names& affines) {
  if (field.count() > kMaxPlans)
    field.fail(std::to_string(field.count()) + " plans, at most " + std::to_string(kMaxPlans) + " are allowed");
  std::vector<NamedPlan> plans;
  Names names;
  field.each([&](const Field& item) {
    plans.push_back(decode_plan(item, program, affines));
    add_name(item["name"], plans.back().name, &names);
  });
  return plans;
}

}  // namespace bitstrata::artifact
