// Operations that only move elements. They are the same on every instruction set.
#include <algorithm>
#include <cstring>

#include "checks.h"
#include "ops.h"

namespace bitstrata {
namespace {

// Item: an output row.
template <typename T>
class SliceOp final : public Op {
 public:
  SliceOp(const Shape& in, const Shape& out, Triple h, Triple w, Triple c, int x, int output)
      : Op({x}, output), in_(in), out_(out), h_(h), w_(w), c_(c) {}

  int64_t items(int, int64_t images) const override { return out_.h * images; }
  int64_t cost() const override { return out_.elements(); }
  int64_t read_bytes(int64_t) const override { return out_.elements() * static_cast<int64_t>(sizeof(T)); }
  void run(int, const Frame& f, int64_t begin, int64_t end) const override {
    const T* x = reinterpret_cast<const T*>(f.values[inputs[0]]);
    T* out = reinterpret_cast<T*>(f.values[output]) + begin * out_.w * out_.c;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / out_.h * in_.h + h_[0] + item % out_.h * h_[2];
      for (int64_t i = 0; i < out_.w; ++i, out += out_.c) {
        const T* from = x + (row * in_.w + w_[0] + i * w_[2]) * in_.c + c_[0];
        for (int64_t j = 0; j < out_.c; ++j) out[j] = from[j * c_[2]];
      }
    }
  }

 private:
  Shape in_, out_;
  Triple h_, w_, c_;
};

// Item: an output row.
template <typename T>
class PadOp final : public Op {
 public:
  PadOp(const Shape& in, const Shape& out, Pair h, Pair w, Pair c, int x, int output)
      : Op({x}, output), in_(in), out_(out), h_(h), w_(w), c_(c) {}

  int64_t items(int, int64_t images) const override { return out_.h * images; }
  int64_t cost() const override { return out_.elements(); }
  void run(int, const Frame& f, int64_t begin, int64_t end) const override {
    const T* x = reinterpret_cast<const T*>(f.values[inputs[0]]);
    T* out = reinterpret_cast<T*>(f.values[output]);
    for (int64_t item = begin; item < end; ++item) {
      T* to = out + item * out_.w * out_.c;
      std::fill(to, to + out_.w * out_.c, T{0});
      const int64_t y = item % out_.h - h_[0];
      if (y < 0 || y >= in_.h) continue;
      const T* from = x + (item / out_.h * in_.h + y) * in_.w * in_.c;
      to += w_[0] * out_.c + c_[0];
      for (int64_t i = 0; i < in_.w; ++i, from += in_.c, to += out_.c) std::copy(from, from + in_.c, to);
    }
  }

 private:
  Shape in_, out_;
  Pair h_, w_, c_;
};

// Item: a channel.
template <typename T>
class FlattenOp final : public Op {
 public:
  FlattenOp(const Shape& in, int x, int output) : Op({x}, output), in_(in) {}

  int64_t items(int, int64_t images) const override { return in_.c * images; }
  int64_t cost() const override { return in_.elements(); }
  void run(int, const Frame& f, int64_t begin, int64_t end) const override {
    const int64_t pixels = in_.pixels();
    T* out = reinterpret_cast<T*>(f.values[output]) + begin * pixels;
    for (int64_t item = begin; item < end; ++item, out += pixels) {
      const T* x = reinterpret_cast<const T*>(f.values[inputs[0]]) + item / in_.c * in_.elements() + item % in_.c;
      for (int64_t i = 0; i < pixels; ++i) out[i] = x[i * in_.c];
    }
  }

 private:
  Shape in_;
};

// The operation for the size of the value's elements.
template <template <typename> class Move, typename... Args>
std::unique_ptr<Op> make_move(DType dtype, Args&&... args) {
  if (size_of(dtype) == 1) return std::make_unique<Move<uint8_t>>(std::forward<Args>(args)...);
  return std::make_unique<Move<uint32_t>>(std::forward<Args>(args)...);
}

int64_t check_slice(const std::string& name, const char* axis, int64_t size, const Triple& t) {
  check_range(name, (std::string(axis) + " start").c_str(), t[0], 0, size - 1);
  check_range(name, (std::string(axis) + " stop").c_str(), t[1], t[0] + 1, size);
  check_range(name, (std::string(axis) + " step").c_str(), t[2], 1, kMaxElements);
  return (t[1] - t[0] - 1) / t[2] + 1;
}

int64_t check_pad(const std::string& name, const char* axis, int64_t size, const Pair& p) {
  for (int64_t v : p) check_range(name, (std::string(axis) + " padding").c_str(), v, 0, kMaxExtent);
  return size + p[0] + p[1];
}

}  // namespace

Made make_slice(const std::string& name, Operand x, int output, Triple h, Triple w, Triple c) {
  const Shape& in = x.value.shape;
  const Shape out{check_slice(name, "h", in.h, h), check_slice(name, "w", in.w, w), check_slice(name, "c", in.c, c)};
  return {make_move<SliceOp>(x.value.dtype, in, out, h, w, c, x.index, output),
          Value{out, x.value.dtype, x.value.lo, x.value.hi}};
}

Made make_pad(const std::string& name, Operand x, int output, Pair h, Pair w, Pair c) {
  const Shape& in = x.value.shape;
  const Shape out = check_shape(
      name, "result", {check_pad(name, "h", in.h, h), check_pad(name, "w", in.w, w), check_pad(name, "c", in.c, c)});
  return {make_move<PadOp>(x.value.dtype, in, out, h, w, c, x.index, output),
          Value{out, x.value.dtype, std::min(x.value.lo, 0), std::max(x.value.hi, 0)}};
}

Made make_flatten(const std::string& name, Operand x, int output) {
  const Shape out = check_shape(name, "result", {1, 1, x.value.shape.elements()});
  return {make_move<FlattenOp>(x.value.dtype, x.value.shape, x.index, output),
          Value{out, x.value.dtype, x.value.lo, x.value.hi}};
}

}  // namespace bitstrata
