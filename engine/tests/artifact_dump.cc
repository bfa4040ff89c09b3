// What the reader makes of artifacts, for comparison with another reader. Reads cases from standard input until its end
// and prints one line of JSON for each of a case's steps, the opening first.
//
// A case: the number of files (u32), their names and bytes; or u32 2^32-1 and the path of a directory; or u32 2^32-2,
// number, names and bytes of files that come from a function without regard to the limit. Then the number of steps
// (u32) and the steps:
//   load <planes> <key>,<key>..   factor keys as in file names
//   everything   |   precision <p>   |   plan <name>   |   map <p>,<p>..  of the layers in their order   |   indices
//   <i>,<i>..  of precisions
// Strings and bytes have their length (u32) before them. Numbers are little endian. An argument "floats" makes it read
// lines of 16 hexadecimal digits, the bits of doubles, and print two spellings and two readings of each.
#include <cstdio>
#include <cstring>
#include <iostream>
#include <sstream>

#include "bitstrata/artifact.h"
#include "json.h"
#include "sha256.h"

namespace {

using namespace bitstrata;
using artifact::canonical_float;

// JSON as it is written: commas and quotes.
class Writer {
 public:
  template <typename Use>
  Writer& list(char open, char close, Use use) {
    item();
    text += open;
    first_ = true;
    use();
    text += close;
    first_ = false;
    return *this;
  }
  template <typename Use>
  Writer& object(Use use) {
    return list('{', '}', use);
  }
  template <typename Items>
  Writer& array(const Items& items) {
    return list('[', ']', [&] {
      for (const auto& each : items) add(each);
    });
  }
  Writer& key(const std::string& name) {
    add(name);
    text += ':';
    first_ = true;
    return *this;
  }
  Writer& add(const std::string& value) {
    item();
    text += '"';
    for (char c : value) {
      char escape[8];
      std::snprintf(escape, sizeof escape, "\\u%04x", static_cast<unsigned char>(c));
      const bool special = c == '"' || c == '\\' || static_cast<unsigned char>(c) < 0x20;
      text += special ? escape : std::string(1, c);
    }
    text += '"';
    return *this;
  }
  Writer& add(const char* value) { return add(std::string(value)); }
  Writer& add(int64_t value) { return raw(std::to_string(value)); }
  Writer& add(uint64_t value) { return raw(std::to_string(value)); }
  Writer& add(int value) { return raw(std::to_string(value)); }
  Writer& add(bool value) { return raw(value ? "true" : "false"); }
  Writer& add(double value) { return raw(canonical_float(value)); }
  Writer& raw(const std::string& value) {
    item();
    text += value;
    return *this;
  }
  std::string text;

 private:
  void item() {
    if (!first_) text += ',';
    first_ = false;
  }
  bool first_ = true;
};

class Dump {
 public:
  explicit Dump(const Program& program) : program_(program) {}

  std::string whole() {
    out_.object([&] {
      out_.key("shape").array(
          std::vector<int64_t>{program_.input_shape.c, program_.input_shape.h, program_.input_shape.w});
      out_.key("pixels").add(program_.pixels);
      out_.key("precisions").array(program_.precisions);
      out_.key("input").add(program_.input).key("output").add(program_.output);
      out_.key("provenance").raw(program_.provenance);
      out_.key("nodes").list('[', ']', [&] {
        for (size_t i = 0; i < program_.nodes.size(); ++i) node(program_.nodes[i], program_.values[i]);
      });
      out_.key("layers").list('[', ']', [&] {
        for (const Layer& item : program_.layers) layer(item);
      });
      out_.key("affines").list('[', ']', [&] {
        for (const Affine& item : program_.affines)
          out_.list('[', ']', [&] { out_.add(item.name).add(item.owner).add(item.channels); });
      });
      out_.key("plans").list('[', ']', [&] {
        for (const NamedPlan& item : program_.plans)
          out_.list('[', ']', [&] { out_.add(item.name).array(item.map).array(item.affines); });
      });
    });
    return out_.text;
  }

 private:
  void node(const Node& item, const NodeValue& value) {
    out_.object([&] {
      out_.key("name").add(item.name).key("op").add(name_of(item.attributes));
      out_.key("inputs").array(item.inputs);
      out_.key("attrs").object([&] { std::visit([&](const auto& attrs) { attributes(attrs); }, item.attributes); });
      out_.key("value").list('[', ']', [&] {
        out_.array(std::vector<int64_t>{value.shape.c, value.shape.h, value.shape.w});
        out_.add(static_cast<int>(value.kind)).add(value.layer).add(value.origin).add(value.aligned);
      });
    });
  }

