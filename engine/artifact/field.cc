#include "field.h"

#include <algorithm>

#include "bitstrata/error.h"

namespace bitstrata::artifact {

namespace {

constexpr size_t kMaxName = 4096, kShown = 80;

bool is_tail(char c) { return (static_cast<uint8_t>(c) & 0xc0) == 0x80; }

// U+0000..U+001F and U+007F..U+009F, the latter two bytes long from U+0080 on.
bool has_control(std::string_view text) {
  for (size_t at = 0; at < text.size(); ++at) {
    const uint8_t byte = static_cast<uint8_t>(text[at]);
    if (byte < 0x20 || byte == 0x7f) return true;
    if (byte == 0xc2 && static_cast<uint8_t>(text[at + 1]) < 0xa0) return true;
  }
  return false;
}

}  // namespace

std::string shortened(std::string_view text) {
  if (text.size() <= kShown) return std::string(text);
  size_t end = kShown - 3;
  while (end > 0 && is_tail(text[end])) --end;
  return std::string(text.substr(0, end)) + "...";
}

std::string Field::place() const {
  if (parent_ == nullptr) return "";
  const std::string before = parent_->place();
  if (key_ == nullptr) return before + "[" + std::to_string(index_) + "]";
  return before.empty() ? key_ : before + "." + key_;
}

void Field::fail(const std::string& message) const {
  const std::string at = place();
  throw ArtifactError(ArtifactError::Kind::content, document_->file(), at.empty() ? message : at + ": " + message);
}

void Field::wrong(const std::string& expected) const { fail("expected " + expected + ", got " + shortened(raw())); }

bool Field::boolean() const {
  if (!is(JsonKind::boolean)) wrong("true or false");
  return is("true");
}

int64_t Field::integer(int64_t low, int64_t high) const {
  const int64_t value = is(JsonKind::integer) ? document_->integer(item_) : low;
  if (!is(JsonKind::integer) || value < low || value > high)
    wrong("an integer from " + std::to_string(low) + " to " + std::to_string(high));
  return value;
}

double Field::real() const {
  if (!is(JsonKind::real)) wrong("a number with a fraction part or exponent");
  return document_->real(item_);
}

std::string Field::text() const {
  if (!is(JsonKind::string)) wrong("a string");
  return document_->string(item_);
}

std::string Field::name() const {
  const std::string text = is(JsonKind::string) ? document_->string(item_) : "";
  const size_t characters = text.size() - std::count_if(text.begin(), text.end(), is_tail);
  if (characters < 1 || characters > kMaxName || has_control(text))
    wrong("1 to 4096 characters, none of them a control character");
  return text;
}

std::string Field::sha256() const {
  const std::string text = is(JsonKind::string) ? document_->string(item_) : "";
  if (text.size() != 64 || text.find_first_not_of("0123456789abcdef") != std::string::npos)
    wrong("64 lower-case hexadecimal digits");
  return text;
}

uint32_t Field::find(std::string_view key) const {
  if (!is(JsonKind::object)) wrong("an object");
  for (uint32_t at = item_ + 1; at < item().next; at = document_->item(at + 1).next) {
    const std::string_view found = document_->raw(at);
    if (found.substr(1, found.size() - 2) == key) return at + 1;
  }
  return 0;
}

bool Field::has(std::string_view key) const { return find(key) != 0; }

Field Field::operator[](const char* key) const {
  const uint32_t value = find(key);
  if (value == 0) fail("field '" + std::string(key) + "' is missing");
  return Field(this, value, key, 0);
}

void Field::expect_members(std::initializer_list<const char*> keys, const char* optional) const {
  if (!is(JsonKind::object)) wrong("an object");
  for (const char* key : keys)
    if (!has(key)) fail("field '" + std::string(key) + "' is missing");
  for (uint32_t at = item_ + 1; at < item().next; at = document_->item(at + 1).next) {
    const std::string_view raw = document_->raw(at), found = raw.substr(1, raw.size() - 2);
    const bool known = std::any_of(keys.begin(), keys.end(), [&](const char* key) { return found == key; });
    if (!known && (optional == nullptr || found != optional)) fail("unknown field " + shortened(raw));
  }
}

void Field::expect_array() const {
  if (!is(JsonKind::array)) wrong("an array");
}

size_t Field::count() const {
  size_t found = 0;
  each([&](const Field&) { ++found; });
  return found;
}

void Field::expect_count(size_t count) const {
  const size_t found = this->count();
  if (found != count) fail("expected " + std::to_string(count) + " items, got " + std::to_string(found));
}

}  // namespace bitstrata::artifact
