// Artifacts: opening from directories, memory and callbacks; what they hold.
#include <algorithm>

#include "bitstrata/error.h"
#include "handles.h"
#include "status.h"

namespace bitstrata::capi {
namespace {

class CallbackSource : public Source {
 public:
  explicit CallbackSource(const bs_source& source) : source_(source) {}
  ~CallbackSource() override {
    if (source_.close != nullptr) source_.close(source_.user);
  }

  Bytes read(const std::string& name, uint64_t limit) override {
    uint64_t bytes = 0;
    if (source_.size(source_.user, name.c_str(), &bytes) != 0)
      throw ArtifactError(ArtifactError::Kind::source, name, "the source does not have it");
    if (bytes > limit)
      throw ArtifactError(ArtifactError::Kind::source, name,
                          "has " + std::to_string(bytes) + " bytes, at most " + std::to_string(limit) + " are allowed");
    Bytes data(static_cast<size_t>(bytes));
    if (bytes > 0 && source_.read(source_.user, name.c_str(), data.data(), bytes) != 0)
      throw ArtifactError(ArtifactError::Kind::source, name, "the source cannot read it");
    return data;
  }

 private:
  const bs_source source_;
};

std::string file_name(const bs_file& file, const std::string& argument) {
  const std::string name = &required(file.name, (argument + "->name").c_str());
  if (file.data == nullptr && file.bytes > 0) invalid(argument + "->data is NULL, its bytes are not 0");
  return name;
}

MemorySource::Span span_of(const bs_file& file) {
  return {static_cast<const uint8_t*>(file.data), static_cast<size_t>(file.bytes)};
}

bs_artifact* open(std::unique_ptr<Source> source) {
  return new bs_artifact{std::make_shared<SharedArtifact>(std::move(source))};
}

template <typename T>
const T& entry(const std::vector<T>& table, size_t index) {
  if (index >= table.size())
    invalid("index is " + std::to_string(index) + ", there are " + std::to_string(table.size()));
  return table[index];
}

void copy_shape(const Shape& shape, int32_t* to) {
  to[0] = static_cast<int32_t>(shape.c);
  to[1] = static_cast<int32_t>(shape.h);
  to[2] = static_cast<int32_t>(shape.w);
}

const SharedArtifact& shared(const bs_artifact* artifact) { return *required(artifact, "artifact").shared; }

}  // namespace

Bytes SuppliedSource::read(const std::string& name, uint64_t limit) {
  const auto found = supplied_.find(name);
  if (found == supplied_.end()) return own_->read(name, limit);
  if (found->second.size() > limit)
    throw ArtifactError(
        ArtifactError::Kind::source, name,
        "has " + std::to_string(found->second.size()) + " bytes, at most " + std::to_string(limit) + " are allowed");
  return found->second;
}

Selection SharedArtifact::select(const bs_choice& choice) const {
  const int given = (choice.precision != 0) + (choice.plan != nullptr) + (choice.map != nullptr);
  if (given != 1)
    invalid("choice: exactly one of precision, plan and map must be given, there are " + std::to_string(given));
  if (choice.precision != 0) return bitstrata::select(program(), choice.precision);
  if (choice.plan != nullptr) return bitstrata::select(program(), std::string(choice.plan));
  const auto& layers = program().layers;
  if (choice.map_count != layers.size())
    invalid("choice: map_count is " + std::to_string(choice.map_count) + ", the artifact has " +
            std::to_string(layers.size()) + " layers");
  std::vector<std::pair<std::string, int>> map;
  for (size_t i = 0; i < layers.size(); ++i) map.emplace_back(layers[i].name, choice.map[i]);
  return bitstrata::select(program(), map);
}

Plan SharedArtifact::derived(const Selection& selection) {
  const std::lock_guard<std::mutex> lock(mutex_);
  artifact_.load(selection);
  for (const FileEntry& file : artifact_.reads()) source_.drop(file.name);
  try {
    return derive(artifact_.program(), selection);
  } catch (const ArtifactError& error) {
    throw ApiError(BS_NOT_DERIVABLE, error.what());
  }
}

void SharedArtifact::supply(const bs_file& file) {
  const std::string name = file_name(file, "file");
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto& files = artifact_.files();
  if (std::none_of(files.begin(), files.end(), [&](const FileEntry& f) { return f.name == name; }))
    invalid("file->name is '" + name + "', which the manifest does not list");
  if (is_read(name)) invalid("file->name is '" + name + "', which has been read already");
  const MemorySource::Span span = span_of(file);
  source_.supply(name, Bytes(span.data, span.data + span.size));
}

bool SharedArtifact::is_read(const std::string& name) const {
  const auto& reads = artifact_.reads();
  return std::any_of(reads.begin(), reads.end(), [&](const FileEntry& f) { return f.name == name; });
}

std::vector<const FileEntry*> SharedArtifact::missing(const Selection& selection) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<const FileEntry*> result;
  for (const FileEntry& needed : artifact_.files_needed(artifact_.needs(selection))) {
    if (is_read(needed.name)) continue;
    for (const FileEntry& file : artifact_.files())
      if (file.name == needed.name) result.push_back(&file);
  }
  return result;
}

