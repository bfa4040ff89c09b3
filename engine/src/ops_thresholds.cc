#include <algorithm>

#include "checks.h"
#include "ops.h"

namespace bitstrata {
namespace {

constexpr int64_t kBlock = 16;  // channels that are compared together: four registers, of the least that compilers use

// Item: a pixel. Constants are in blocks of channels, those of a block one level after the other.
class ThresholdsOp final : public Op {
 public:
  ThresholdsOp(const Value& x, const ThresholdParams& p, int input, int output)
      : Op({input}, output), pixels_(x.shape.pixels()), channels_(p.channels), levels_(p.levels) {
    const int64_t blocks = (channels_ + kBlock - 1) / kBlock;
    after_.assign(blocks * levels_ * kBlock, highest(DType::i32));
    falls_.assign(blocks * kBlock, 0);
    base_.assign(blocks * kBlock, 0);
    for (int64_t c = 0; c < channels_; ++c) {
      falls_[c] = p.sign[c] < 0 ? -1 : 0;
      base_[c] = p.base[c];
      for (int64_t j = 0; j < levels_; ++j)
        after_[(c / kBlock * levels_ + j) * kBlock + c % kBlock] = p.after[j * channels_ + c];
    }
  }

  int64_t items(int, int64_t images) const override { return pixels_ * images; }
  int64_t items_of_pixel() const override { return 1; }
  int64_t cost() const override { return pixels_ * channels_ * (levels_ + 2) / 2; }
  int64_t constant_bytes() const override {
    return static_cast<int64_t>(after_.size() + falls_.size() + base_.size()) * 4;
  }
  void run(int, const Frame& f, int64_t begin, int64_t end) const override {
    const int32_t* x = reinterpret_cast<const int32_t*>(f.values[inputs[0]]) + begin * channels_;
    uint8_t* out = f.values[output] + begin * channels_;
    for (int64_t pixel = begin; pixel < end; ++pixel, x += channels_, out += channels_)
      for (int64_t c = 0; c < channels_; c += kBlock) {
        if (c + kBlock <= channels_) {
          block(x + c, c, out + c);
          continue;
        }
        int32_t rest[kBlock] = {};
        uint8_t codes[kBlock];
        std::copy(x + c, x + channels_, rest);
        block(rest, c, codes);
        std::copy(codes, codes + channels_ - c, out + c);
      }
  }

 private:
  // Loops of one length, which compilers turn into vectors. Codes are bytes: a signed code and its byte are alike,
  // modulo 256. Negated where the channel falls: (n ^ -1) - -1 = -n.
  void block(const int32_t* x, int64_t c, uint8_t* out) const {
    const int32_t* after = after_.data() + c * levels_;
    int32_t passed[kBlock] = {};
    for (int64_t j = 0; j < levels_; ++j, after += kBlock)
      for (int64_t i = 0; i < kBlock; ++i) passed[i] += x[i] > after[i] ? 1 : 0;
    for (int64_t i = 0; i < kBlock; ++i) passed[i] = base_[c + i] + (passed[i] ^ falls_[c + i]) - falls_[c + i];
    for (int64_t i = 0; i < kBlock; ++i) out[i] = static_cast<uint8_t>(passed[i]);
  }

  int64_t pixels_, channels_, levels_;
  std::vector<int32_t> after_, falls_, base_;  // falls: -1 or 0
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
