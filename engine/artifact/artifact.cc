#include "bitstrata/artifact.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "json.h"
#include "layout.h"
#include "manifest.h"
#include "planes.h"
#include "sha256.h"

namespace bitstrata {

using artifact::StoredFile;

namespace {

constexpr double kMinStep = 1e-30, kMaxStep = 1e30;

[[noreturn]] void content(const std::string& file, const std::string& message) {
  throw ArtifactError(ArtifactError::Kind::content, file, message);
}

// What a load changes, applied when all of it has succeeded.
struct Stage {
  std::vector<Weights> weights;
  std::vector<std::shared_ptr<const Factors>> factors;
  std::vector<std::shared_ptr<std::vector<int8_t>>> fresh;  // codes of this load, which nothing else sees yet
  std::vector<bool> done;
  std::vector<FileEntry> reads;
};

void check_selection(const Program& program, const Selection& selection) {
  const int precisions = static_cast<int>(program.precisions.size());
  bool fits = selection.map.size() == program.layers.size() && selection.plan < static_cast<int>(program.plans.size());
  for (int precision : selection.map) fits &= precision >= 0 && precision < precisions;
  if (!fits) throw ArtifactError(ArtifactError::Kind::request, "", "the selection is not one of this program");
}

double read_double(const uint8_t* bytes) {
  uint64_t bits = 0;
  for (int i = 0; i < 8; ++i) bits |= uint64_t{bytes[i]} << (8 * i);
  double value;
  std::memcpy(&value, &bits, 8);
  return value;
}

std::vector<double> read_doubles(const uint8_t* bytes, int64_t count) {
  std::vector<double> values(static_cast<size_t>(count));
  for (double& value : values) value = read_double(bytes), bytes += 8;
  return values;
}

// Codes of a layer that this load may write: those held, copied, or new ones.
std::vector<int8_t>& writable(const Program& program, size_t layer, Stage* stage) {
  auto& fresh = stage->fresh[layer];
  if (fresh == nullptr) {
    const Weights& held = stage->weights[layer];
    fresh = held.codes != nullptr ? std::make_shared<std::vector<int8_t>>(*held.codes)
                                  : std::make_shared<std::vector<int8_t>>(program.layers[layer].weights());
    stage->weights[layer].codes = fresh;
  }
  return *fresh;
}

void add_planes(const Program& program, const StoredFile& file, const uint8_t* bytes, Stage* stage) {
  for (size_t i = 0; i < program.layers.size(); ++i) {
    const Layer& layer = program.layers[i];
    if (!holds(file, layer)) continue;
    const int64_t weights = layer.weights();
    for (int plane = file.first; plane <= file.last; ++plane, bytes += artifact::packed_size(weights)) {
      if (!artifact::padding_is_zero(bytes, weights))
        content(file.name, "layer '" + layer.name + "', plane " + std::to_string(plane) +
                               ": the padding bits of the last byte must be 0");
      artifact::widen(bytes, weights, stage->weights[i].bits++, writable(program, i, stage).data());
    }
  }
}

void add_resident(const Program& program, const StoredFile& file, const uint8_t* bytes, Stage* stage) {
  for (size_t i = 0; i < program.layers.size(); ++i) {
    const Layer& layer = program.layers[i];
    if (!holds(file, layer)) continue;
    std::vector<int8_t>& codes = writable(program, i, stage);
    std::memcpy(codes.data(), bytes, codes.size());
    bytes += codes.size();
    const int half = 1 << (layer.source_bits - 1);
    const auto [low, high] = std::minmax_element(codes.begin(), codes.end());
    if (*low < -half || *high >= half)
      throw ArtifactError(ArtifactError::Kind::program, file.name,
                          "layer '" + layer.name + "': codes reach from " + std::to_string(*low) + " to " +
                              std::to_string(*high) + ", beyond " + std::to_string(layer.source_bits) + " signed bits");
    stage->weights[i].bits = layer.source_bits;
  }
}

std::vector<int64_t> first_channels(const Program& program, const std::vector<int>& affines) {
  std::vector<int64_t> first = {0};
  for (int affine : affines) first.push_back(first.back() + program.affines[affine].channels);
  return first;
}

void check_factors(const Program& program, const StoredFile& file, const Factors& factors) {
  const auto wrong = [&](const std::string& message) {
    throw ArtifactError(ArtifactError::Kind::program, file.name, message);
  };
  for (int affine : factors.affines()) {
    const Factors::Line line = factors.line(affine);
    for (int64_t c = 0; c < program.affines[affine].channels; ++c)
      if (!std::isfinite(line.mul[c]) || !std::isfinite(line.add[c]))
        wrong("affine '" + program.affines[affine].name + "', channel " + std::to_string(c) + ": is not finite");
  }
  for (size_t i = 0; i < factors.steps().size(); ++i) {
    const double step = factors.steps()[i];
    if (step >= kMinStep && step <= kMaxStep) continue;
    const std::string shown = std::isfinite(step) ? artifact::canonical_float(step) : "not finite";
    wrong("step of layer '" + program.layers[i].name + "' is " + shown + ", must be in [1e-30, 1e30]");
  }
}

void add_factors(const Program& program, const StoredFile& file, const uint8_t* bytes, Stage* stage) {
  std::vector<int> affines = artifact::affines_of(program, file.key);
  std::vector<int64_t> first = first_channels(program, affines);
  const int64_t lines = 2 * first.back();
  auto factors =
      std::make_shared<const Factors>(std::move(affines), std::move(first), read_doubles(bytes, lines),
                                      read_doubles(bytes + 8 * lines, artifact::steps_of(program, file.key)));
  check_factors(program, file, *factors);
  stage->factors[file.key] = std::move(factors);
}

}  // namespace

struct Artifact::State {
  std::unique_ptr<Source> source;
  artifact::Manifest manifest;
  std::vector<bool> done;  // of each file but the manifest
  std::vector<FileEntry> reads;

