#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <limits>
#include <system_error>
#include <utility>

#include "bitstrata/artifact.h"
#include "field.h"

namespace bitstrata {

namespace {

[[noreturn]] void fail(const std::string& name, const std::string& message) {
  throw ArtifactError(ArtifactError::Kind::source, name, message);
}

std::string system_message(int error) { return std::generic_category().message(error); }

// A plain file name of an artifact: no separators, no leading dot.
void check_name(const std::string& name) {
  const char* allowed = "abcdefghijklmnopqrstuvwxyz0123456789._-";
  const bool sized = !name.empty() && name.size() <= 128;
  if (!sized || name.find_first_not_of(allowed) != std::string::npos || name[0] == '.' || name[0] == '_' ||
      name[0] == '-')
    fail("",
         "file name '" + artifact::shortened(name) +
             "' is not allowed: names have 1 to 128 of the characters a-z 0-9 . _ - and start with a letter or digit");
}

void check_limit(const std::string& name, uint64_t size, uint64_t limit) {
  if (size > limit)
    fail(name, "has " + std::to_string(size) + " bytes, at most " + std::to_string(limit) + " are allowed");
}

void check_regular(const std::string& name, mode_t mode) {
  if (S_ISREG(mode)) return;
  const char* kind = S_ISLNK(mode) ? "a symbolic link" : S_ISDIR(mode) ? "a directory" : "a special file";
  fail(name, std::string("is ") + kind + "; the files of an artifact are regular files");
}

class Descriptor {
 public:
  explicit Descriptor(int value) : value_(value) {}
  ~Descriptor() {
    if (value_ >= 0) close(value_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return value_; }

 private:
  int value_;
};

// Up to `size` bytes; fewer if the file ends earlier.
Bytes read_up_to(const std::string& name, int descriptor, uint64_t size) {
  if (size > std::numeric_limits<size_t>::max() / 2) fail(name, "is larger than this machine's memory");
  Bytes data(static_cast<size_t>(size));
  uint64_t done = 0;
  while (done < size) {
    const ssize_t got = ::read(descriptor, data.data() + done, size - done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail(name, "cannot be read: " + system_message(errno));
    if (got == 0) break;
    done += static_cast<uint64_t>(got);
  }
  data.resize(done);
  return data;
}

}  // namespace

DirectorySource::DirectorySource(std::string path) : path_(std::move(path)) {
  struct stat status;
  const bool nul = path_.find('\0') != std::string::npos;  // the system would see another path
  if (nul || stat(path_.c_str(), &status) != 0 || !S_ISDIR(status.st_mode))
    fail("", path_ + ": no such directory; an artifact is a directory with a manifest.json");
}

// The kind is looked at before opening (opening a pipe or a device can act or wait) and again on what was opened, in
// case the entry was exchanged in between.
Bytes DirectorySource::read(const std::string& name, uint64_t limit) {
  check_name(name);
  const std::string path = path_ + "/" + name;
  struct stat status;
  if (lstat(path.c_str(), &status) != 0) fail(name, "cannot be read from " + path_ + ": " + system_message(errno));
  check_regular(name, status.st_mode);
  const Descriptor file(open(path.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  if (file.get() < 0 || fstat(file.get(), &status) != 0)
    fail(name, "cannot be read from " + path_ + ": " + system_message(errno));
  check_regular(name, status.st_mode);
  const uint64_t size = static_cast<uint64_t>(status.st_size);
  check_limit(name, size, limit);
  Bytes data = read_up_to(name, file.get(), size + 1);  // one byte more shows a file that is still growing
  if (data.size() != size) fail(name, "changed while it was read");
  return data;
}

Bytes MemorySource::read(const std::string& name, uint64_t limit) {
  const auto found = files_.find(name);
  if (found == files_.end()) fail(name, "no such file");
  check_limit(name, found->second.size, limit);
  return Bytes(found->second.data, found->second.data + found->second.size);
}

Bytes FunctionSource::read(const std::string& name, uint64_t limit) {
  Bytes data = function_(name, limit);
  check_limit(name, data.size(), limit);
  return data;
}

}  // namespace bitstrata
