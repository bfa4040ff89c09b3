// Canonical JSON (spec/artifact.md, section 2): every value has one spelling, and no other is read.
//
// A document is kept as its text and a list of items, one a value or key in the order of the text, 16 bytes each; so
// memory is bounded by a small multiple of the text's, whatever it holds.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace bitstrata::artifact {

enum class JsonKind : uint32_t { null, boolean, integer, real, string, array, object };

struct JsonItem {
  uint32_t begin, end;  // in the text; of a string, with its quotes
  uint32_t next;        // the item after this one and everything within it
  JsonKind kind;
};

// In an object, each key is an item (a string) and is followed by its value.
class JsonDocument {
 public:
  static constexpr int kMaxDepth = 32;

  // Throws ArtifactError (content) that names `file` and the byte, unless `text` is canonical. text: below 2^32 bytes.
  JsonDocument(std::string text, const std::string& file);

  const std::string& text() const { return text_; }
  const std::string& file() const { return file_; }
  const JsonItem& item(uint32_t index) const { return items_[index]; }
  std::string_view raw(uint32_t index) const;
  int64_t integer(uint32_t index) const;
  double real(uint32_t index) const;
  std::string string(uint32_t index) const;  // decoded, UTF-8

 private:
  friend class JsonParser;
  std::string text_, file_;
  std::vector<JsonItem> items_;
};

// The canonical spelling of a finite double. Two ways that agree: the library's shortest conversion where it has one,
// and one by trial.
std::string canonical_float(double value);
std::string canonical_float_by_trial(double value);

// The double that a canonical float's text stands for; infinity beyond the range.
double read_float(std::string_view text);
double read_float_by_stream(std::string_view text);

// The text of a canonical string without its quotes.
std::string decode_string(std::string_view text);

}  // namespace bitstrata::artifact
