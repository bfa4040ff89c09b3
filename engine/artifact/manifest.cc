#include "manifest.h"

#include <utility>

#include "bitstrata/error.h"
#include "graph_check.h"
#include "sha256.h"

namespace bitstrata::artifact {

namespace {

constexpr const char* kFormat = "bitstrata.strata";
constexpr const char* kVersion = "1";
constexpr int64_t kMaxChannels = int64_t{1} << 16;
constexpr int kMaxPrecision = 64;

std::vector<int> decode_precisions(const Field& field) {
  std::vector<int> precisions;
  field.each([&](const Field& item) {
    const int precision = static_cast<int>(item.integer(1, kMaxPrecision));
    if (!precisions.empty() && precision <= precisions.back()) field.wrong("one or more, ascending");
    precisions.push_back(precision);
  });
  if (precisions.empty()) field.wrong("one or more, ascending");
  return precisions;
}

Names names_of(const std::vector<Layer>& layers) {
  Names names;
  for (const Layer& layer : layers) names.emplace(layer.name, static_cast<int>(names.size()));
  return names;
}

Names names_of(const std::vector<Affine>& affines) {
  Names names;
  for (const Affine& affine : affines) names.emplace(affine.name, static_cast<int>(names.size()));
  return names;
}

int find_output(const Field& field, const std::vector<Node>& nodes) {
  const std::string name = field.name();
  for (size_t i = 0; i < nodes.size(); ++i)
    if (nodes[i].name == name) return static_cast<int>(i);
  field.wrong("the name of a node");
}

std::vector<FileEntry> decode_files(const Field& field, const Program& program, const std::vector<StoredFile>& stored) {
  field.expect_count(stored.size());
  std::vector<FileEntry> files;
  field.each([&](const Field& item) {
    item.expect_members({"name", "sha256", "size"});
    const StoredFile& file = stored[files.size()];
    if (!item["name"].is("\"" + file.name + "\"")) item["name"].wrong("\"" + file.name + "\"");
    const uint64_t size = header(program, file).size() + payload(program, file);
    if (!item["size"].is(std::to_string(size)))
      item["size"].wrong(std::to_string(size) + ", which the shapes imply for " + file.name);
    files.push_back({file.name, item["sha256"].sha256(), size});
  });
  return files;
}

// Looked at before anything else, so that a later version is named as such whatever else it has.
void check_version(const Field& root) {
  const bool there = root.has("version");
  if (there && root["version"].is(kVersion)) return;
  const std::string message = "format version " + (there ? shortened(root["version"].raw()) : "missing") +
                              "; this reader knows version " + kVersion;
  if (there && root["version"].is(JsonKind::integer) && root["version"].raw().front() != '-' &&
      !root["version"].is("0"))
    throw ArtifactError(ArtifactError::Kind::newer, kManifest, message);
  root.fail(message);
}

}  // namespace

void add_name(const Field& field, const std::string& name, Names* names) {
  if (!names->emplace(name, static_cast<int>(names->size())).second)
    field.fail("'" + shortened(name) + "' occurs twice");
}

int index_of(const Field& field, const Names& names, const char* expected) {
  const auto found = field.is(JsonKind::string) ? names.find(field.text()) : names.end();
  if (found == names.end()) field.wrong(expected);
  return found->second;
}

std::string strata_text(const std::vector<StoredFile>& stored) {
  std::string text = "[";
  for (const StoredFile& file : stored) {
    if (file.kind != StoredFile::Kind::planes) continue;
    text += (text.size() > 1 ? "," : "") + ("{\"file\":\"" + file.name) + "\",\"planes\":[" +
            std::to_string(file.first) + "," + std::to_string(file.last) + "]}";
  }
  return text + "]";
}

// The text is canonical, so without the member and one of its commas it is canonical again.
std::string seal_of(const JsonDocument& document) {
  const Field root(document);
  const JsonItem member = root["sha256"].item();
  const std::string& text = document.text();
  size_t begin = member.begin - std::string_view("\"sha256\":").size(), end = member.end;
  if (text[end] == ',') {
    ++end;
  } else if (text[begin - 1] == ',') {
    --begin;
  }
  Sha256 hash;
  hash.add(text.data(), begin);
  hash.add(text.data() + end, text.size() - end);
  return hash.hex();
}

Program decode_program(const Field& field) {
  field.expect_members({"input", "output", "precisions", "nodes", "layers", "affines", "plans"});
  const Field input = field["input"];
  input.expect_members({"kind", "shape"});
  const auto [channels, height, width] = input["shape"].integers<3>(1, kMaxChannels);
  if (!input["kind"].is("\"pixels\"") && !input["kind"].is("\"codes\"")) input["kind"].wrong("\"pixels\" or \"codes\"");
  Program program;
  program.input_shape = {height, width, channels};
  program.pixels = input["kind"].is("\"pixels\"");
  program.precisions = decode_precisions(field["precisions"]);
  program.layers = decode_layers(field["layers"], program.precisions);
  const Names layers = names_of(program.layers);
  program.affines = decode_affines(field["affines"], layers);
  const Names affines = names_of(program.affines);
  program.plans = decode_plans(field["plans"], program, affines);
  program.nodes = decode_nodes(field["nodes"], layers, affines);
  program.output = find_output(field["output"], program.nodes);
  check_graph(&program);
  program.weights.resize(program.layers.size());
  program.factors.resize(program.precisions.size() + program.plans.size());
  return program;
}

Manifest decode_manifest(std::string text) {
  if (text.size() > kMaxManifest)
    throw ArtifactError(
        ArtifactError::Kind::content, kManifest,
        "has " + std::to_string(text.size()) + " bytes, at most " + std::to_string(kMaxManifest) + " are allowed");
  const JsonDocument document(std::move(text), kManifest);
  const Field root(document);
  if (!root.is(JsonKind::object) || !root.has("format") || !root["format"].is("\"" + std::string(kFormat) + "\""))
    root.fail("is not the manifest of a bitstrata artifact (format \"" + std::string(kFormat) + "\")");
  check_version(root);
  Manifest manifest;
  manifest.sha256 = root["sha256"].sha256();
  const std::string actual = seal_of(document);
  if (manifest.sha256 != actual)
    root.fail("sha256 is " + actual + ", the manifest states " + manifest.sha256 + "; it was changed");
  root.expect_members({"format", "version", "sha256", "program", "strata", "files", "provenance"});
  const Field provenance = root["provenance"];
  if (!provenance.is(JsonKind::object)) provenance.wrong("an object");
  manifest.program = decode_program(root["program"]);
  manifest.program.provenance = std::string(provenance.raw());
  manifest.stored = stored_files(manifest.program);
  const std::string strata = strata_text(manifest.stored);
  if (!root["strata"].is(strata)) root["strata"].wrong(strata + ", which the layers imply");
  manifest.files = decode_files(root["files"], manifest.program, manifest.stored);
  return manifest;
}

}  // namespace bitstrata::artifact
