// The convolution of a quantization-aware step: exact sums, and their moments taken while they are in the cache.
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "bitstrata/qat.h"
#include "checks.h"
#include "quantize_rows.h"

namespace bitstrata {
namespace {

constexpr int64_t kLargestSum = int64_t{1} << 28;  // so that squares of 64 rows add up in 63 bits
constexpr int64_t kStretch = 1 << 15;              // elements at a time, at most

// Sums of squares beyond 64 bits: high * 2^32 + low.
struct Wide {
  int64_t high = 0, low = 0;
  void add(int64_t x) {
    high += x >> 32;
    low += x & 0xFFFFFFFF;
  }
};

struct Part {
  explicit Part(size_t c) : sum(c), square(c), stretch(c), lo(c, INT32_MAX), hi(c, INT32_MIN) {}
  std::vector<int64_t> sum;
  std::vector<Wide> square;
  std::vector<int64_t> stretch;  // squares of the present stretch
  std::vector<int32_t> lo, hi;
};

class Moments : public SumReader {
 public:
  // Sums lie within `bound`.
  Moments(const Kernels& kernels, int64_t channels, int64_t bound, const int32_t* doubled, int16_t* narrow,
          int32_t* wide)
      : kernels_(kernels), channels_(channels), doubled_(doubled), narrow_(narrow), wide_(wide) {
    const int64_t rows = (int64_t{1} << 62) / std::max<int64_t>(bound * bound, 1);
    stretch_ = std::max<int64_t>(std::min(rows, kStretch / channels), 1) * channels;
  }

  void begin(int threads) override {
    for (int i = 0; i < threads; ++i) parts_.emplace_back(static_cast<size_t>(channels_));
    scratch_.resize(doubled_ == nullptr ? 0 : static_cast<size_t>(threads));
  }

  void read(int thread, const int32_t* sums, int64_t at, int64_t count) override {
    const size_t i = static_cast<size_t>(thread);
    if (doubled_ != nullptr) {
      std::vector<int32_t>& both = scratch_[i];
      both.assign(doubled_ + at, doubled_ + at + count);
      kernels_.products->shift_add(both.data(), sums, count, 1);
      sums = both.data();
    }
    if (wide_ != nullptr && sums != wide_ + at) std::memcpy(wide_ + at, sums, static_cast<size_t>(count) * 4);
    Part& p = parts_[i];
    for (int64_t from = 0; from < count; from += stretch_) {
      const int64_t n = std::min(stretch_, count - from);
      std::fill(p.stretch.begin(), p.stretch.end(), 0);
      kernels_.training->qat.sums(sums + from, n, channels_, narrow_ == nullptr ? nullptr : narrow_ + at + from,
                                  p.sum.data(), p.stretch.data(), p.lo.data(), p.hi.data());
      for (size_t c = 0; c < p.square.size(); ++c) p.square[c].add(p.stretch[c]);
    }
  }

  QatMoments result(int64_t rows) {
    Part all(static_cast<size_t>(channels_));
    QatMoments m;
    for (size_t c = 0; c < all.sum.size(); ++c) {
      for (const Part& p : parts_) {
        all.sum[c] += p.sum[c];
        all.square[c].high += p.square[c].high;
        all.square[c].low += p.square[c].low;
        all.lo[c] = std::min(all.lo[c], p.lo[c]);
        all.hi[c] = std::max(all.hi[c], p.hi[c]);
      }
      m.mean.push_back(static_cast<double>(all.sum[c]) / static_cast<double>(rows));
      m.variance.push_back(variance(all.sum[c], all.square[c], rows));
    }
    m.least = all.lo;
    m.most = all.hi;
    return m;
  }

 private:
  // (rows * squares - sum^2) / rows^2, about the integer nearest the mean, so that nothing of weight cancels.
  static double variance(int64_t sum, const Wide& square, int64_t rows) {
    const double n = static_cast<double>(rows);
    const int64_t pivot = static_cast<int64_t>(std::llround(static_cast<double>(sum) / n));
    // Sum of (x - pivot)^2 = squares - 2 pivot sum + rows pivot^2, in two words.
    Wide all = square;
    const int64_t rest = rows * pivot - 2 * sum;  // times pivot, which is below 2^29
    const int64_t high = rest >> 31, low = rest & 0x7FFFFFFF;
    const int64_t upper = high * pivot, lower = low * pivot;  // upper * 2^31 + lower
    all.high += upper >> 1;
    all.add((upper & 1) << 31);
    all.add(lower);
    const double about =
        std::ldexp(static_cast<double>(all.high + (all.low >> 32)), 32) + static_cast<double>(all.low & 0xFFFFFFFF);
    const double off = static_cast<double>(sum - rows * pivot) / n;
    return std::max(about / n - off * off, 0.0);
  }