  void bounds(const RealClip& clip) {
    out_.key("clip").list('[', ']', [&] {
      clip.has_low ? out_.add(clip.low) : out_.raw("null");
      clip.has_high ? out_.add(clip.high) : out_.raw("null");
    });
  }

  template <typename Pool>
  void pool(const Pool& a) {
    out_.key("kernel").array(a.kernel).key("stride").array(a.stride).key("padding").array(a.padding);
  }
  template <typename Axes>
  void axes(const Axes& a) {
    out_.key("c").array(a.c).key("h").array(a.h).key("w").array(a.w);
  }

  void attributes(const InputNode&) {}
  void attributes(const AddNode&) {}
  void attributes(const FlattenNode&) {}
  void attributes(const ConvNode& a) {
    out_.key("layer").add(a.layer).key("stride").array(a.stride).key("padding").array(a.padding);
    out_.key("dilation").array(a.dilation).key("groups").add(a.groups);
  }
  void attributes(const RequantNode& a) {
    out_.key("to").add(a.layer).key("affine").array(a.affines);
    bounds(a.clip);
  }
  void attributes(const RescaleNode& a) {
    out_.key("affine").array(a.affines);
    bounds(a.clip);
  }
  void attributes(const ClipNode& a) { bounds(a.clip); }
  void attributes(const MaxPoolNode& a) { pool(a); }
  void attributes(const AvgPoolNode& a) { pool(a); }
  void attributes(const SliceNode& a) { axes(a); }
  void attributes(const PadNode& a) { axes(a); }

  void layer(const Layer& item) {
    out_.object([&] {
      out_.key("name").add(item.name).key("kind").add(item.linear ? "linear" : "conv").key("shape").array(item.dims);
      out_.key("source_bits").add(item.source_bits).key("planes").add(item.planes).key("grid").add(item.grid);
      out_.key("at").list('[', ']', [&] {
        for (const LayerPrecision& at : item.at)
          out_.list('[', ']', [&] {
            out_.add(at.weight_bits).array(std::vector<int>{at.mul, at.add});
            out_.array(std::vector<int>{at.input_low, at.input_high});
            out_.array(std::vector<int>(at.pad_code.begin(), at.pad_code.end())).array(at.input_offset);
          });
      });
    });
  }

