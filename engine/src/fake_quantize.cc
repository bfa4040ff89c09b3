#include "bitstrata/fake_quantize.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "parallel.h"

namespace bitstrata {
namespace {

constexpr int64_t kBlock = 1 << 14;  // elements of a piece of work; part of the definition of sums
constexpr float kSmallest = 1e-8f;

float plain(float x) { return std::isnan(x) ? std::numeric_limits<float>::quiet_NaN() : x; }  // as kernels need NaN
float at_least_smallest(float x) { return x < kSmallest ? kSmallest : plain(x); }

void set_range(FakeArgs& a, const FakeRule& rule, float first, float last) {
  const float most = std::numeric_limits<float>::infinity();
  a.first = rule.everywhere ? -most : rule.open_range ? std::nextafter(first, most) : first;
  a.last = rule.everywhere ? most : rule.open_range ? std::nextafter(last, -most) : last;
}

void set_clipping(FakeArgs& a, const FakeRule& rule, float alpha) {
  const float level = at_least_smallest(std::fabs(alpha)), codes = static_cast<float>(rule.hi - rule.lo);
  const float width = rule.grid == FakeGrid::kUnit ? 1.0f : 2.0f;  // of the range, in levels
  a.divisor = level;
  a.scale = level * width / codes;
  a.unit = width / codes;
  a.add = rule.grid == FakeGrid::kUnit ? 0.0f : 0.5f;
  set_range(a, rule, rule.grid == FakeGrid::kUnit ? 0.0f : -level, level);
}

FakeArgs args_of(const FakeRule& rule, const FakeTensor& t, int64_t channel) {
  FakeArgs a{};
  a.lo = static_cast<float>(rule.lo), a.hi = static_cast<float>(rule.hi);
  a.power = std::ldexp(1.0f, rule.shift);
  a.slope_add = rule.slope_add;
  a.narrow = t.narrow, a.inside = rule.calibrated;
  a.gain = 1.0f;
  const float step = t.step[channel], s = at_least_smallest(step);
  a.divisor = a.scale = s;
  set_range(a, rule, a.lo, a.hi);
  switch (rule.grid) {
    case FakeGrid::kUniform:
      break;
    case FakeGrid::kAffine:
      a.origin = plain(t.extra[channel]);
      a.add = a.origin / s;
      break;
    case FakeGrid::kSymmetric:
      a.hi += 1.0f;  // the end of the last cell
      a.add = 0.5f;
      set_range(a, rule, a.lo + 0.5f, a.hi - 0.5f);
      break;
    case FakeGrid::kNested:
      a.gain = at_least_smallest(t.extra[channel]);
      a.scale = a.gain * s * a.power;
      a.add = 0.5f;
      set_range(a, rule, a.lo, a.hi + 1.0f);
      break;
    case FakeGrid::kVertical:
      a.scale = s * a.power;
      a.add = rule.add;
      break;
    case FakeGrid::kUnit:
    case FakeGrid::kCentred:
      set_clipping(a, rule, step);
      break;
    case FakeGrid::kTanh:
    case FakeGrid::kTanhFloor:
      a.divisor = plain(step);
      a.scale = rule.grid == FakeGrid::kTanh ? 2.0f / (a.hi - a.lo) : 1.0f / -a.lo;
      a.add = rule.grid == FakeGrid::kTanh ? 0.5f : rule.add;
      break;
    case FakeGrid::kScaled:
      a.divisor = rule.factor, a.unit = rule.rounded, a.gain = rule.gain;
      a.scale = 1.0f / a.hi;
      set_range(a, rule, -1.0f, 1.0f);
      break;
    case FakeGrid::kSigmoids:
      a.divisor = 1.0f;
      a.scale = 1.0f / a.hi;
      a.gain = rule.gain, a.alpha = rule.factor;
      a.reach = 20.0f + 0.5f / rule.factor;
      break;
  }
  return a;
}

// The work on a tensor: rows of `inner` neighbours that share a step, in pieces of at most kBlock elements.
class Pieces {
 public:
  Pieces(const FakeRule& rule, const FakeTensor& t)
      : inner_(t.inner), by_row_((t.inner + kBlock - 1) / kBlock), count_(t.outer * t.channels * by_row_) {
    for (int64_t c = 0; c < t.channels; ++c) args_.push_back(args_of(rule, t, c));
    if (rule.grid != FakeGrid::kSigmoids) return;
    for (int m = 1; m <= rule.hi; ++m)
      ratios_.push_back(static_cast<float>(std::exp(((m - 0.5) / rule.hi - 0.5) / rule.factor)));
    for (FakeArgs& a : args_) a.ratios = ratios_.data(), a.count = rule.hi;
  }
  Pieces(const Pieces&) = delete;  // whose arguments point to ratios
  Pieces& operator=(const Pieces&) = delete;

