// What goes wrong between an artifact and a plan: one exception type, whose kind says who can mend it.
#pragma once

#include <stdexcept>
#include <string>

namespace bitstrata {

class ArtifactError : public std::runtime_error {
 public:
  enum class Kind {
    source,   // a file could not be delivered: it is missing, too long, no regular file, or reading it failed
    content,  // a file's bytes are not what spec/artifact.md or the manifest say
    program,  // the program, or its plan at some precisions, breaks spec/numerics.md
    request,  // the caller asked for what the artifact does not have
    newer,    // the artifact is of a later format version than this reader knows
  };

  // file: name of the file at fault within the artifact, or "" where no file is. The message is "<file>: <message>".
  ArtifactError(Kind kind, const std::string& file, const std::string& message)
      : std::runtime_error(file.empty() ? message : file + ": " + message), kind_(kind), file_(file) {}

  Kind kind() const { return kind_; }
  const std::string& file() const { return file_; }

 private:
  Kind kind_;
  std::string file_;
};

}  // namespace bitstrata
