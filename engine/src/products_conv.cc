// Forward products and input gradients as convolutions by the inference kernels.
//
// A product is one or several phases, each a stride-1 part of the output's positions (only the gradient of a strided
// convolution has more than one); a phase is one or several parts, convolutions whose sums are shifted and added.
#include <algorithm>
#include <cstring>
#include <vector>

#include "bitstrata/products.h"
#include "parallel.h"
#include "products.h"
#include "workspace.h"

namespace bitstrata {
namespace {

// Buffers of the shared workspace, and of each thread's.
enum Shared { kPacked, kWeights };
enum Own { kPrepared, kStaged, kAcc, kPartial };

constexpr int64_t kUnitBytes = 192 * 1024;  // of sums computed at a time: they and what they are made of stay in cache
constexpr int64_t kMergedWidth = 64;        // pixels of a row, where pixels are not neighbours of each other
constexpr int64_t kFactorPeriod = 256;      // factors are repeated to at least as many, so that loops are long

template <typename T>
T* moved(T* p, int64_t elements) {  // p may be outside of the memory it will be used for
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(p) +
                              static_cast<uintptr_t>(elements * static_cast<int64_t>(sizeof(T))));
}

// Weights as a convolution by one part takes them: (outs, ins, taps_h, taps_w) of (in_c, out_c) or (out_c, in_c).
struct Weights {
  const int8_t* data;
  int64_t out_step, in_step;  // from output (input) channel to the next, in each group
  int64_t group_step;         // from group to group
  int64_t tap_y, tap_x;       // offset of the first tap
  int64_t step_y, step_x;     // from tap to tap
};

// One convolution of (a part of the channels of) each image.
struct Part {
  ConvShape shape;
  Weights weights{};
  const ConvKernel* kernel = nullptr;
  int64_t packed_at = 0;
  int64_t row_bytes = 0;  // staged; 0: none
  int64_t crop_y = 0, crop_x = 0;
  int64_t map_w = 0, map_c = 0;   // of the image
  std::vector<int64_t> channels;  // of the image, those that are convolved; empty: all
  std::vector<uint8_t> factors;   // of the convolved channels, repeated; empty: none
  int64_t period = 0;
  int shift = 0;  // of the sum before this part is added