  // Calls body(piece, arguments, first element, number of elements) for all.
  template <typename Body>
  void run(int threads, const Body& body) const {
    const int64_t grain = std::max<int64_t>(1, kBlock / std::max<int64_t>(inner_, 1));
    parallel_for(threads, count_, grain, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t row = piece / by_row_, start = piece % by_row_ * kBlock;
        body(piece, args_[static_cast<size_t>(row % channels())], row * inner_ + start,
             std::min(kBlock, inner_ - start));
      }
    });
  }

  int64_t channels() const { return static_cast<int64_t>(args_.size()); }
  int64_t count() const { return count_; }
  int64_t channel(int64_t piece) const { return piece / by_row_ % channels(); }
  const FakeArgs& of(int64_t channel) const { return args_[static_cast<size_t>(channel)]; }

 private:
  int64_t inner_, by_row_, count_;
  std::vector<FakeArgs> args_;
  std::vector<float> ratios_;
};

// What the kernels' sums say of the step or the clipping level, and of the offset or the ratio.
double step_gradient(FakeGrid grid, const FakeArgs& a, float step, const FakeSums& sums) {
  if (grid == FakeGrid::kNested) return static_cast<double>(a.gain) * sums.slopes;
  if (grid == FakeGrid::kTanh || grid == FakeGrid::kTanhFloor) return -sums.slopes / static_cast<double>(a.divisor);
  const bool clips = grid == FakeGrid::kUnit || grid == FakeGrid::kCentred;
  return clips && step < 0 ? -sums.slopes : sums.slopes;  // of |alpha|; 1 at 0, where the level must be able to grow
}
double extra_gradient(FakeGrid grid, const FakeArgs& a, const FakeSums& sums) {
  return grid == FakeGrid::kNested ? static_cast<double>(a.divisor) * sums.second : sums.second;
}

}  // namespace

void fake_quantize(const Kernels& kernels, int threads, const FakeRule& rule, const FakeTensor& t, const void* x,
                   void* out) {
  const FakeKernels& fake = kernels.training->fake;
  const auto grid = static_cast<size_t>(rule.grid);
  Pieces(rule, t).run(threads, [&](int64_t, const FakeArgs& a, int64_t at, int64_t count) {
    if (t.bf16)
      fake.forward_bf16[grid](a, static_cast<const uint16_t*>(x) + at, count, static_cast<uint16_t*>(out) + at);
    else
      fake.forward_f32[grid](a, static_cast<const float*>(x) + at, count, static_cast<float*>(out) + at);
  });
}

void fake_quantize_gradient(const Kernels& kernels, int threads, const FakeRule& rule, const FakeTensor& t,
                            double factor, const void* g, const void* x, void* dx, float* dstep, float* dextra) {
  const FakeKernels& fake = kernels.training->fake;
  const auto grid = static_cast<size_t>(rule.grid);
  const bool summed = dstep != nullptr || dextra != nullptr;
  const Pieces pieces(rule, t);
  std::vector<FakeSums> sums(static_cast<size_t>(summed ? pieces.count() : 0), FakeSums{0, 0});
  pieces.run(threads, [&](int64_t piece, const FakeArgs& a, int64_t at, int64_t count) {
    FakeSums* to = summed ? &sums[static_cast<size_t>(piece)] : nullptr;
    if (t.bf16)
      fake.backward_bf16[grid](a, static_cast<const uint16_t*>(g) + at, static_cast<const uint16_t*>(x) + at, count,
                               dx == nullptr ? nullptr : static_cast<uint16_t*>(dx) + at, to);
    else
      fake.backward_f32[grid](a, static_cast<const float*>(g) + at, static_cast<const float*>(x) + at, count,
                              dx == nullptr ? nullptr : static_cast<float*>(dx) + at, to);
  });
  if (!summed) return;
  std::vector<FakeSums> total(static_cast<size_t>(t.channels), FakeSums{0, 0});
  for (int64_t piece = 0; piece < pieces.count(); ++piece) {
    FakeSums& to = total[static_cast<size_t>(pieces.channel(piece))];
    to.slopes += sums[static_cast<size_t>(piece)].slopes;
    to.second += sums[static_cast<size_t>(piece)].second;
  }
  for (int64_t c = 0; c < t.channels; ++c) {
    const FakeSums& of = total[static_cast<size_t>(c)];
    const FakeArgs& a = pieces.of(c);
    if (dstep != nullptr) dstep[c] = static_cast<float>(step_gradient(rule.grid, a, t.step[c], of) * factor);
    if (dextra != nullptr) dextra[c] = static_cast<float>(extra_gradient(rule.grid, a, of) * factor);
  }
}

}  // namespace bitstrata
