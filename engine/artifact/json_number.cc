#include <charconv>
#include <cmath>
#include <limits>
#include <locale>
#include <sstream>
#include <string>

#include "json.h"

namespace bitstrata::artifact {

namespace {

struct Decimal {
  bool negative = false;
  std::string digits;  // significant ones, the first and the last not 0; "0" for zero
  int exponent = 0;    // value = d1.d2d3.. * 10^exponent
};

// From the scientific notation of any library, "-1.50e+07".
Decimal parse_scientific(const std::string& text) {
  Decimal found;
  const size_t e = text.find('e');
  for (char c : text.substr(0, e)) {
    if (c == '-') found.negative = true;
    if (c >= '0' && c <= '9') found.digits += c;
  }
  found.digits.erase(std::max<size_t>(found.digits.find_last_not_of('0') + 1, 1));
  found.exponent = std::stoi(text.substr(e + 1));
  return found;
}

std::string spell(const Decimal& d) {
  const int count = static_cast<int>(d.digits.size());
  std::string text = d.negative ? "-" : "";
  if (d.exponent < -4 || d.exponent >= 16) {
    text += d.digits.substr(0, 1);
    if (count > 1) text += "." + d.digits.substr(1);
    const std::string power = std::to_string(std::abs(d.exponent));
    return text + "e" + (d.exponent < 0 ? "-" : "+") + (power.size() < 2 ? "0" : "") + power;
  }
  if (d.exponent < 0) return text + "0." + std::string(-d.exponent - 1, '0') + d.digits;
  if (count <= d.exponent + 1) return text + d.digits + std::string(d.exponent + 1 - count, '0') + ".0";
  return text + d.digits.substr(0, d.exponent + 1) + "." + d.digits.substr(d.exponent + 1);
}

std::string scientific(double value, int digits) {
  std::ostringstream stream;
  stream.imbue(std::locale::classic());
  stream.precision(digits - 1);
  stream << std::scientific << value;
  return stream.str();
}

// The next larger decimal of as many digits in magnitude; "" where it would need one digit more.
std::string raised(std::string text) {
  for (size_t at = text.find('e'); at-- > 0;) {
    if (text[at] == '9') {
      text[at] = '0';
    } else if (text[at] >= '0' && text[at] <= '8') {
      ++text[at];
      return text;
    }
  }
  return "";
}

}  // namespace

double read_float_by_stream(std::string_view text) {
  std::istringstream stream{std::string(text)};
  stream.imbue(std::locale::classic());
  double value = 0;
  stream >> value;  // beyond the range: the largest double, with a failure
  return stream.fail() && std::abs(value) >= 1 ? std::numeric_limits<double>::infinity() : value;
}

// Below a power of two doubles are twice as dense as above it, so the nearest decimal of k digits, lying below, can
// read back as another double while the next larger one reads back right.
std::string canonical_float_by_trial(double value) {
  for (int digits = 1; digits < 17; ++digits) {
    const std::string nearest = scientific(value, digits);
    if (read_float_by_stream(nearest) == value) return spell(parse_scientific(nearest));
    const std::string next = raised(nearest);
    if (!next.empty() && read_float_by_stream(next) == value) return spell(parse_scientific(next));
  }
  return spell(parse_scientific(scientific(value, 17)));
}

#if defined(__cpp_lib_to_chars)

double read_float(std::string_view text) {
  double value = 0;
  const auto result = std::from_chars(text.data(), text.data() + text.size(), value);
  if (result.ec == std::errc::result_out_of_range) return read_float_by_stream(text);
  return value;
}

std::string canonical_float(double value) {
  char text[64];
  const auto result = std::to_chars(text, text + sizeof text, value, std::chars_format::scientific);
  return spell(parse_scientific(std::string(text, result.ptr)));
}

#else

double read_float(std::string_view text) { return read_float_by_stream(text); }
std::string canonical_float(double value) { return canonical_float_by_trial(value); }

#endif

}  // namespace bitstrata::artifact
