#include <algorithm>

#include "checks.h"
#include "ops.h"

namespace bitstrata {
namespace {

// Item: a pixel.
class TableOp final : public Op {
 public:
  TableOp(const Value& x, const TableParams& p, int input, int output)
      : Op({input}, output),
        pixels_(x.shape.pixels()),
        channels_(p.channels),
        last_(p.entries - 1),
        first_(p.first),
        dtype_(p.dtype),
        table_(p.table, p.table + p.entries * p.channels) {}

  int64_t items(int, int64_t images) const override { return pixels_ * images; }
  int64_t items_of_pixel() const override { return 1; }
  int64_t cost() const override { return pixels_ * channels_ * 2; }
  int64_t constant_bytes() const override { return static_cast<int64_t>(table_.size() * 4); }
  void run(int, const Frame& f, int64_t begin, int64_t end) const override {
    const int32_t* x = reinterpret_cast<const int32_t*>(f.values[inputs[0]]);
    // A signed code and an unsigned one are the same byte.
    if (dtype_ == DType::i32)
      look_up(x, reinterpret_cast<int32_t*>(f.values[output]), begin, end);
    else
      look_up(x, f.values[output], begin, end);
  }

 private:
  template <typename T>
  void look_up(const int32_t* x, T* out, int64_t begin, int64_t end) const {
    for (int64_t pixel = begin; pixel < end; ++pixel)
      for (int64_t c = 0; c < channels_; ++c) {
        const int64_t i = pixel * channels_ + c;
        const int64_t entry = std::clamp<int64_t>(static_cast<int64_t>(x[i]) - first_, 0, last_);
        out[i] = static_cast<T>(table_[entry * channels_ + c]);
      }
  }

  int64_t pixels_, channels_, last_;
  int32_t first_;
  DType dtype_;
  std::vector<int32_t> table_;
};

}  // namespace

Made make_table(const std::string& name, Operand x, int output, const TableParams& p) {
  if (x.value.dtype != DType::i32) fail(name, std::string("the input is ") + name_of(x.value.dtype) + ", not i32");
  if (p.channels != x.value.shape.c)
    fail(name, "table has " + str(p.channels) + " channels, the input " + str(x.value.shape.c));
  check_range(name, "entries", p.entries, 1, int64_t{1} << 20);
  const auto [lo, hi] = std::minmax_element(p.table, p.table + p.entries * p.channels);
  check_range(name, "least entry", *lo, lowest(p.dtype), highest(p.dtype));
  check_range(name, "largest entry", *hi, lowest(p.dtype), highest(p.dtype));
  return {std::make_unique<TableOp>(x.value, p, x.index, output), Value{x.value.shape, p.dtype, *lo, *hi}};
}

}  // namespace bitstrata
