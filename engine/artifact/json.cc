#include "json.h"

#include <charconv>
#include <cmath>
#include <utility>

#include "bitstrata/error.h"

namespace bitstrata::artifact {

namespace {

constexpr size_t kMaxNumber = 32;  // the longest shortest form of a double has 24 characters

bool is_digit(char c) { return c >= '0' && c <= '9'; }

int hex_digit(char c) { return is_digit(c) ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1; }

// Bytes of the UTF-8 sequence of one scalar value at the start of `text`, or 0: surrogates, values beyond U+10FFFF and
// spellings longer than needed are none.
size_t utf8_length(std::string_view text) {
  const auto byte = [&](size_t at) { return at < text.size() ? static_cast<uint8_t>(text[at]) : 0; };
  const auto tail = [&](size_t at) { return (byte(at) & 0xc0) == 0x80; };
  const uint32_t first = byte(0), second = byte(1);
  if (first < 0x80) return 1;
  if (first >= 0xc2 && first <= 0xdf) return tail(1) ? 2 : 0;
  if (first >= 0xe0 && first <= 0xef) {
    const bool fits = (first != 0xe0 || second >= 0xa0) && (first != 0xed || second <= 0x9f);
    return fits && tail(1) && tail(2) ? 3 : 0;
  }
  if (first >= 0xf0 && first <= 0xf4) {
    const bool fits = (first != 0xf0 || second >= 0x90) && (first != 0xf4 || second <= 0x8f);
    return fits && tail(1) && tail(2) && tail(3) ? 4 : 0;
  }
  return 0;
}

// The character that a canonical escape at the start of `text` stands for, and its length; length 0 if it is none.
std::pair<char, size_t> read_escape(std::string_view text) {
  static constexpr std::string_view kNames = "\"\\bfnrt", kMeant = "\"\\\b\f\n\r\t";
  if (text.size() < 2) return {0, 0};
  const size_t name = kNames.find(text[1]);
  if (name != std::string_view::npos) return {kMeant[name], 2};
  if (text.size() < 6 || text.substr(0, 4) != "\\u00") return {0, 0};
  const int high = hex_digit(text[4]), low = hex_digit(text[5]);
  if (high < 0 || high > 1 || low < 0) return {0, 0};
  const char meant = static_cast<char>(16 * high + low);
  return {meant, kMeant.find(meant) == std::string_view::npos ? 6 : 0};
}

}  // namespace

class JsonParser {
 public:
  explicit JsonParser(JsonDocument* document) : document_(*document), text_(document->text_) {}

  void parse() {
    value(0);
    if (at_ != text_.size()) fail("bytes after the value");
  }

 private:
  [[noreturn]] void fail(const std::string& why) const {
    throw ArtifactError(ArtifactError::Kind::content, document_.file_,
                        "is not canonical JSON, byte " + std::to_string(at_) + ": " + why);
  }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  bool take(char c) {
    if (peek() != c) return false;
    ++at_;
    return true;
  }

  uint32_t open(JsonKind kind) {
    document_.items_.push_back({static_cast<uint32_t>(at_), 0, 0, kind});
    return static_cast<uint32_t>(document_.items_.size() - 1);
  }

  void close(uint32_t index) {
    document_.items_[index].end = static_cast<uint32_t>(at_);
    document_.items_[index].next = static_cast<uint32_t>(document_.items_.size());
  }

  void value(int depth) {
    if (depth > JsonDocument::kMaxDepth) fail("nested deeper than " + std::to_string(JsonDocument::kMaxDepth));
    const char c = peek();
    if (c == '{') return object(depth);
    if (c == '[') return array(depth);
    if (c == '"') return string();
    if (c == '-' || is_digit(c)) return number();
    for (std::string_view word : {"null", "true", "false"}) {
      if (text_.substr(at_, word.size()) != word) continue;
      const uint32_t item = open(word == "null" ? JsonKind::null : JsonKind::boolean);
      at_ += word.size();
      return close(item);
    }
    fail("expected a value");
  }

