// How long sums of 8-bit products fit 16 bits. See ../common/pointwise.h for the unnamed namespace; nothing of the
// standard library's templates is here, for the same reason.
#pragma once

#include <cstdint>

namespace bitstrata {
namespace {

inline int64_t min64(int64_t a, int64_t b) { return b < a ? b : a; }
inline int64_t max64(int64_t a, int64_t b) { return a < b ? b : a; }

// How many steps int16 sums hold, whatever the activations: any partial sum of a chunk lies between the sums of its
// negative and of its positive products.
class Chunk {
 public:
  explicit Chunk(int64_t largest_input) : most_(INT16_MAX / max64(largest_input, 1)) {}

  // `steps` steps of `lanes` int16 sums, two weights each.
  void add(const int8_t* weights, int64_t steps, int64_t lanes) {
    const int64_t blocks = (steps + kBlock - 1) / kBlock;
    const Sums positive(blocks * lanes), negative(blocks * lanes);
    for (int64_t s = 0; s < steps; ++s, weights += 2 * lanes) {
      const int64_t at = s / kBlock * lanes;
      for (int64_t i = 0; i < lanes; ++i) {
        const int32_t a = weights[2 * i], b = weights[2 * i + 1];
        const int32_t high = (a > 0 ? a : 0) + (b > 0 ? b : 0);
        positive.data[at + i] += high;
        negative.data[at + i] += high - a - b;
        largest_pair_ = max64(largest_pair_, max64(high, high - a - b));
      }
    }
    for (int64_t i = 0; i < lanes; ++i) {
      add_lane(positive.data + i, blocks, lanes);
      add_lane(negative.data + i, blocks, lanes);
    }
  }

  // `all` if there is no limit.
  int64_t steps(int64_t all) const {
    return blocks_ == INT64_MAX ? all : max64(blocks_ * kBlock, most_ / max64(largest_pair_, 1));
  }

 private:
  static constexpr int64_t kBlock = 16;  // steps

  struct Sums {  // [block][lane]
    explicit Sums(int64_t count) : data(new int32_t[static_cast<uint64_t>(count)]()) {}
    ~Sums() { delete[] data; }
    Sums(const Sums&) = delete;
    Sums& operator=(const Sums&) = delete;
    int32_t* data;
  };

  // The shortest stretch of blocks whose sum is too large sets the limit.
  void add_lane(const int32_t* sums, int64_t blocks, int64_t pitch) {
    int64_t sum = 0;
    for (int64_t first = 0, b = 0; b < blocks; ++b) {
      sum += sums[b * pitch];
      for (; sum > most_; sum -= sums[first * pitch], ++first) blocks_ = min64(blocks_, b - first);
    }
  }

  int64_t most_, blocks_ = INT64_MAX, largest_pair_ = 0;
};

}  // namespace
}  // namespace bitstrata
