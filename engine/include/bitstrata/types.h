// Values of a graph: NHWC tensors of u8, s8 or i32 with proved bounds.
#pragma once

#include <array>
#include <cstdint>

namespace bitstrata {

using Pair = std::array<int64_t, 2>;    // height, width; or before, after
using Triple = std::array<int64_t, 3>;  // start, stop, step
using Sides = std::array<int64_t, 4>;   // top, bottom, left, right

enum class DType : uint8_t { u8 = 0, s8 = 1, i32 = 2 };
constexpr int kDTypes = 3;

inline int64_t size_of(DType t) { return t == DType::i32 ? 4 : 1; }
inline const char* name_of(DType t) { return t == DType::u8 ? "u8" : t == DType::s8 ? "s8" : "i32"; }
inline int32_t lowest(DType t) { return t == DType::u8 ? 0 : t == DType::s8 ? -128 : INT32_MIN; }
inline int32_t highest(DType t) { return t == DType::u8 ? 255 : t == DType::s8 ? 127 : INT32_MAX; }

// Shape of one image.
struct Shape {
  int64_t h = 0, w = 0, c = 0;
  int64_t pixels() const { return h * w; }
  int64_t elements() const { return h * w * c; }
  bool operator==(const Shape& o) const { return h == o.h && w == o.w && c == o.c; }
  bool operator!=(const Shape& o) const { return !(*this == o); }
};

struct Value {
  Shape shape;
  DType dtype = DType::i32;
  int32_t lo = INT32_MIN, hi = INT32_MAX;  // every element lies within, whatever the (checked) input
  int64_t bytes() const { return shape.elements() * size_of(dtype); }
};

// Largest extent of a dimension, pad, stride or kernel side, and most elements of one image's tensor: no product of
// what the engine multiplies leaves int64, and a hostile graph is refused before anything is allocated for it.
constexpr int64_t kMaxExtent = int64_t{1} << 24;
constexpr int64_t kMaxElements = int64_t{1} << 31;

}  // namespace bitstrata
