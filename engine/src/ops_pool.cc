#include <algorithm>

#include "checks.h"
#include "ops.h"

namespace bitstrata {
namespace {

// Item: an output row.
class PoolOp final : public Op {
 public:
  PoolOp(PoolFn fn, const PoolShape& shape, DType in, DType out, int x, int output, bool maximum = false)
      : Op({x}, output),
        fn_(fn),
        maximum_(maximum && in == DType::i32),
        shape_(shape),
        in_bytes_(shape.in_h * shape.in_w * shape.channels * size_of(in)),
        out_bytes_(shape.out_h * shape.out_w * shape.channels * size_of(out)) {}

  int64_t items(int, int64_t images) const override { return shape_.out_h * images; }
  int64_t pixels_of_item() const override { return shape_.out_w; }
  bool takes_maximum() const override { return maximum_; }
  Rows rows_read(int64_t item) const override {
    const int64_t i = item / shape_.out_h * shape_.in_h;
    const int64_t first = item % shape_.out_h * shape_.stride_h - shape_.pad_top;
    return {i + std::max<int64_t>(first, 0), i + std::min(first + shape_.kernel_h, shape_.in_h)};
  }
  int64_t cost() const override {
    return shape_.out_h * shape_.out_w * shape_.channels * shape_.kernel_h * shape_.kernel_w;
  }
  void run(int, const Frame& f, int64_t begin, int64_t end) const override {
    while (begin < end) {
      const int64_t i = begin / shape_.out_h, first = begin % shape_.out_h;
      const int64_t last = std::min(shape_.out_h, first + end - begin);
      fn_(shape_, f.values[inputs[0]] + i * in_bytes_, f.values[output] + i * out_bytes_, first, last);
      begin += last - first;
    }
  }

 private:
  PoolFn fn_;
  bool maximum_;  // of fixed point
  PoolShape shape_;
  int64_t in_bytes_, out_bytes_;
};

PoolShape check_pool(const std::string& name, const Value& x, const PoolParams& p) {
  for (int64_t v : p.kernel) check_range(name, "kernel", v, 1, kMaxExtent);
  for (int64_t v : p.stride) check_range(name, "stride", v, 1, kMaxExtent);
  for (int64_t v : p.padding) check_range(name, "padding", v, 0, kMaxExtent);
  PoolShape s{};
  s.in_h = x.shape.h, s.in_w = x.shape.w, s.channels = x.shape.c;
  s.kernel_h = p.kernel[0], s.kernel_w = p.kernel[1];
  s.stride_h = p.stride[0], s.stride_w = p.stride[1];
  s.pad_top = p.padding[0], s.pad_left = p.padding[2];
  s.out_h = check_windows(name, "height", s.in_h, s.kernel_h, s.stride_h, p.padding[0], p.padding[1]);
  s.out_w = check_windows(name, "width", s.in_w, s.kernel_w, s.stride_w, p.padding[2], p.padding[3]);
  check_shape(name, "result", {s.out_h, s.out_w, s.channels});
  return s;
}

// Windows begin at -before, and the last one at (count - 1) * stride - before.
void check_not_empty(const std::string& name, const char* axis, int64_t size, int64_t kernel, int64_t stride,
                     int64_t before, int64_t count) {
  if (before >= kernel || (count - 1) * stride - before >= size)
    fail(name, std::string("a window of ") + axis + " " + str(kernel) + " lies entirely in the padding");
}

// Bounds of plain sums; those of the type if its values could leave it (the caller has proved that they do not).
std::pair<int32_t, int32_t> sum_bounds(const Value& x, const PoolParams& p) {
  bool padded = false;
  for (int64_t v : p.padding) padded = padded || v > 0;
  const int64_t window = p.kernel[0] * p.kernel[1];
  const int64_t lo = window * (padded ? std::min(x.lo, 0) : x.lo), hi = window * (padded ? std::max(x.hi, 0) : x.hi);
  if (lo < lowest(x.dtype) || hi > highest(x.dtype)) return {lowest(x.dtype), highest(x.dtype)};
  return {static_cast<int32_t>(lo), static_cast<int32_t>(hi)};
}

}  // namespace

Made make_max_pool(const Kernels& kernels, const std::string& name, Operand x, int output, const PoolParams& p) {
  const PoolShape s = check_pool(name, x.value, p);
  check_not_empty(name, "height", s.in_h, s.kernel_h, s.stride_h, s.pad_top, s.out_h);
  check_not_empty(name, "width", s.in_w, s.kernel_w, s.stride_w, s.pad_left, s.out_w);
  const DType dtype = x.value.dtype;
  return {std::make_unique<PoolOp>(kernels.max_pool[static_cast<int>(dtype)], s, dtype, dtype, x.index, output, true),
          Value{{s.out_h, s.out_w, s.channels}, dtype, x.value.lo, x.value.hi}};
}

Made make_sum_pool(const Kernels& kernels, const std::string& name, Operand x, int output, const PoolParams& p,
                   int64_t shift) {
  PoolShape s = check_pool(name, x.value, p);
  s.shift = static_cast<int32_t>(check_range(name, "shift", shift, 0, 62));
  const DType dtype = x.value.dtype;
  return {std::make_unique<PoolOp>(kernels.sum_pool[static_cast<int>(dtype)], s, dtype, DType::i32, x.index, output),
          Value{{s.out_h, s.out_w, s.channels}, DType::i32}};
}

Made make_sum_codes(const Kernels& kernels, const std::string& name, Operand x, int output, const PoolParams& p) {
  const PoolShape s = check_pool(name, x.value, p);
  const DType dtype = x.value.dtype;
  if (dtype == DType::i32) fail(name, "the input is i32, a sum of codes takes u8 or s8");
  const auto [lo, hi] = sum_bounds(x.value, p);
  return {std::make_unique<PoolOp>(kernels.sum_codes[static_cast<int>(dtype)], s, dtype, dtype, x.index, output),
          Value{{s.out_h, s.out_w, s.channels}, dtype, lo, hi}};
}

}  // namespace bitstrata
