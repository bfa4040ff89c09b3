#include <algorithm>

#include "checks.h"
#include "ops.h"
#include "requant_forms.h"

namespace bitstrata {
namespace {

int index_of(DType t) { return static_cast<int>(t); }

// Item: a pixel, or an element where channels do not matter.
class RequantOp final : public Op {
 public:
  RequantOp(RequantFn fn, bool in_forms, const Operand& operand, const RequantParams& p, int output)
      : Op({operand.index}, output),
        fn_(fn),
        pixels_(operand.value.shape.pixels()),
        x_bytes_(p.channels * size_of(operand.value.dtype)),
        out_bytes_(p.channels * size_of(p.dtype)),
        multiplier_(p.multiplier, p.multiplier + p.channels),
        bias_(p.bias, p.bias + p.channels),
        shift_(p.shift, p.shift + p.channels),
        args_{multiplier_.data(),        bias_.data(), shift_.data(), p.channels, static_cast<int32_t>(p.lo),
              static_cast<int32_t>(p.hi)} {
    if (!in_forms) return;
    std::vector<Bounds> bounds = operand.op != nullptr ? operand.op->bounds() : std::vector<Bounds>();
    if (bounds.empty()) bounds.assign(static_cast<size_t>(p.channels), {operand.value.lo, operand.value.hi});
    forms_ = RequantForms(args_, bounds);
    forms_.give(&args_);
  }

  int64_t items(int, int64_t images) const override { return pixels_ * images; }
  int64_t items_of_pixel() const override { return 1; }
  int64_t cost() const override { return pixels_ * args_.channels; }
  Part part() const override {
    if (x_bytes_ == 4 * args_.channels && out_bytes_ == 4 * args_.channels) return {Part::rescale, &args_};
    if (forms_.in_registers() && out_bytes_ == args_.channels) return {Part::codes, &args_};
    return {};
  }
  int64_t constant_bytes() const override {
    return static_cast<int64_t>(args_.channels * 3 * sizeof(int64_t)) + forms_.bytes();
  }
  void run(int, const Frame& f, int64_t begin, int64_t end) const override {
    fn_(args_, f.values[inputs[0]] + begin * x_bytes_, f.values[output] + begin * out_bytes_, end - begin);
  }

 private:
  RequantFn fn_;
  int64_t pixels_, x_bytes_, out_bytes_;
  std::vector<int64_t> multiplier_, bias_, shift_;
  RequantArgs args_;
  RequantForms forms_;
};

class AddOp final : public Op {
 public:
  AddOp(AddFn fn, const Shape& shape, int a, int b, int output, int64_t shift_a, int64_t shift_b)
      : Op({a, b}, output),
        fn_(fn),
        count_(shape.elements()),
        channels_(shape.c),
        shift_a_(static_cast<int>(shift_a)),
        shift_b_(static_cast<int>(shift_b)) {}

  int64_t items(int, int64_t images) const override { return count_ * images; }
  int64_t items_of_pixel() const override { return channels_; }
  int64_t cost() const override { return count_; }
  void run(int, const Frame& f, int64_t begin, int64_t end) const override {
    fn_(reinterpret_cast<const int32_t*>(f.values[inputs[0]]) + begin,
        reinterpret_cast<const int32_t*>(f.values[inputs[1]]) + begin,
        reinterpret_cast<int32_t*>(f.values[output]) + begin, end - begin, shift_a_, shift_b_);
  }

 private:
  AddFn fn_;
  int64_t count_, channels_;
  int shift_a_, shift_b_;
};

class ClipOp final : public Op {
 public:
  ClipOp(ClipFn fn, const Value& x, int input, int output, int64_t lo, int64_t hi)
      : Op({input}, output),
        fn_(fn),
        count_(x.shape.elements()),
        channels_(x.shape.c),
        bytes_(size_of(x.dtype)),
        lo_(static_cast<int32_t>(lo)),
        hi_(static_cast<int32_t>(hi)) {}

  int64_t items(int, int64_t images) const override { return count_ * images; }
  int64_t items_of_pixel() const override { return channels_; }
  int64_t cost() const override { return count_; }
  void run(int, const Frame& f, int64_t begin, int64_t end) const override {
    fn_(f.values[inputs[0]] + begin * bytes_, f.values[output] + begin * bytes_, end - begin, lo_, hi_);
  }

 private:
  ClipFn fn_;
  int64_t count_, channels_, bytes_;
  int32_t lo_, hi_;
};

void check_bounds(const std::string& name, DType dtype, int64_t lo, int64_t hi) {
  check_range(name, "lo", lo, lowest(dtype), highest(dtype));
  check_range(name, "hi", hi, lowest(dtype), highest(dtype));
  if (lo > hi) fail(name, "lo " + str(lo) + " is above hi " + str(hi));
}

}  // namespace

Made make_requant(const Kernels& kernels, const std::string& name, Operand x, int output, const RequantParams& p) {
  if (p.channels != x.value.shape.c)
    fail(name, "multiplier, bias and shift have " + str(p.channels) + " elements, the input " + str(x.value.shape.c) +
                   " channels");
  for (int64_t c = 0; c < p.channels; ++c) check_range(name, "shift", p.shift[c], 0, 62);
  check_bounds(name, p.dtype, p.lo, p.hi);
  const RequantFn fn = kernels.requant[index_of(x.value.dtype)][index_of(p.dtype)];
  return {std::make_unique<RequantOp>(fn, kernels.requant_forms, x, p, output),
          Value{x.value.shape, p.dtype, static_cast<int32_t>(p.lo), static_cast<int32_t>(p.hi)}};
}

Made make_add(const Kernels& kernels, const std::string& name, Operand a, Operand b, int output, int64_t shift_a,
              int64_t shift_b) {
  if (a.value.dtype != DType::i32 || b.value.dtype != DType::i32)
    fail(name, std::string("inputs are ") + name_of(a.value.dtype) + " and " + name_of(b.value.dtype) +
                   ", an addition takes i32");
  if (a.value.shape != b.value.shape)
    fail(name, "inputs have shapes " + str(a.value.shape) + " and " + str(b.value.shape) + ", which differ");
  check_range(name, "shift_a", shift_a, -31, 62);
  check_range(name, "shift_b", shift_b, -31, 62);
  return {std::make_unique<AddOp>(kernels.add, a.value.shape, a.index, b.index, output, shift_a, shift_b),
          Value{a.value.shape, DType::i32}};
}

Made make_clip(const Kernels& kernels, const std::string& name, Operand x, int output, int64_t lo, int64_t hi) {
  check_bounds(name, x.value.dtype, lo, hi);
  const auto clamp = [&](int32_t v) { return static_cast<int32_t>(std::min(std::max<int64_t>(v, lo), hi)); };
  return {std::make_unique<ClipOp>(kernels.clip[index_of(x.value.dtype)], x.value, x.index, output, lo, hi),
          Value{x.value.shape, x.value.dtype, clamp(x.value.lo), clamp(x.value.hi)}};
}

}  // namespace bitstrata
