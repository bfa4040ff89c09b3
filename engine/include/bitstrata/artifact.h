// Reading artifacts (spec/artifact.md): a program file by file, as precisions are asked for.
//
//   Artifact artifact(std::make_unique<DirectorySource>("net.strata"));
//   Selection two = select(artifact.program(), 2);
//   artifact.load(two);                       // base, resident, strata to the bits needed, factors of precision 2
//   artifact.load(select(artifact.program(), 4));   // only what is missing
//
// Errors are ArtifactError; besides, std::bad_alloc if memory runs out. Nothing is allocated by a number that has not
// been verified: the manifest is at most 2^24 bytes, and memory for codes and factors is taken when the file that holds
// them has been read and its length and hash found right.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bitstrata/error.h"
#include "bitstrata/program.h"

namespace bitstrata {

using Bytes = std::vector<uint8_t>;

// Anything that can deliver an artifact's files.
class Source {
 public:
  virtual ~Source() = default;
  // The whole content of file `name`. Throws ArtifactError (source) that names the file if there is none, or if it has
  // more than `limit` bytes; then no more than limit + 1 bytes of it are read.
  virtual Bytes read(const std::string& name, uint64_t limit) = 0;
};

// The files of one directory. The directory itself may be a link; its entries must be regular files.
class DirectorySource : public Source {
 public:
  explicit DirectorySource(std::string path);  // throws ArtifactError (source) if it is no directory
  Bytes read(const std::string& name, uint64_t limit) override;

 private:
  std::string path_;
};

// Files in memory, which the caller keeps alive.
class MemorySource : public Source {
 public:
  struct Span {
    const uint8_t* data;
    size_t size;
  };
  explicit MemorySource(std::map<std::string, Span> files) : files_(std::move(files)) {}
  Bytes read(const std::string& name, uint64_t limit) override;

 private:
  std::map<std::string, Span> files_;
};

// Files from a function, which behaves as Source::read. What it returns is checked against the limit.
class FunctionSource : public Source {
 public:
  using Function = std::function<Bytes(const std::string& name, uint64_t limit)>;
  explicit FunctionSource(Function function) : function_(std::move(function)) {}
  Bytes read(const std::string& name, uint64_t limit) override;

 private:
  Function function_;
};

struct FileEntry {
  std::string name;
  std::string sha256;  // of its bytes, lower-case hexadecimal
  uint64_t size;
};

// What a selection needs of an artifact: indices into Program::factors, ascending, and bit-planes of the widest layer.
struct Needs {
  std::vector<int> factors;
  int planes = 0;
};

// An artifact opened for reading. Each file is read whole, at most once, and only when something needs it. Not safe for
// use by several threads at once.
class Artifact {
 public:
  // Reads and checks manifest.json, and nothing else; the graph is checked here as a whole.
  explicit Artifact(std::unique_ptr<Source> source);
  ~Artifact();
  Artifact(Artifact&&) noexcept;
  Artifact& operator=(Artifact&&) noexcept;

  // The program as far as it has been read. The reference stays valid and its graph the same as long as the artifact
  // lives; `load` replaces entries of weights and factors, whose former contents live on where they are still shared.
  const Program& program() const;

  const std::string& sha256() const;            // names the artifact
  const std::vector<FileEntry>& files() const;  // all but the manifest, in its order
  const std::vector<FileEntry>& reads() const;  // read and accepted so far, in order; the manifest first

  Needs needs(const Selection& selection) const;

  // Files with these factors and planes, in the manifest's order, whether read or not; base and resident always.
  std::vector<FileEntry> files_needed(const Needs& needs) const;
  uint64_t total_bytes(const Selection& selection) const;  // of all files that running needs, the manifest included

  // Reads the files not yet read. If one fails, everything is as it was before the call. Throws ArtifactError: source
  // or content (with the file's name), program (factors or codes that no program may have), request (factors or planes
  // that cannot be).
  void load(const Needs& needs);
  void load(const Selection& selection) { load(needs(selection)); }

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace bitstrata
