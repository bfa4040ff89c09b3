#include <algorithm>

#include "checks.h"
#include "ops.h"

namespace bitstrata {
namespace {

// Item: a pixel. Rows of thresholds are taken one after another, so that the inner loop runs along the channels.
class ThresholdsOp final : public Op {
 public:
  ThresholdsOp(const Value& x, const ThresholdParams& p, int input, int output)
      : Op({input}, output),
        pixels_(x.shape.pixels()),
        channels_(p.channels),
        levels_(p.levels),
        after_(p.after, p.after + p.levels * p.channels),
        sign_(p.sign, p.sign + p.channels),
        base_(p.base, p.base + p.channels) {}

  int64_t items(int, int64_t images) const override { return pixels_ * images; }
  int64_t items_of_pixel() const override { return 1; }
  int64_t cost() const override { return pixels_ * channels_ * levels_; }
  int64_t constant_bytes() const override { return static_cast<int64_t>(after_.size() * 4 + base_.size() * 2); }
  void run(int, const Frame& f, int64_t begin, int64_t end) const override {
    const int32_t* x = reinterpret_cast<const int32_t*>(f.values[inputs[0]]) + begin * channels_;
    uint8_t* out = f.values[output] + begin * channels_;
    for (int64_t pixel = begin; pixel < end; ++pixel, x += channels_, out += channels_) {
      std::copy(base_.begin(), base_.end(), out);
      for (int64_t j = 0; j < levels_; ++j) pass(x, after_.data() + j * channels_, out);
    }
  }

 private:
  // Codes are bytes: a signed code and its byte count alike, modulo 256.
  void pass(const int32_t* x, const int32_t* after, uint8_t* out) const {
    for (int64_t c = 0; c < channels_; ++c) out[c] = static_cast<uint8_t>(out[c] + (x[c] > after[c] ? sign_[c] : 0));
  }

  int64_t pixels_, channels_, levels_;
  std::vector<int32_t> after_;
  std::vector<int8_t> sign_;
  std::vector<uint8_t> base_;
};

}  // namespace

Made make_thresholds(const std::string& name, Operand x, int output, const ThresholdParams& p) {
  if (x.value.dtype != DType::i32) fail(name, std::string("the input is ") + name_of(x.value.dtype) + ", not i32");
  if (p.dtype == DType::i32) fail(name, "the result is i32, not codes");
  if (p.channels != x.value.shape.c)
    fail(name, "after, sign and base have " + str(p.channels) + " channels, the input " + str(x.value.shape.c));
  check_range(name, "levels", p.levels, 1, 255);
  int32_t lo = highest(p.dtype), hi = lowest(p.dtype);
  for (int64_t c = 0; c < p.channels; ++c) {
    if (p.sign[c] != 1 && p.sign[c] != -1) fail(name, "sign is " + str(p.sign[c]) + ", not 1 or -1");
    int64_t passable = 0;  // no x is above the largest threshold there is
    for (int64_t j = 0; j < p.levels; ++j) passable += p.after[j * p.channels + c] != highest(DType::i32);
    const int64_t other = p.base[c] + p.sign[c] * passable;
    const int64_t least = std::min<int64_t>(p.base[c], other), most = std::max<int64_t>(p.base[c], other);
    check_range(name, "least code", least, lowest(p.dtype), highest(p.dtype));
    check_range(name, "largest code", most, lowest(p.dtype), highest(p.dtype));
    lo = std::min(lo, static_cast<int32_t>(least));
    hi = std::max(hi, static_cast<int32_t>(most));
  }
  return {std::make_unique<ThresholdsOp>(x.value, p, x.index, output), Value{x.value.shape, p.dtype, lo, hi}};
}

}  // namespace bitstrata