  const Program& program_;
  Writer out_;
};

std::string hash_of(const Program& program, const Factors& factors) {
  artifact::Sha256 hash;
  for (int affine : factors.affines()) {
    const Factors::Line line = factors.line(affine);
    hash.add(line.mul, 8 * program.affines[affine].channels);
    hash.add(line.add, 8 * program.affines[affine].channels);
  }
  hash.add(factors.steps().data(), 8 * factors.steps().size());
  return hash.hex();
}

std::string held(const Artifact& artifact) {
  const Program& program = artifact.program();
  Writer out;
  out.object([&] {
    out.key("reads").list('[', ']', [&] {
      for (const FileEntry& file : artifact.reads())
        out.list('[', ']', [&] { out.add(file.name).add(file.size).add(file.sha256); });
    });
    out.key("weights").list('[', ']', [&] {
      for (const Weights& weights : program.weights) {
        if (weights.codes == nullptr) {
          out.raw("null");
          continue;
        }
        const std::string hash = artifact::sha256_hex(weights.codes->data(), weights.codes->size());
        out.list('[', ']', [&] { out.add(weights.bits).add(hash); });
      }
    });
    out.key("factors").list('[', ']', [&] {
      for (const auto& factors : program.factors)
        factors == nullptr ? out.raw("null") : out.add(hash_of(program, *factors));
    });
  });
  return out.text;
}

std::string error_text(const ArtifactError& error) {
  static const char* const kKinds[] = {"source", "content", "program", "request", "newer"};
  Writer out;
  out.object([&] {
    out.key("kind").add(kKinds[static_cast<int>(error.kind())]).key("file").add(error.file());
    out.key("message").add(error.what());
  });
  return out.text;
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

int key_index(const Program& program, const std::string& key) {
  for (size_t i = 0; i < program.precisions.size(); ++i)
    if (std::to_string(program.precisions[i]) == key) return static_cast<int>(i);
  for (size_t i = 0; i < program.plans.size(); ++i)
    if (program.plans[i].name == key) return program.factors_of_plan(static_cast<int>(i));
  return -1;
}

// What the step asks for; a choice of precisions is kept in `chosen`.
Needs needs_of(const Artifact& artifact, const std::string& step, Selection* chosen) {
  const Program& program = artifact.program();
  std::istringstream words(step);
  std::string verb, argument, keys;
  words >> verb >> argument >> keys;
  if (verb == "precision") return artifact.needs(*chosen = select(program, std::stoi(argument)));
  if (verb == "plan") return artifact.needs(*chosen = select(program, argument));
  if (verb == "map") {
    std::vector<std::pair<std::string, int>> map;
    for (const std::string& part : split(argument))
      map.emplace_back(program.layers.at(map.size()).name, std::stoi(part));
    return artifact.needs(*chosen = select(program, map));
  }
  if (verb == "indices") {
    Selection selection;
    for (const std::string& part : split(argument)) selection.map.push_back(std::stoi(part));
    return artifact.needs(selection);
  }
  Needs needs;
  if (verb == "everything") {
    for (size_t i = 0; i < program.factors.size(); ++i) needs.factors.push_back(static_cast<int>(i));
    needs.planes = 8;
    return needs;
  }
  needs.planes = std::stoi(argument);
  for (const std::string& key : split(keys)) needs.factors.push_back(key_index(program, key));
  return needs;
}

constexpr uint32_t kDirectory = UINT32_MAX, kCareless = UINT32_MAX - 1;

uint32_t read_u32() {
  uint8_t bytes[4] = {};
  std::cin.read(reinterpret_cast<char*>(bytes), 4);
  return bytes[0] | bytes[1] << 8 | bytes[2] << 16 | uint32_t{bytes[3]} << 24;
}

std::string read_string() {
  std::string text(read_u32(), '\0');
  std::cin.read(text.data(), static_cast<std::streamsize>(text.size()));
  return text;
}

std::unique_ptr<Source> source_of(uint32_t kind, const std::string& directory,
                                  const std::map<std::string, std::string>& files) {
  if (kind == kDirectory) return std::make_unique<DirectorySource>(directory);
  if (kind == kCareless)
    return std::make_unique<FunctionSource>([&files](const std::string& name, uint64_t) {
      const std::string& data = files.at(name);
      return Bytes(data.begin(), data.end());
    });
  std::map<std::string, MemorySource::Span> spans;
  for (const auto& [name, data] : files) spans[name] = {reinterpret_cast<const uint8_t*>(data.data()), data.size()};
  return std::make_unique<MemorySource>(spans);
}

void run_case() {
  const uint32_t kind = read_u32();
  if (!std::cin) return;
  std::string directory;
  std::map<std::string, std::string> files;
  if (kind == kDirectory) {
    directory = read_string();
  } else {
    const uint32_t count = kind == kCareless ? read_u32() : kind;
    for (uint32_t i = 0; i < count; ++i) {
      std::string name = read_string();
      files[name] = read_string();
    }
  }
  std::vector<std::string> steps(read_u32());
  for (std::string& step : steps) step = read_string();
  std::unique_ptr<Artifact> artifact;
  try {
    artifact = std::make_unique<Artifact>(source_of(kind, directory, files));
    std::cout << "{\"sha256\":\"" << artifact->sha256() << "\",\"program\":" << Dump(artifact->program()).whole()
              << "}\n";
  } catch (const ArtifactError& error) {
    std::cout << "{\"error\":" << error_text(error) << "}\n";
  }
  for (const std::string& step : steps) {
    if (artifact == nullptr) {
      std::cout << "null\n";
      continue;
    }
    std::string error = "null";
    uint64_t total = 0;
    try {
      Selection chosen;
      artifact->load(needs_of(*artifact, step, &chosen));
      if (!chosen.map.empty()) total = artifact->total_bytes(chosen);
    } catch (const ArtifactError& found) {
      error = error_text(found);
    }
    std::cout << "{\"error\":" << error << ",\"total\":" << total << ",\"held\":" << held(*artifact) << "}\n";
  }
  std::cout << std::flush;
}

int print_floats() {
  for (std::string line; std::getline(std::cin, line);) {
    const uint64_t bits = std::stoull(line, nullptr, 16);
    double value;
    std::memcpy(&value, &bits, 8);
    const std::string text = canonical_float(value);
    const bool same = artifact::read_float(text) == value && artifact::read_float_by_stream(text) == value;
    std::cout << text << ' ' << artifact::canonical_float_by_trial(value) << ' ' << same << '\n';
  }
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  std::ios::sync_with_stdio(false);
  if (count > 1 && std::string(arguments[1]) == "floats") return print_floats();
  while (std::cin.peek() != std::char_traits<char>::eof()) run_case();
  return 0;
}