int SharedArtifact::held_bits(size_t layer) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return program().weights[layer].bits;
}

SharedArtifact::Held SharedArtifact::held() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  Held held{0, 0};
  for (const Weights& weights : program().weights)
    if (weights.codes) held.codes += weights.codes->size();
  for (const auto& factors : program().factors) {
    if (!factors) continue;
    size_t numbers = factors->steps().size();
    for (const int affine : factors->affines())
      numbers += 2 * static_cast<size_t>(program().affines[static_cast<size_t>(affine)].channels);
    held.factors += numbers * sizeof(double);
  }
  return held;
}

}  // namespace bitstrata::capi

using namespace bitstrata;
using namespace bitstrata::capi;

extern "C" {

bs_status bs_artifact_open(const char* directory, bs_artifact** artifact) {
  return guarded("bs_artifact_open", [&] {
    required(artifact, "artifact");
    *artifact = open(std::make_unique<DirectorySource>(&required(directory, "directory")));
  });
}

bs_status bs_artifact_open_files(const bs_file* files, size_t count, bs_artifact** artifact) {
  return guarded("bs_artifact_open_files", [&] {
    required(artifact, "artifact");
    if (count > 0) required(files, "files");
    std::map<std::string, MemorySource::Span> spans;
    for (size_t i = 0; i < count; ++i) {
      const std::string name = file_name(files[i], "files[" + std::to_string(i) + "]");
      if (!spans.emplace(name, span_of(files[i])).second) invalid("files: '" + name + "' is given twice");
    }
    *artifact = open(std::make_unique<MemorySource>(std::move(spans)));
  });
}

bs_status bs_artifact_open_source(const bs_source* source, bs_artifact** artifact) {
  return guarded("bs_artifact_open_source", [&] {
    required(artifact, "artifact");
    const bs_source given = read_struct(source, "source", bs_source{});
    if (given.size == nullptr || given.read == nullptr) invalid("source->size or source->read is NULL");
    *artifact = open(std::make_unique<CallbackSource>(given));
  });
}

void bs_artifact_free(bs_artifact* artifact) { delete artifact; }

bs_status bs_artifact_supply(bs_artifact* artifact, const bs_file* file) {
  return guarded("bs_artifact_supply", [&] { required(artifact, "artifact").shared->supply(required(file, "file")); });
}

bs_status bs_artifact_info(const bs_artifact* artifact, bs_info* info) {
  return guarded("bs_artifact_info", [&] {
    const SharedArtifact& from = shared(artifact);
    check_size(required(info, "info"), "info");
    const Program& program = from.program();
    bs_info value{};
    value.input_kind = program.pixels ? BS_PIXELS : BS_CODES;
    copy_shape(program.input_shape, value.input_shape);
    copy_shape(program.values[static_cast<size_t>(program.output)].shape, value.output_shape);
    value.precisions = program.precisions.size();
    value.plans = program.plans.size();
    value.layers = program.layers.size();
    from.sha256().copy(value.sha256, sizeof value.sha256 - 1);
    write_struct(value, info);
  });
}

bs_status bs_artifact_precision(const bs_artifact* artifact, size_t index, int32_t* precision) {
  return guarded("bs_artifact_precision",
                 [&] { required(precision, "precision") = entry(shared(artifact).program().precisions, index); });
}

bs_status bs_artifact_plan(const bs_artifact* artifact, size_t index, const char** name) {
  return guarded("bs_artifact_plan",
                 [&] { required(name, "name") = entry(shared(artifact).program().plans, index).name.c_str(); });
}

bs_status bs_artifact_layer(const bs_artifact* artifact, size_t index, bs_layer* layer) {
  return guarded("bs_artifact_layer", [&] {
    const SharedArtifact& from = shared(artifact);
    check_size(required(layer, "layer"), "layer");
    const Layer& l = entry(from.program().layers, index);
    bs_layer value{};
    value.name = l.name.c_str();
    std::transform(l.dims.begin(), l.dims.end(), value.shape, [](int64_t n) { return static_cast<int32_t>(n); });
    value.source_bits = l.source_bits;
    value.planes = l.planes;
    value.held_bits = from.held_bits(index);
    write_struct(value, layer);
  });
}

bs_status bs_artifact_missing_count(const bs_artifact* artifact, const bs_choice* choice, size_t* count) {
  return guarded("bs_artifact_missing_count", [&] {
    const SharedArtifact& from = shared(artifact);
    const Selection selection = from.select(read_struct(choice, "choice", bs_choice BS_CHOICE_INIT));
    required(count, "count") = from.missing(selection).size();
  });
}

bs_status bs_artifact_missing(const bs_artifact* artifact, const bs_choice* choice, size_t index, bs_file* file) {
  return guarded("bs_artifact_missing", [&] {
    const SharedArtifact& from = shared(artifact);
    const Selection selection = from.select(read_struct(choice, "choice", bs_choice BS_CHOICE_INIT));
    const FileEntry& missing = *entry(from.missing(selection), index);
    required(file, "file") = {missing.name.c_str(), nullptr, missing.size};
  });
}

}  // extern "C"