  std::vector<bool> wanted(const Needs& needs) const;
  void read(size_t index, Stage* stage) const;
};

Artifact::Artifact(std::unique_ptr<Source> source) : state_(std::make_unique<State>()) {
  const Bytes data = source->read(artifact::kManifest, artifact::kMaxManifest);
  state_->source = std::move(source);
  state_->manifest = artifact::decode_manifest(std::string(data.begin(), data.end()));
  state_->done.resize(state_->manifest.files.size());
  state_->reads = {{artifact::kManifest, artifact::sha256_hex(data.data(), data.size()), data.size()}};
}

Artifact::~Artifact() = default;
Artifact::Artifact(Artifact&&) noexcept = default;
Artifact& Artifact::operator=(Artifact&&) noexcept = default;

const Program& Artifact::program() const { return state_->manifest.program; }
const std::string& Artifact::sha256() const { return state_->manifest.sha256; }
const std::vector<FileEntry>& Artifact::files() const { return state_->manifest.files; }
const std::vector<FileEntry>& Artifact::reads() const { return state_->reads; }

Needs Artifact::needs(const Selection& selection) const {
  const Program& program = this->program();
  check_selection(program, selection);
  Needs found;
  std::vector<bool> used(program.factors.size());
  for (size_t i = 0; i < program.layers.size(); ++i) {
    const int precision = selection.map[i];
    used[precision] = true;
    if (program.layers[i].planes) found.planes = std::max(found.planes, program.layers[i].at[precision].weight_bits);
  }
  if (selection.plan >= 0) used[program.factors_of_plan(selection.plan)] = true;
  for (size_t i = 0; i < used.size(); ++i)
    if (used[i]) found.factors.push_back(static_cast<int>(i));
  return found;
}

std::vector<bool> Artifact::State::wanted(const Needs& needs) const {
  const int keys = static_cast<int>(manifest.program.factors.size());
  for (int key : needs.factors)
    if (key < 0 || key >= keys)
      throw ArtifactError(
          ArtifactError::Kind::request, "",
          "factors " + std::to_string(key) + ": there are " + std::to_string(keys) + " of precisions and plans");
  if (needs.planes < 0 || needs.planes > 8)
    throw ArtifactError(ArtifactError::Kind::request, "",
                        "the number of bit-planes is from 0 to 8, got " + std::to_string(needs.planes));
  std::vector<bool> keyed(keys);
  for (int key : needs.factors) keyed[key] = true;
  std::vector<bool> found;
  for (const StoredFile& file : manifest.stored) {
    const bool planes = file.kind == StoredFile::Kind::planes && (file.first == 1 || file.last <= needs.planes);
    const bool factors = file.kind == StoredFile::Kind::factors && keyed[file.key];
    found.push_back(planes || factors || file.kind == StoredFile::Kind::resident);
  }
  return found;
}

std::vector<FileEntry> Artifact::files_needed(const Needs& needs) const {
  const std::vector<bool> wanted = state_->wanted(needs);
  std::vector<FileEntry> found;
  for (size_t i = 0; i < wanted.size(); ++i)
    if (wanted[i]) found.push_back(files()[i]);
  return found;
}

uint64_t Artifact::total_bytes(const Selection& selection) const {
  uint64_t total = reads().front().size;
  for (const FileEntry& file : files_needed(needs(selection))) total += file.size;
  return total;
}

void Artifact::State::read(size_t index, Stage* stage) const {
  const FileEntry& entry = manifest.files[index];
  const StoredFile& stored = manifest.stored[index];
  const Bytes data = source->read(entry.name, entry.size);
  if (data.size() != entry.size)
    content(entry.name,
            "has " + std::to_string(data.size()) + " bytes, the manifest states " + std::to_string(entry.size));
  const std::string digest = artifact::sha256_hex(data.data(), data.size());
  if (digest != entry.sha256)
    content(entry.name, "sha256 is " + digest + ", the manifest states " + entry.sha256 + "; it was changed");
  const std::string expected = header(manifest.program, stored);
  const auto differs = std::mismatch(expected.begin(), expected.end(), data.begin(),
                                     [](char a, uint8_t b) { return static_cast<uint8_t>(a) == b; });
  if (differs.first != expected.end())
    content(entry.name, "the header differs from the one fixed by the manifest's shapes, first at byte " +
                            std::to_string(differs.first - expected.begin()));
  const uint8_t* tensors = data.data() + expected.size();
  if (stored.kind == StoredFile::Kind::planes) add_planes(manifest.program, stored, tensors, stage);
  if (stored.kind == StoredFile::Kind::resident) add_resident(manifest.program, stored, tensors, stage);
  if (stored.kind == StoredFile::Kind::factors) add_factors(manifest.program, stored, tensors, stage);
  stage->done[index] = true;
  stage->reads.push_back(entry);
}

void Artifact::load(const Needs& needs) {
  const std::vector<bool> wanted = state_->wanted(needs);
  Program& program = state_->manifest.program;
  Stage stage{program.weights, program.factors, {}, state_->done, state_->reads};
  stage.fresh.resize(program.layers.size());
  for (size_t i = 0; i < wanted.size(); ++i)
    if (wanted[i] && !state_->done[i]) state_->read(i, &stage);
  program.weights.swap(stage.weights);
  program.factors.swap(stage.factors);
  state_->done.swap(stage.done);
  state_->reads.swap(stage.reads);
}

}  // namespace bitstrata
