// Which files an artifact has, which tensors each holds, and the bytes before the tensors (spec/artifact.md, sections 1
// and 4 to 6). All of it follows from the program.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bitstrata/program.h"

namespace bitstrata::artifact {

inline constexpr const char* kManifest = "manifest.json";

// One file but the manifest, by what it holds: bit-planes first..last; whole codes; or Program::factors[key].
struct StoredFile {
  enum class Kind { planes, resident, factors };
  std::string name;
  Kind kind;
  int first = 0, last = 0;
  int key = 0;
};

// In the order in which the manifest lists them. Only the program's layers, precisions and plans matter.
std::vector<StoredFile> stored_files(const Program& program);

// Whether a layer's codes, or some of them, are in the file.
bool holds(const StoredFile& file, const Layer& layer);

int64_t packed_size(int64_t weights);  // bytes of one plane

// The affines of a factors file, ascending, and the sum of their channels.
std::vector<int> affines_of(const Program& program, int key);
int64_t channels_of(const Program& program, int key);
int64_t steps_of(const Program& program, int key);

// The bytes before the first tensor, and those of all tensors together.
std::string header(const Program& program, const StoredFile& file);
uint64_t payload(const Program& program, const StoredFile& file);

}  // namespace bitstrata::artifact
