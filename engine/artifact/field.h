// A value of the manifest together with its place in it, so that whatever is wrong is reported by name.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>

#include "json.h"

namespace bitstrata::artifact {

// A field refers to the one that holds it, which must outlive it. All checks throw ArtifactError (content) that names
// the file, the place, what was expected and what is there.
class Field {
 public:
  explicit Field(const JsonDocument& document) : document_(&document) {}

  std::string place() const;  // "program.layers[3].shape"
  std::string_view raw() const { return document_->raw(item_); }
  const JsonItem& item() const { return document_->item(item_); }
  [[noreturn]] void fail(const std::string& message) const;
  [[noreturn]] void wrong(const std::string& expected) const;

  bool is(JsonKind kind) const { return item().kind == kind; }
  bool is(std::string_view canonical) const { return raw() == canonical; }
  bool boolean() const;
  int64_t integer(int64_t low, int64_t high) const;
  double real() const;
  std::string text() const;    // any string
  std::string name() const;    // 1 to 4096 characters, no control characters
  std::string sha256() const;  // 64 lower-case hexadecimal digits

  // Objects. `expect_members` makes sure that there are these members (or, of the optional one, perhaps not) and no
  // others.
  bool has(std::string_view key) const;
  Field operator[](const char* key) const;
  void expect_members(std::initializer_list<const char*> keys, const char* optional = nullptr) const;

  // Arrays.
  size_t count() const;
  void expect_count(size_t count) const;
  template <typename Use>
  void each(Use use) const {
    expect_array();
    int64_t index = 0;
    for (uint32_t at = item_ + 1; at < item().next; at = document_->item(at).next)
      use(Field(this, at, nullptr, index++));
  }
  template <size_t N>
  std::array<int64_t, N> integers(int64_t low, int64_t high) const {
    expect_count(N);
    std::array<int64_t, N> found{};
    size_t index = 0;
    each([&](const Field& field) { found[index++] = field.integer(low, high); });
    return found;
  }

 private:
  Field(const Field* parent, uint32_t item, const char* key, int64_t index)
      : document_(parent->document_), parent_(parent), item_(item), key_(key), index_(index) {}

  void expect_array() const;
  uint32_t find(std::string_view key) const;  // the member's value, or 0

  const JsonDocument* document_;
  const Field* parent_ = nullptr;
  uint32_t item_ = 0;
  const char* key_ = nullptr;
  int64_t index_ = 0;
};

// The start of a text that may be long, for messages.
std::string shortened(std::string_view text);

}  // namespace bitstrata::artifact