  void object(int depth) {
    const uint32_t item = open(JsonKind::object);
    take('{');
    std::string last;
    for (bool first = true; !take('}'); first = false) {
      if (!first && !take(',')) fail("expected ',' or '}'");
      if (peek() != '"') fail("expected a key");
      const size_t start = at_;
      string();
      std::string key = decode_string(text_.substr(start + 1, at_ - start - 2));
      if (!first && key <= last) {
        at_ = start;
        fail(key == last ? "a key occurs twice in one object" : "keys are not sorted");
      }
      last = std::move(key);
      if (!take(':')) fail("expected ':'");
      value(depth + 1);
    }
    close(item);
  }

  void array(int depth) {
    const uint32_t item = open(JsonKind::array);
    take('[');
    for (bool first = true; !take(']'); first = false) {
      if (!first && !take(',')) fail("expected ',' or ']'");
      value(depth + 1);
    }
    close(item);
  }

  void string() {
    const uint32_t item = open(JsonKind::string);
    take('"');
    while (!take('"')) {
      if (at_ == text_.size()) fail("a string without end");
      const std::string_view rest = text_.substr(at_);
      if (static_cast<uint8_t>(rest[0]) < 0x20) fail("a control character in a string");
      const size_t length = rest[0] == '\\' ? read_escape(rest).second : utf8_length(rest);
      if (length == 0) fail(rest[0] == '\\' ? "an escape that is not the canonical one" : "not UTF-8");
      at_ += length;
    }
    close(item);
  }

  void digits() {
    if (!is_digit(peek())) fail("expected a digit");
    while (is_digit(peek())) ++at_;
  }

  void number() {
    const size_t start = at_;
    take('-');
    if (!take('0')) digits();
    bool real = false;
    if (take('.')) digits(), real = true;
    if (take('e')) {
      if (!take('+') && !take('-')) fail("expected the exponent's sign");
      digits(), real = true;
    }
    const std::string_view text = text_.substr(start, at_ - start);
    const size_t end = std::exchange(at_, start);
    const uint32_t item = open(real ? JsonKind::real : JsonKind::integer);
    check_number(text, real);
    at_ = end;
    close(item);
  }

  void check_number(std::string_view text, bool real) const {
    if (text.size() > kMaxNumber) fail("a number of " + std::to_string(text.size()) + " characters");
    if (real) {
      const double found = read_float(text);
      if (!std::isfinite(found)) fail("a number beyond double precision");
      if (canonical_float(found) != text) fail("a number that is not in its shortest form");
      return;
    }
    int64_t found = 0;
    const auto result = std::from_chars(text.data(), text.data() + text.size(), found);
    if (result.ec != std::errc()) fail("an integer beyond 64 bits");
    if (text == "-0") fail("-0 as an integer");
  }

  JsonDocument& document_;
  const std::string_view text_;
  size_t at_ = 0;
};

JsonDocument::JsonDocument(std::string text, const std::string& file) : text_(std::move(text)), file_(file) {
  JsonParser(this).parse();
}

std::string_view JsonDocument::raw(uint32_t index) const {
  const JsonItem& found = items_[index];
  return std::string_view(text_).substr(found.begin, found.end - found.begin);
}

int64_t JsonDocument::integer(uint32_t index) const {
  const std::string_view text = raw(index);
  int64_t value = 0;
  std::from_chars(text.data(), text.data() + text.size(), value);
  return value;
}

double JsonDocument::real(uint32_t index) const { return read_float(raw(index)); }

std::string JsonDocument::string(uint32_t index) const {
  const std::string_view text = raw(index);
  return decode_string(text.substr(1, text.size() - 2));
}

std::string decode_string(std::string_view text) {
  std::string decoded;
  for (size_t at = 0; at < text.size();) {
    const size_t plain = std::min(text.find('\\', at), text.size());
    decoded.append(text, at, plain - at);
    at = plain;
    if (at == text.size()) break;
    const auto [meant, length] = read_escape(text.substr(at));
    decoded += meant;
    at += length;
  }
  return decoded;
}

}  // namespace bitstrata::artifact