  bool as_it_is() const { return channels.empty() && factors.empty() && crop_x == 0 && map_w == shape.in_w; }
};

// Positions y0 + stride_h * i, x0 + stride_w * j of the output.
struct Phase {
  std::vector<Part> parts;
  int64_t y0 = 0, x0 = 0, stride_h = 1, stride_w = 1;
  int64_t out_h = 0, out_w = 0;
  int shift = 0;  // of the sum of all parts
  bool whole() const { return stride_h == 1 && stride_w == 1; }
};

// Taps of one axis that reach the positions first, first + stride, ...: a convolution with stride 1 of the gradient.
struct AxisPhase {
  int64_t count = 0;  // positions
  int64_t taps = 0;   // tap m of the convolution is tap first_tap + (taps - 1 - m) * tap_step of the weight
  int64_t first_tap = 0, tap_step = 1;
  int64_t dilation = 1, pad = 0;  // pad < 0: so many elements of the gradient are left out
};

AxisPhase axis_phase(int64_t first, int64_t in, int64_t kernel, int64_t stride, int64_t dilation, int64_t pad) {
  AxisPhase p;
  p.count = in > first ? (in - first + stride - 1) / stride : 0;
  int64_t divisor = stride, rest = dilation;
  while (rest != 0) std::swap(divisor %= rest, rest);
  p.tap_step = stride / divisor;
  p.dilation = dilation / divisor;
  while (p.first_tap < std::min(kernel, p.tap_step) && (first + pad - p.first_tap * dilation) % stride != 0)
    ++p.first_tap;
  if (p.first_tap >= std::min(kernel, p.tap_step)) return p;
  p.taps = (kernel - p.first_tap + p.tap_step - 1) / p.tap_step;
  p.pad = (p.taps - 1) * p.dilation - (first + pad - p.first_tap * dilation) / stride;
  return p;
}

// How the shifts of the channels are distributed.
struct Shifts {
  std::vector<int> codes, weights, sums;  // (channels,) each, or empty: 0
  int most_codes = 0, most_weights = 0;
};

int room(int32_t lo, int32_t hi, int32_t least, int32_t most) {
  int shift = 0;
  while (shift < 7 && lo * (2 << shift) >= least && hi * (2 << shift) <= most) ++shift;
  return shift;
}

Shifts distribute(const ProductCodes& x, int64_t channels, int32_t w_lo, int32_t w_hi) {
  Shifts s;
  if (x.shift == nullptr || *std::max_element(x.shift, x.shift + channels) == 0) return s;
  const int room_x = room(x.lo, x.hi, lowest(x.dtype), highest(x.dtype)), room_w = room(w_lo, w_hi, -128, 127);
  for (int64_t c = 0; c < channels; ++c) {
    const int all = x.shift[c], first = std::min(all, room_x), second = std::min(all - first, room_w);
    s.codes.push_back(first);
    s.weights.push_back(second);
    s.sums.push_back(all - first - second);
    s.most_codes = std::max(s.most_codes, first);
    s.most_weights = std::max(s.most_weights, second);
  }
  return s;
}

// A convolution before its channels are divided.
struct Plan {
  const Kernels& kernels;
  ProductCodes x;
  int64_t in_c, out_c, groups;
  int32_t w_lo, w_hi;
  Shifts shifts;
  std::vector<Phase> phases;
  Workspace& shared;
};

bool uses(const Shifts& s, int64_t channel, int sum_shift) {
  return s.sums.empty() || s.sums[static_cast<size_t>(channel)] == sum_shift;
}

// Sets the channels and the factors of a part: those whose sums are shifted by `sum_shift`.
void choose_channels(const Plan& plan, int sum_shift, bool several, Part* part) {
  if (plan.shifts.sums.empty()) return;
  std::vector<uint8_t> factors;
  for (int64_t c = 0; c < plan.in_c; ++c) {
    const bool used = uses(plan.shifts, c, sum_shift);
    if (several && plan.groups == 1) {
      if (!used) continue;
      part->channels.push_back(c);
    }
    factors.push_back(used ? static_cast<uint8_t>(1 << plan.shifts.codes[static_cast<size_t>(c)]) : uint8_t{0});
  }
  if (std::all_of(factors.begin(), factors.end(), [](uint8_t f) { return f == 1; })) return;
  part->period = static_cast<int64_t>(factors.size());
  const int64_t repeats = (kFactorPeriod + part->period - 1) / part->period;
  for (int64_t i = 0; i < repeats; ++i) part->factors.insert(part->factors.end(), factors.begin(), factors.end());
}

// The weights of a part in the kernel's order, or where they are if they lie so already.
const int8_t* gather(const Plan& plan, const Part& part, int threads, int8_t* to) {
  const ConvShape& s = part.shape;
  const Weights& w = part.weights;
  const int64_t ins = s.group_in(), outs = s.group_out(), taps = s.kernel_h * s.kernel_w;
  const bool shifts = plan.shifts.most_weights > 0;
  constexpr int64_t kTile = 16;  // channels of either side, so that a tile stays in the cache in both orders
  if (part.channels.empty() && !shifts && w.in_step == taps && w.out_step == ins * taps &&
      w.group_step == outs * ins * taps && w.step_x == 1 && w.step_y == s.kernel_w && w.tap_x == 0 && w.tap_y == 0)
    return w.data;
  const bool all = part.channels.empty();
  parallel_for(threads, s.out_c, std::max<int64_t>(kTile, 65536 / (ins * taps)), [&](int64_t begin, int64_t end) {
    int8_t factors[kTile];
    for (int64_t first = begin, last; first < end; first = last) {
      const int64_t group = first / outs;
      last = std::min({first + kTile, (group + 1) * outs, end});
      for (int64_t i = 0; i < ins; i += kTile) {
        const int64_t count = std::min(kTile, ins - i);
        const int64_t* channels = all ? nullptr : part.channels.data() + i;
        for (int64_t j = 0; shifts && j < count; ++j)
          factors[j] = static_cast<int8_t>(
              1 << plan.shifts.weights[static_cast<size_t>(all ? group * ins + i + j : channels[j])]);
        for (int64_t tap = 0; tap < taps; ++tap) {
          const int8_t* of_tap = w.data + group * w.group_step + w.tap_y + w.tap_x + tap / s.kernel_w * w.step_y +
                                 tap % s.kernel_w * w.step_x;
          for (int64_t o = first; o < last; ++o) {
            const int8_t* from = of_tap + (o - group * outs) * w.out_step;
            int8_t* at = to + (o * ins + i) * taps + tap;
            if (!all)
              for (int64_t j = 0; j < count; ++j) at[j * taps] = from[channels[j] * w.in_step];
            else
              for (int64_t j = 0; j < count; ++j) at[j * taps] = from[(i + j) * w.in_step];
            for (int64_t j = 0; shifts && j < count; ++j) at[j * taps] = static_cast<int8_t>(at[j * taps] * factors[j]);
          }
        }
      }
    }
  });
  return to;
}

// Adds a phase: `shape` has all extents; channels, bounds and kernel are set here.
void add_phase(Plan* plan, Phase phase, const ConvShape& shape, int64_t crop_y, int64_t crop_x, int64_t map_w,
               const Weights& w) {
  std::vector<int> sum_shifts = plan->shifts.sums;
  if (sum_shifts.empty()) sum_shifts.push_back(0);
  std::sort(sum_shifts.begin(), sum_shifts.end(), [](int a, int b) { return a > b; });
  sum_shifts.erase(std::unique(sum_shifts.begin(), sum_shifts.end()), sum_shifts.end());
  for (size_t i = 0; i < sum_shifts.size(); ++i) {
    Part part;
    choose_channels(*plan, sum_shifts[i], sum_shifts.size() > 1, &part);
    part.shift = i == 0 ? 0 : sum_shifts[i - 1] - sum_shifts[i];
    part.weights = w;
    part.crop_y = crop_y, part.crop_x = crop_x;
    part.map_w = map_w, part.map_c = plan->in_c;
    ConvShape& s = part.shape;
    s = shape;
    s.in_c = part.channels.empty() ? plan->in_c : static_cast<int64_t>(part.channels.size());
    s.out_c = plan->out_c;
    s.groups = plan->groups;
    s.mul = 1, s.add = 0;
    s.code_lo = plan->w_lo * (1 << plan->shifts.most_weights);
    s.code_hi = plan->w_hi * (1 << plan->shifts.most_weights);
    s.input_lo = std::min(0, plan->x.lo * (1 << plan->shifts.most_codes));
    s.input_hi = std::max(0, plan->x.hi * (1 << plan->shifts.most_codes));
    s.input_dtype = plan->x.dtype;
    part.kernel = plan->kernels.conv(s);
    part.row_bytes = part.kernel->staged_row_bytes(s);
    phase.parts.push_back(std::move(part));
  }
  phase.shift = sum_shifts.back();
  plan->phases.push_back(std::move(phase));
}

void pack(Plan* plan, int threads) {
  int64_t bytes = 0, weights = 0, channels = 0;
  for (Phase& phase : plan->phases)
    for (Part& part : phase.parts) {
      const ConvShape& s = part.shape;
      part.packed_at = bytes;
      bytes += align_up(part.kernel->packed_bytes(s));
      weights = std::max(weights, s.out_c * s.group_in() * s.kernel_h * s.kernel_w);
      channels = std::max(channels, s.in_c);
    }
  uint8_t* packed = plan->shared.get(kPacked, bytes);
  int8_t* gathered = reinterpret_cast<int8_t*>(plan->shared.get(kWeights, weights));
  const std::vector<int32_t> pad(static_cast<size_t>(channels), 0);
  for (const Phase& phase : plan->phases)
    for (const Part& part : phase.parts)
      part.kernel->pack(part.shape, gather(*plan, part, threads, gathered), pad.data(), packed + part.packed_at);
}

// Copies what a part convolves of rows [begin, end) of its (cropped) map; `to` is where row 0 would be.
void prepare(const Kernels& kernels, const Part& part, const uint8_t* image, int64_t begin, int64_t end, uint8_t* to) {
  const ConvShape& s = part.shape;
  const int64_t row = s.in_w * s.in_c;
  if (part.channels.empty() && part.crop_x == 0 && part.map_w == s.in_w) {
    const uint8_t* from = image + (begin + part.crop_y) * row;
    kernels.products->multiply_codes(from, part.factors.data(), moved(to, begin * row), (end - begin) * row,
                                     static_cast<int64_t>(part.factors.size()));
    return;
  }
  for (int64_t y = begin; y < end; ++y)
    for (int64_t x = 0; x < s.in_w; ++x) {
      const uint8_t* from = image + ((y + part.crop_y) * part.map_w + x + part.crop_x) * part.map_c;
      uint8_t* at = moved(to, y * row + x * s.in_c);
      for (int64_t c = 0; c < s.in_c; ++c) {
        const uint8_t code = part.channels.empty() ? from[c] : from[part.channels[static_cast<size_t>(c)]];
        at[c] = part.factors.empty() ? code : static_cast<uint8_t>(code * part.factors[static_cast<size_t>(c)]);
      }
    }
}

// Output rows [begin, end) of one part; `out` is where row 0 would be.
void run_part(const Kernels& kernels, const Part& part, const uint8_t* packed, const uint8_t* image, int64_t begin,
              int64_t end, Workspace& own, int32_t* out) {
  const ConvShape& s = part.shape;
  const int64_t first = begin * s.stride_h, last = (end - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1;
  const int64_t map_first = std::clamp<int64_t>(first - s.pad_top, 0, s.in_h);
  const int64_t map_last = std::clamp<int64_t>(last - s.pad_top, map_first, s.in_h);
  const int64_t row = s.in_w * s.in_c;
  const uint8_t* from = image + part.crop_y * row;
  if (!part.as_it_is()) {
    uint8_t* prepared = moved(own.get(kPrepared, 0), -map_first * row);
    prepare(kernels, part, image, map_first, map_last, prepared);
    from = prepared;
  }
  const uint8_t* packed_part = packed + part.packed_at;
  if (part.row_bytes == 0) return part.kernel->run(s, packed_part, from, out, begin, end);
  uint8_t* staged = moved(own.get(kStaged, 0), -first * part.row_bytes);
  part.kernel->stage(s, packed_part, from, staged, first, last);
  part.kernel->run(s, packed_part, staged, out, begin, end);
}

// The loop over all units of work: an image's rows of sums at a time.
class Execution {
 public:
  Execution(const Plan& plan, int64_t images, int64_t in_h, int64_t in_w, int64_t out_h, int64_t out_w,
            const ProductResult& result)
      : plan_(plan),
        images_(images),
        in_size_(in_h * in_w * plan.in_c),
        out_h_(out_h),
        out_row_(out_w * plan.out_c),
        out_w_(out_w),
        result_(result),
        rows_(rows_of_unit()),
        units_of_image_((out_h + rows_ - 1) / rows_) {}

  int64_t units() const { return images_ * units_of_image_; }

  void reserve(Workspace& own) const {
    int64_t prepared = 0, staged = 0, partial = 0;
    for (const Phase& phase : plan_.phases)
      for (const Part& part : phase.parts) {
        const ConvShape& s = part.shape;
        const int64_t rows = std::min(rows_, s.out_h);
        const int64_t in_rows = (rows - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1;
        if (!part.as_it_is()) prepared = std::max(prepared, std::min(in_rows, s.in_h) * s.in_w * s.in_c);
        staged = std::max(staged, in_rows * part.row_bytes);
        if (!phase.whole() || phase.parts.size() > 1) partial = std::max(partial, 2 * rows * s.out_w * s.out_c * 4);
      }
    own.get(kPrepared, prepared);
    own.get(kStaged, staged);
    own.get(kPartial, partial);
    own.get(kAcc, result_.acc == nullptr ? rows_ * out_row_ * 4 : 0);
  }

  // lo, hi: (channels,) of this thread, or null.
  void run(int64_t unit, Workspace& own, int32_t* lo, int32_t* hi) const {
    const int64_t image = unit / units_of_image_, begin = unit % units_of_image_ * rows_;
    const int64_t end = std::min(begin + rows_, out_h_);
    const int64_t at = image * out_h_ * out_row_, here = at + begin * out_row_;
    int32_t* acc = result_.acc != nullptr ? result_.acc + at
                                          : moved(reinterpret_cast<int32_t*>(own.get(kAcc, 0)), -begin * out_row_);
    const uint8_t* from = static_cast<const uint8_t*>(plan_.x.data) + image * in_size_;
    int32_t* rows = moved(acc, begin * out_row_);
    if (plan_.phases.size() == 1 && plan_.phases[0].whole()) {
      run_phase(plan_.phases[0], from, begin, end, own, acc);
    } else {
      std::memset(rows, 0, static_cast<size_t>((end - begin) * out_row_) * 4);
      for (const Phase& phase : plan_.phases) scatter(phase, from, own, acc);
    }
    const int64_t pixels = (end - begin) * out_w_;
    const ProductKernels& loops = *plan_.kernels.products;
    if (lo != nullptr) loops.bounds(rows, pixels, plan_.out_c, lo, hi);
    if (result_.values != nullptr) loops.scale(rows, result_.factor, result_.values + here, pixels, plan_.out_c);
  }

 private:
  int64_t rows_of_unit() const {
    if (plan_.phases.size() != 1 || !plan_.phases[0].whole()) return out_h_;
    const ConvShape& s = plan_.phases[0].parts[0].shape;
    const int64_t overlap = (s.kernel_h - 1) * s.dilation_h / s.stride_h;
    return std::min(out_h_, std::max({kUnitBytes / (out_row_ * 4), 3 * overlap, int64_t{1}}));
  }

  void run_phase(const Phase& phase, const uint8_t* image, int64_t begin, int64_t end, Workspace& own,
                 int32_t* out) const {
    const uint8_t* packed = plan_.shared.get(kPacked, 0);
    for (size_t i = 0; i < phase.parts.size(); ++i) {
      const Part& part = phase.parts[i];
      if (i == 0) {
        run_part(plan_.kernels, part, packed, image, begin, end, own, out);
        continue;
      }
      const int64_t row = out_row_of(phase), count = (end - begin) * row;
      int32_t* partial = moved(reinterpret_cast<int32_t*>(own.get(kPartial, 0)), phase.whole() ? 0 : count);
      run_part(plan_.kernels, part, packed, image, begin, end, own, moved(partial, -begin * row));
      plan_.kernels.products->shift_add(moved(out, begin * row), partial, count, part.shift);
    }
    if (phase.shift == 0) return;
    const int64_t row = out_row_of(phase);
    uint32_t* sums = reinterpret_cast<uint32_t*>(moved(out, begin * row));
    for (int64_t i = 0; i < (end - begin) * row; ++i) sums[i] <<= phase.shift;
  }
  int64_t out_row_of(const Phase& phase) const { return phase.out_w * plan_.out_c; }

  // All rows of a phase into their places of the output.
  void scatter(const Phase& phase, const uint8_t* image, Workspace& own, int32_t* out) const {
    int32_t* sums = reinterpret_cast<int32_t*>(own.get(kPartial, 0));
    run_phase(phase, image, 0, phase.out_h, own, sums);
    for (int64_t y = 0; y < phase.out_h; ++y)
      for (int64_t x = 0; x < phase.out_w; ++x, sums += plan_.out_c)
        std::memcpy(out + (phase.y0 + y * phase.stride_h) * out_row_ + (phase.x0 + x * phase.stride_w) * plan_.out_c,
                    sums, static_cast<size_t>(plan_.out_c) * 4);
  }

  const Plan& plan_;
  int64_t images_, in_size_, out_h_, out_row_, out_w_;
  ProductResult result_;
  int64_t rows_, units_of_image_;
};

// Executes several loops that share the plan's channels, and collects the bounds.
void execute(int threads, const Plan& plan, const std::vector<Execution>& executions, const ProductResult& result) {
  const bool bounds = result.lo != nullptr || result.hi != nullptr;
  const size_t channels = static_cast<size_t>(plan.out_c);
  Workspaces own(std::max(threads, 1));
  std::vector<std::vector<int32_t>> lo, hi;
  for (int i = 0; i < own.count(); ++i) {
    for (const Execution& e : executions) e.reserve(own[i]);
    lo.emplace_back(bounds ? channels : 0, INT32_MAX);
    hi.emplace_back(bounds ? channels : 0, INT32_MIN);
  }
  for (const Execution& e : executions)
    parallel_for(threads, e.units(), 1, [&](int64_t begin, int64_t end) {
      const int mine = own.take();
      const size_t i = static_cast<size_t>(mine);
      for (int64_t unit = begin; unit < end; ++unit)
        e.run(unit, own[mine], bounds ? lo[i].data() : nullptr, bounds ? hi[i].data() : nullptr);
      own.give(mine);
    });
  for (size_t c = 0; bounds && c < channels; ++c) {
    int32_t least = INT32_MAX, most = INT32_MIN;
    for (const auto& each : lo) least = std::min(least, each[c]);
    for (const auto& each : hi) most = std::max(most, each[c]);
    if (result.lo != nullptr) result.lo[c] = least;
    if (result.hi != nullptr) result.hi[c] = most;
  }
}

struct Range {
  int32_t lo, hi;
};

Range range_of(const int8_t* w, int64_t count) {
  uint8_t least = 255, most = 0;  // with the sign bit turned round, which every processor compares fast
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t v = static_cast<uint8_t>(static_cast<uint8_t>(w[i]) ^ 0x80);
    least = v < least ? v : least;
    most = most < v ? v : most;
  }
  return {least - 128, most - 128};
}

// A 1x1 convolution that treats each pixel alike.
bool merges(const ProductShape& s) {
  return s.kernel_h == 1 && s.kernel_w == 1 && s.stride_h == 1 && s.stride_w == 1 && s.groups == 1 &&
         s.in_h == s.out_h && s.in_w == s.out_w && s.pad_top == 0 && s.pad_left == 0;
}

ConvShape extents(int64_t in_h, int64_t in_w, int64_t out_h, int64_t out_w, int64_t kernel_h, int64_t kernel_w) {
  ConvShape c{};
  c.in_h = in_h, c.in_w = in_w, c.out_h = out_h, c.out_w = out_w;
  c.kernel_h = kernel_h, c.kernel_w = kernel_w;
  c.stride_h = c.stride_w = c.dilation_h = c.dilation_w = 1;
  return c;
}

// All pixels of the batch as rows of kMergedWidth, and the rest as one more row.
void run_merged(Plan* plan, int threads, int64_t pixels, const Weights& w, const ProductResult& result) {
  const int64_t width = std::min(pixels, kMergedWidth), rows = pixels / width, rest = pixels % width;
  Phase phase;
  phase.out_h = rows, phase.out_w = width;
  add_phase(plan, phase, extents(rows, width, rows, width, 1, 1), 0, 0, width, w);
  pack(plan, threads);
  std::vector<Execution> executions;
  executions.emplace_back(*plan, 1, rows, width, rows, width, result);
  Plan tail = *plan;
  if (rest > 0) {
    const int64_t done = rows * width;
    tail.x.data = static_cast<const uint8_t*>(plan->x.data) + done * plan->in_c;
    tail.phases[0].out_h = 1, tail.phases[0].out_w = rest;
    for (Part& part : tail.phases[0].parts) {
      part.shape.in_h = part.shape.out_h = 1;
      part.shape.in_w = part.shape.out_w = part.map_w = rest;
      part.row_bytes = part.kernel->staged_row_bytes(part.shape);
    }
    ProductResult left = result;
    if (left.acc != nullptr) left.acc += done * plan->out_c;
    if (left.values != nullptr) left.values += done * plan->out_c;
    executions.emplace_back(tail, 1, 1, rest, 1, rest, left);
  }
  execute(threads, *plan, executions, result);
}

Plan make_plan(const Kernels& kernels, const ProductCodes& x, int64_t in_c, int64_t out_c, int64_t groups,
               const int8_t* w, int64_t weights, Workspace& shared) {
  const Range range = range_of(w, weights);
  return {kernels, x, in_c, out_c, groups, range.lo, range.hi, distribute(x, in_c, range.lo, range.hi), {}, shared};
}

}  // namespace

void conv_forward(const Kernels& kernels, int threads, const ProductShape& s, const ProductCodes& x, const int8_t* w,
                  const ProductResult& y) {
  check_product("conv_forward", s);
  check_codes("conv_forward", x, s.in_c);
  const int64_t taps = s.kernel_h * s.kernel_w, ins = s.group_in();
  Workspaces shared(1);
  Plan plan = make_plan(kernels, x, s.in_c, s.out_c, s.groups, w, s.out_c * ins * taps, shared[0]);
  const Weights weights{w, ins * taps, taps, s.group_out() * ins * taps, 0, 0, s.kernel_w, 1};
  if (merges(s)) return run_merged(&plan, threads, s.batch * s.in_h * s.in_w, weights, y);
  ConvShape c = extents(s.in_h, s.in_w, s.out_h, s.out_w, s.kernel_h, s.kernel_w);
  c.stride_h = s.stride_h, c.stride_w = s.stride_w;
  c.dilation_h = s.dilation_h, c.dilation_w = s.dilation_w;
  c.pad_top = s.pad_top, c.pad_left = s.pad_left;
  Phase phase;
  phase.out_h = s.out_h, phase.out_w = s.out_w;
  add_phase(&plan, phase, c, 0, 0, s.in_w, weights);
  pack(&plan, threads);
  execute(threads, plan, {Execution(plan, s.batch, s.in_h, s.in_w, s.out_h, s.out_w, y)}, y);
}

void conv_input_grad(const Kernels& kernels, int threads, const ProductShape& s, const ProductCodes& g, const int8_t* w,
                     const ProductResult& x) {
  check_product("conv_input_grad", s);
  check_codes("conv_input_grad", g, s.out_c);
  const int64_t taps = s.kernel_h * s.kernel_w, ins = s.group_in(), outs = s.group_out();
  Workspaces shared(1);
  Plan plan = make_plan(kernels, g, s.out_c, s.in_c, s.groups, w, s.out_c * ins * taps, shared[0]);
  Weights weights{w, taps, ins * taps, outs * ins * taps, 0, 0, 0, 0};
  if (merges(s)) {
    weights.step_x = 1, weights.step_y = s.kernel_w;
    return run_merged(&plan, threads, s.batch * s.in_h * s.in_w, weights, x);
  }
  for (int64_t y0 = 0; y0 < std::min(s.stride_h, s.in_h); ++y0)
    for (int64_t x0 = 0; x0 < std::min(s.stride_w, s.in_w); ++x0) {
      const AxisPhase v = axis_phase(y0, s.in_h, s.kernel_h, s.stride_h, s.dilation_h, s.pad_top);
      const AxisPhase u = axis_phase(x0, s.in_w, s.kernel_w, s.stride_w, s.dilation_w, s.pad_left);
      const int64_t crop_y = std::max<int64_t>(0, -v.pad), crop_x = std::max<int64_t>(0, -u.pad);
      if (v.taps == 0 || u.taps == 0 || crop_y >= s.out_h || crop_x >= s.out_w) continue;
      ConvShape c = extents(s.out_h - crop_y, s.out_w - crop_x, v.count, u.count, v.taps, u.taps);
      c.dilation_h = v.dilation, c.dilation_w = u.dilation;
      c.pad_top = std::max<int64_t>(0, v.pad), c.pad_left = std::max<int64_t>(0, u.pad);
      weights.step_y = -v.tap_step * s.kernel_w, weights.step_x = -u.tap_step;
      weights.tap_y = (v.first_tap + (v.taps - 1) * v.tap_step) * s.kernel_w;
      weights.tap_x = u.first_tap + (u.taps - 1) * u.tap_step;
      Phase phase;
      phase.y0 = y0, phase.x0 = x0, phase.stride_h = s.stride_h, phase.stride_w = s.stride_w;
      phase.out_h = v.count, phase.out_w = u.count;
      add_phase(&plan, phase, c, crop_y, crop_x, s.out_w, weights);
    }
  pack(&plan, threads);
  execute(threads, plan, {Execution(plan, s.batch, s.out_h, s.out_w, s.in_h, s.in_w, x)}, x);
}

const char* forward_kernel(const Kernels& kernels, const ProductShape& s, DType dtype, int32_t lo, int32_t hi,
                           int32_t w_lo, int32_t w_hi) {
  ConvShape c = extents(s.in_h, s.in_w, s.out_h, s.out_w, s.kernel_h, s.kernel_w);
  c.in_c = s.in_c, c.out_c = s.out_c, c.groups = s.groups;
  c.stride_h = s.stride_h, c.stride_w = s.stride_w;
  c.dilation_h = s.dilation_h, c.dilation_w = s.dilation_w;
  c.pad_top = s.pad_top, c.pad_left = s.pad_left;
  c.mul = 1;
  c.code_lo = w_lo, c.code_hi = w_hi, c.input_lo = std::min(lo, 0), c.input_hi = std::max(hi, 0);
  c.input_dtype = dtype;
  return kernels.conv(c)->name;
}

}  // namespace bitstrata
