// Checks of what a graph is given. Messages read "operation 'NAME': ARGUMENT is VALUE, CAUSE".
#pragma once

#include <stdexcept>
#include <string>

#include "bitstrata/types.h"

namespace bitstrata {

inline std::string str(int64_t v) { return std::to_string(v); }
inline std::string str(const Shape& s) { return "(" + str(s.h) + ", " + str(s.w) + ", " + str(s.c) + ")"; }

[[noreturn]] inline void fail(const std::string& op, const std::string& message) {
  throw std::invalid_argument("operation '" + op + "': " + message);
}

inline int64_t check_range(const std::string& op, const char* argument, int64_t v, int64_t lo, int64_t hi) {
  if (v < lo || v > hi) fail(op, std::string(argument) + " is " + str(v) + ", not in " + str(lo) + ".." + str(hi));
  return v;
}

inline Shape check_shape(const std::string& op, const char* argument, Shape s) {
  check_range(op, (argument + std::string(" height")).c_str(), s.h, 1, kMaxExtent);
  check_range(op, (argument + std::string(" width")).c_str(), s.w, 1, kMaxExtent);
  check_range(op, (argument + std::string(" channels")).c_str(), s.c, 1, kMaxElements);
  if (s.h * s.w > kMaxElements || s.h * s.w * s.c > kMaxElements)
    fail(op, std::string(argument) + " " + str(s) + " has more than " + str(kMaxElements) + " elements");
  return s;
}

// Positions of a window of `span` that moves by `stride` over `size` elements with `before` and `after` around them.
inline int64_t check_windows(const std::string& op, const char* axis, int64_t size, int64_t span, int64_t stride,
                             int64_t before, int64_t after) {
  const int64_t room = size + before + after - span;
  if (room < 0)
    fail(op, std::string("window of ") + axis + " " + str(span) + " exceeds the padded input's " +
                 str(size + before + after));
  return room / stride + 1;
}

}  // namespace bitstrata