  const Kernels& kernels_;
  int64_t channels_, stretch_;
  const int32_t* doubled_;
  int16_t* narrow_;
  int32_t* wide_;
  std::vector<Part> parts_;
  std::vector<std::vector<int32_t>> scratch_;
};

// What no sum exceeds.
int64_t bound_of(const ProductShape& s, const ProductCodes& x, const QatWeight& w) {
  const int64_t count = s.group_in() * s.kernel_h * s.kernel_w,
                code = std::max<int64_t>(std::abs(x.lo), std::abs(x.hi));
  int64_t most = 0;
  for (int64_t o = 0; o < s.out_c; ++o) {
    int64_t all = 0;
    for (int64_t i = o * count; i < (o + 1) * count; ++i)
      all += std::abs(w.low == nullptr ? int64_t{w.high[i]} : 2 * int64_t{w.high[i]} + w.low[i]);
    most = std::max(most, all);
  }
  if (most * code > kLargestSum)
    fail("qat_convolution", "sums may reach " + str(most * code) + ", at most " + str(kLargestSum) + " are supported");
  return most * code;
}

// Rows of a weight as integers. In float: values are multiples of a unit but for the rounding of a float, so that the
// quotient is off by far less than half. Returns whether all are within the range; NaN is not.
template <bool kWide>
bool integers(const float* from, int64_t size, double unit, int8_t* upper, int8_t* lower) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: added and taken away again, it rounds to nearest
  constexpr float kLeast = kWide ? -256 : -128, kMost = kWide ? 255 : 127;
  const float inverse = static_cast<float>(1.0 / unit);
  int32_t outside = 0;
  for (int64_t i = 0; i < size; ++i) {
    const float x = (from[i] * inverse + kMagic) - kMagic;
    const float above = x > kLeast ? x : kLeast, inside = above < kMost ? above : kMost;
    outside |= inside != x ? 1 : 0;
    const int32_t integer = static_cast<int32_t>(inside);
    upper[i] = static_cast<int8_t>(kWide ? integer >> 1 : integer);
    if (kWide) lower[i] = static_cast<int8_t>(integer & 1);
  }
  return outside == 0;
}

// Eight rows of eight bytes, the first in the lowest bits, as columns.
void transpose(uint64_t* rows) {
  constexpr uint64_t kMasks[] = {0x00000000FFFFFFFF, 0x0000FFFF0000FFFF, 0x00FF00FF00FF00FF};
  for (int half = 4, stage = 0; half > 0; half /= 2, ++stage)
    for (int i = 0; i < 8; ++i) {
      if ((i & half) != 0) continue;
      const uint64_t other = ((rows[i] >> (8 * half)) ^ rows[i + half]) & kMasks[stage];
      rows[i + half] ^= other;
      rows[i] ^= other << (8 * half);
    }
}

// (taps, in) as (in, taps).
void channels_first(const int8_t* from, int64_t in, int64_t taps, int8_t* to) {
  constexpr int64_t kSide = 8;
  const int64_t in_blocks = in / kSide * kSide, tap_blocks = taps / kSide * kSide;
  for (int64_t i = 0; i < in_blocks; i += kSide)
    for (int64_t t = 0; t < tap_blocks; t += kSide) {
      uint64_t rows[kSide];
      for (int64_t k = 0; k < kSide; ++k) std::memcpy(&rows[k], from + (t + k) * in + i, kSide);
      transpose(rows);
      for (int64_t k = 0; k < kSide; ++k) std::memcpy(to + (i + k) * taps + t, &rows[k], kSide);
    }
  for (int64_t i = 0; i < in; ++i)
    for (int64_t t = i < in_blocks ? tap_blocks : 0; t < taps; ++t) to[i * taps + t] = from[t * in + i];
}

}  // namespace

bool qat_integers(int threads, const float* values, int64_t out, int64_t in, int64_t taps, bool channels_last,
                  const double* unit, int8_t* high, int8_t* low) {
  std::atomic<bool> fits{true};
  const int64_t size = in * taps;
  const auto convert = low == nullptr ? integers<false> : integers<true>;
  const bool moved = channels_last && taps > 1 && in > 1;
  parallel_for(threads, out, std::max<int64_t>((1 << 14) / size, 1), [&](int64_t begin, int64_t end) {
    std::vector<int8_t> row(moved ? 2 * size : 0);
    for (int64_t o = begin; o < end; ++o) {
      int8_t *const upper = high + o * size, *const lower = low == nullptr ? nullptr : low + o * size;
      int8_t *const at = moved ? row.data() : upper, *const below = moved && low != nullptr ? at + size : lower;
      if (!convert(values + o * size, size, unit[o], at, below)) fits = false;
      if (!moved) continue;
      channels_first(at, in, taps, upper);
      if (low != nullptr) channels_first(below, in, taps, lower);
    }
  });
  return fits;
}

bool qat_convolution(const Kernels& kernels, int threads, const ProductShape& s, const ProductCodes& x,
                     const QatWeight& w, int16_t* narrow, int32_t* wide, QatMoments* moments) {
  check_product("qat_convolution", s);
  const int64_t bound = bound_of(s, x, w);
  std::unique_ptr<int32_t[]> doubled;
  if (w.low != nullptr) {
    doubled.reset(new int32_t[static_cast<size_t>(s.batch * s.out_h * s.out_w * s.out_c)]);
    ProductResult first;
    first.acc = doubled.get();
    conv_forward(kernels, threads, s, x, w.high, first);
  }
  Moments reader(kernels, s.out_c, bound, doubled.get(), narrow, wide);
  ProductResult result;
  if (wide != nullptr && w.low == nullptr) result.acc = wide;
  result.reader = &reader;
  conv_forward(kernels, threads, s, x, w.low == nullptr ? w.high : w.low, result);
  const QatMoments found = reader.result(s.batch * s.out_h * s.out_w);
  bool fits = true;
  for (size_t c = 0; c < found.least.size(); ++c)
    fits = fits && found.least[c] >= INT16_MIN && found.most[c] <= INT16_MAX;
  if (moments != nullptr) *moments = found;
  return fits;
}

}  // namespace bitstrata
