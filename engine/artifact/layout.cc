#include "layout.h"

#include <algorithm>
#include <initializer_list>
#include <numeric>

namespace bitstrata::artifact {

namespace {

// A safetensors header as it grows.
class Header {
 public:
  template <typename Shape>
  void add(const std::string& key, const char* dtype, const Shape& shape, int64_t bytes) {
    text_ += (end_ > 0 || text_.size() > 1) ? "," : "";
    text_ += "\"" + key + "\":{\"dtype\":\"" + dtype + "\",\"shape\":[";
    bool first = true;
    for (int64_t size : shape) {
      text_ += (first ? "" : ",") + std::to_string(size);
      first = false;
    }
    text_ += "],\"data_offsets\":[" + std::to_string(end_) + "," + std::to_string(end_ + bytes) + "]}";
    end_ += bytes;
  }

  std::string finish() {
    text_ += "}";
    text_.resize((text_.size() + 7) / 8 * 8, ' ');
    std::string length(8, '\0');
    for (int i = 0; i < 8; ++i) length[i] = static_cast<char>(text_.size() >> (8 * i) & 255);
    return length + text_;
  }

  uint64_t payload() const { return static_cast<uint64_t>(end_); }

 private:
  std::string text_ = "{";
  int64_t end_ = 0;
};

Header tensors(const Program& program, const StoredFile& file) {
  Header found;
  if (file.kind == StoredFile::Kind::factors) {
    const int64_t channels = channels_of(program, file.key), steps = steps_of(program, file.key);
    found.add("affine", "F64", std::initializer_list<int64_t>{2, channels}, 16 * channels);
    found.add("step", "F64", std::initializer_list<int64_t>{steps}, 8 * steps);
    return found;
  }
  for (size_t i = 0; i < program.layers.size(); ++i) {
    const Layer& layer = program.layers[i];
    if (!holds(file, layer)) continue;
    const int64_t planes = file.last - file.first + 1, packed = packed_size(layer.weights());
    if (layer.planes) {
      found.add(std::to_string(i), "U8", std::initializer_list<int64_t>{planes, packed}, planes * packed);
    } else {
      found.add(std::to_string(i), "I8", layer.dims, layer.weights());
    }
  }
  return found;
}

int narrowest(const Layer& layer) {
  int bits = layer.source_bits;
  for (const LayerPrecision& at : layer.at) bits = std::min(bits, at.weight_bits);
  return bits;
}

}  // namespace

std::vector<StoredFile> stored_files(const Program& program) {
  std::vector<StoredFile> files;
  int base = 9, top = 0;
  bool resident = false;
  for (const Layer& layer : program.layers) {
    resident |= !layer.planes;
    if (layer.planes) base = std::min(base, narrowest(layer)), top = std::max(top, layer.source_bits);
  }
  using Kind = StoredFile::Kind;
  if (top > 0) files.push_back({"base.safetensors", Kind::planes, 1, base, 0});
  for (int plane = base + 1; plane <= top; ++plane)
    files.push_back({"stratum-" + std::to_string(plane) + ".safetensors", Kind::planes, plane, plane, 0});
  if (resident) files.push_back({"resident.safetensors", Kind::resident, 0, 0, 0});
  for (size_t i = 0; i < program.precisions.size() + program.plans.size(); ++i) {
    const size_t plan = i - program.precisions.size();
    const std::string key =
        i < program.precisions.size() ? std::to_string(program.precisions[i]) : program.plans[plan].name;
    files.push_back({"factors-" + key + ".safetensors", Kind::factors, 0, 0, static_cast<int>(i)});
  }
  return files;
}

bool holds(const StoredFile& file, const Layer& layer) {
  if (file.kind == StoredFile::Kind::planes) return layer.planes && layer.source_bits >= file.last;
  return file.kind == StoredFile::Kind::resident && !layer.planes;
}

int64_t packed_size(int64_t weights) { return (weights + 7) / 8; }

std::vector<int> affines_of(const Program& program, int key) {
  const int precisions = static_cast<int>(program.precisions.size());
  if (key >= precisions) return program.plans[key - precisions].affines;
  std::vector<int> all(program.affines.size());
  std::iota(all.begin(), all.end(), 0);
  return all;
}

int64_t channels_of(const Program& program, int key) {
  int64_t channels = 0;
  for (int affine : affines_of(program, key)) channels += program.affines[affine].channels;
  return channels;
}

int64_t steps_of(const Program& program, int key) {
  return key < static_cast<int>(program.precisions.size()) ? static_cast<int64_t>(program.layers.size()) : 0;
}

std::string header(const Program& program, const StoredFile& file) { return tensors(program, file).finish(); }

uint64_t payload(const Program& program, const StoredFile& file) { return tensors(program, file).payload(); }

}  // namespace bitstrata::artifact
