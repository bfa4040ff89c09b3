// What weight gradients add when their sums are read. See pointwise.h for the unnamed namespace.
#pragma once

#include <cstdint>

namespace bitstrata {
namespace {

inline int64_t added(int64_t a, int32_t b) { return a + b; }
inline int32_t added(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
}
inline float added(float a, float b) { return a + b; }

}  // namespace
}  // namespace bitstrata
