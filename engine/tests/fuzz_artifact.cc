// Fuzzing the reader of artifacts (libFuzzer). An input is an artifact held in memory: a byte of options, then for each
// file the length of its name (one byte), the name, the length of its bytes (u32, little endian) and the bytes.
//
// Options: bit 0 mends hashes, sizes and headers before reading, so that what lies behind them is reached; the others
// choose the order in which precisions are loaded. Besides what the sanitizers see, it ends if a failed load changed
// something, or if a program that was accepted breaks what program.h promises.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>

#include "manifest.h"
#include "sha256.h"

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

namespace {

using namespace bitstrata;
using namespace bitstrata::artifact;

using Files = std::map<std::string, std::string>;

constexpr size_t kMaxMended = 1 << 16;  // of a file that is made up to the length which its header needs

struct Input {
  uint8_t options = 0;
  Files files;
};

Input unpack(const uint8_t* data, size_t size) {
  Input input;
  size_t at = 0;
  const auto take = [&](size_t count) {
    const size_t taken = std::min(count, size - at);
    at += taken;
    return std::string(data + at - taken, data + at);
  };
  if (size > 0) input.options = data[at++];
  while (at < size) {
    std::string name = take(data[at] + 1u).substr(1), length = take(4);
    length.resize(4, '\0');
    uint32_t count = 0;
    for (int i = 3; i >= 0; --i) count = count << 8 | static_cast<uint8_t>(length[i]);
    input.files[name] = take(count);
  }
  return input;
}

std::string pack(const Input& input) {
  std::string packed(1, static_cast<char>(input.options));
  for (const auto& [name, data] : input.files) {
    packed += static_cast<char>(std::min<size_t>(name.size(), 255));
    packed += name.substr(0, 255);
    for (int i = 0; i < 4; ++i) packed += static_cast<char>(data.size() >> (8 * i));
    packed += data;
  }
  return packed;
}

// The file as long as it must be and with the header that it must have.
std::string mended(const Program& program, const StoredFile& file, const std::string& data) {
  std::string found = header(program, file);
  const size_t head = found.size(), size = head + payload(program, file);
  if (size > kMaxMended) return data;
  if (data.size() > head) found += data.substr(head);
  found.resize(size, '\0');
  return found;
}

std::string file_entry(const std::string& name, const std::string& data, uint64_t size) {
  return "{\"name\":\"" + name + "\",\"sha256\":\"" + sha256_hex(data.data(), data.size()) +
         "\",\"size\":" + std::to_string(size) + "}";
}

// Everything that follows from the manifest's program made as it must be; throws where there is no valid program.
void mend(Files* files) {
  const JsonDocument document((*files)[kManifest], kManifest);
  const Field root(document);
  const Program program = decode_program(root["program"]);
  const std::vector<StoredFile> stored = stored_files(program);
  std::string entries;
  for (const StoredFile& file : stored) {
    std::string& data = (*files)[file.name];
    data = mended(program, file, data);
    entries += (entries.empty() ? "" : ",") +
               file_entry(file.name, data, header(program, file).size() + payload(program, file));
  }
  const std::string provenance = root.has("provenance") ? std::string(root["provenance"].raw()) : "{}";
  const std::string before = "{\"files\":[" + entries +
                             "],\"format\":\"bitstrata.strata\",\"program\":" + std::string(root["program"].raw()) +
                             ",\"provenance\":" + provenance;
  const std::string after = ",\"strata\":" + strata_text(stored) + ",\"version\":1}";
  const std::string whole = before + after;
  (*files)[kManifest] = before + ",\"sha256\":\"" + sha256_hex(whole.data(), whole.size()) + "\"" + after;
}

void require(bool condition) {
  if (!condition) std::abort();
}

void check_program(const Program& program) {
  require(program.values.size() == program.nodes.size() && program.weights.size() == program.layers.size());
  require(program.values[program.output].kind == NodeValue::Kind::fixed);
  for (size_t i = 0; i < program.nodes.size(); ++i) {
    for (int input : program.nodes[i].inputs) require(input >= 0 && static_cast<size_t>(input) < i);
    require(program.values[i].shape.c >= 1 && program.values[i].shape.c <= 1 << 16);
    require(program.values[i].shape.elements() >= 1 && program.values[i].shape.elements() <= 1 << 28);
    require((program.values[i].layer >= 0) == (program.values[i].kind != NodeValue::Kind::fixed));
  }
  for (size_t i = 0; i < program.layers.size(); ++i) {
    const Weights& weights = program.weights[i];
    require((weights.codes == nullptr) == (weights.bits == 0) && weights.bits <= program.layers[i].source_bits);
    if (weights.codes == nullptr) continue;
    require(static_cast<int64_t>(weights.codes->size()) == program.layers[i].weights());
    const int half = 1 << (weights.bits - 1);
    for (int8_t code : *weights.codes) require(code >= -half && code < half);
  }
  for (const auto& factors : program.factors) {
    if (factors == nullptr) continue;
    for (int affine : factors->affines())
      for (int64_t c = 0; c < program.affines[affine].channels; ++c)
        require(std::isfinite(factors->line(affine).mul[c]) && std::isfinite(factors->line(affine).add[c]));
    for (double step : factors->steps()) require(step >= 1e-30 && step <= 1e30);
  }
}

bool same_weights(const Program& program, const std::vector<Weights>& before) {
  return std::equal(before.begin(), before.end(), program.weights.begin(),
                    [](const Weights& a, const Weights& b) { return a.bits == b.bits && a.codes == b.codes; });
}

void load(Artifact* artifact, const Needs& needs) {
  const std::vector<Weights> weights = artifact->program().weights;
  const auto factors = artifact->program().factors;
  const size_t reads = artifact->reads().size();
  try {
    artifact->load(needs);
    require(artifact->reads().size() >= reads);
    check_program(artifact->program());
  } catch (const ArtifactError& error) {
    require(!error.file().empty());
    require(same_weights(artifact->program(), weights) && artifact->program().factors == factors);
    require(artifact->reads().size() == reads);
  }
}

void read_all(const Files& files, unsigned order) {
  std::map<std::string, MemorySource::Span> spans;
  for (const auto& [name, data] : files) spans[name] = {reinterpret_cast<const uint8_t*>(data.data()), data.size()};
  Artifact artifact(std::make_unique<MemorySource>(spans));
  const Program& program = artifact.program();
  check_program(program);
  std::vector<Selection> choices;
  for (int precision : program.precisions) choices.push_back(select(program, precision));
  for (const NamedPlan& plan : program.plans) choices.push_back(select(program, plan.name));
  std::shuffle(choices.begin(), choices.end(), std::minstd_rand(order));
  choices.resize(std::min<size_t>(choices.size(), 6));
  for (const Selection& choice : choices) {
    require(artifact.total_bytes(choice) >= artifact.reads().front().size);
    load(&artifact, artifact.needs(choice));
  }
}

// Mutation of the manifest value by value, so that most results are still JSON.

std::vector<uint32_t> values_of(const JsonDocument& document) {
  std::vector<uint32_t> found = {0};
  for (size_t i = 0; i < found.size(); ++i) {
    const JsonItem& item = document.item(found[i]);
    const bool object = item.kind == JsonKind::object;
    if (!object && item.kind != JsonKind::array) continue;
    for (uint32_t at = found[i] + 1; at < item.next; at = document.item(found.back()).next)
      found.push_back(at + object);
  }
  return found;
}

std::string other_value(const JsonDocument& document, const std::vector<uint32_t>& values, uint32_t index,
                        std::minstd_rand& random) {
  static const char* const kValues[] = {
      "0",   "1",    "2",    "-1",    "8",     "9",     "64",    "255",     "256",       "65536",
      "0.0", "-0.0", "0.5",  "1e-31", "1e+30", "2e+30", "null",  "true",    "268435456", "9223372036854775807",
      "[]",  "{}",   "\"\"", "\"x\"", "[[]]",  "[0,0]", "[1,1]", "[0,1,1]", "[1,1,1,1]", "[null,null]"};
  if (random() % 2 == 0) return kValues[random() % (sizeof kValues / sizeof kValues[0])];
  if (document.item(index).kind == JsonKind::integer && random() % 2 == 0)
    return std::to_string(static_cast<int64_t>(static_cast<uint64_t>(document.integer(index)) + random() % 5 - 2));
  return std::string(document.raw(values[random() % values.size()]));
}

std::string mutate_json(const std::string& text, std::minstd_rand& random) {
  const JsonDocument document(text, kManifest);
  const std::vector<uint32_t> values = values_of(document);
  const uint32_t index = values[random() % values.size()];
  size_t begin = document.item(index).begin, end = document.item(index).end;
  std::string other = other_value(document, values, index, random);
  if (begin > 0 && text[begin - 1] != ':') {  // an item of an array
    const unsigned choice = random() % 4;
    if (choice == 0) other = std::string(document.raw(index)) + "," + other;
    if (choice == 1) {
      other.clear();
      if (text[end] == ',') {
        ++end;
      } else if (text[begin - 1] == ',') {
        --begin;
      }
    }
  }
  return text.substr(0, begin) + other + text.substr(end);
}

std::string mutate_bytes(std::string data, size_t more) {
  const size_t size = data.size();
  data.resize(size + more);
  data.resize(LLVMFuzzerMutate(reinterpret_cast<uint8_t*>(data.data()), size, data.size()));
  return data;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input = unpack(data, size);
  try {
    if (input.options & 1) mend(&input.files);
    read_all(input.files, input.options >> 1);
  } catch (const ArtifactError& error) {
    require(error.file() == kManifest);
    require(std::strlen(error.what()) > 0);
  }
  return 0;
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed) {
  std::minstd_rand random(seed);
  Input input = unpack(data, size);
  const unsigned choice = random() % 8;
  if (choice == 0 || input.files.empty()) return LLVMFuzzerMutate(data, size, max_size);
  if (choice == 1) input.options = static_cast<uint8_t>(random());
  if (choice == 2 || choice == 3) {
    auto file = std::next(input.files.begin(), random() % input.files.size());
    file->second = mutate_bytes(file->second, 16);
  }
  try {
    for (unsigned i = 0; choice >= 4 && i < 1 + random() % 3; ++i)
      input.files[kManifest] = mutate_json(input.files[kManifest], random);
  } catch (const ArtifactError&) {  // no JSON any more
    input.files[kManifest] = mutate_bytes(input.files[kManifest], 16);
  }
  const std::string packed = pack(input);
  if (packed.size() > max_size) return LLVMFuzzerMutate(data, size, max_size);
  std::memcpy(data, packed.data(), packed.size());
  return packed.size();
}
