// Plans of products: how shifts are distributed, which kernels convolve, and their packed weights.
#include "products_plan.h"

#include <algorithm>
#include <mutex>

#include "checks.h"
#include "parallel.h"

namespace bitstrata {
namespace {

constexpr int64_t kFactorPeriod = 256;  // factors are repeated to at least as many, so that loops are long

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
    part->weight_factors.push_back(static_cast<uint8_t>(1 << plan.shifts.weights[static_cast<size_t>(c)]));
  }
  if (std::all_of(factors.begin(), factors.end(), [](uint8_t f) { return f == 1; })) return;
  part->period = static_cast<int64_t>(factors.size());
  const int64_t repeats = (kFactorPeriod + part->period - 1) / part->period;
  for (int64_t i = 0; i < repeats; ++i) part->factors.insert(part->factors.end(), factors.begin(), factors.end());
}

// (in_c,) of the part, or null: 1.
const uint8_t* weight_factors(const Plan& plan, const Part& part) {
  return plan.shifts.most_weights > 0 ? part.weight_factors.data() : nullptr;
}

// The weights of a part in the kernel's order, or where they are if they lie so already.
const int8_t* gather(const Plan& plan, const Part& part, int threads) {
  const ConvShape& s = part.shape;
  const WeightCodes& w = part.weights;
  const int64_t ins = s.group_in(), outs = s.group_out(), taps = s.kernel_h * s.kernel_w;
  const uint8_t* factors = weight_factors(plan, part);
  constexpr int64_t kTile = 16;  // channels of either side, so that a tile stays in the cache in both orders
  if (part.channels.empty() && factors == nullptr && w.in_step == taps && w.out_step == ins * taps &&
      w.group_step == outs * ins * taps && w.tap_x == 1 && w.tap_y == s.kernel_w && w.first_tap == 0)
    return w.data;
  int8_t* to = reinterpret_cast<int8_t*>(plan.shared.get(kWeightsBuffer, s.out_c * ins * taps));
  const bool all = part.channels.empty();
  parallel_for(threads, s.out_c, std::max<int64_t>(kTile, 65536 / (ins * taps)), [&](int64_t begin, int64_t end) {
    for (int64_t first = begin, last; first < end; first = last) {
      const int64_t group = first / outs;
      last = std::min({first + kTile, (group + 1) * outs, end});
      for (int64_t i = 0; i < ins; i += kTile) {
        const int64_t count = std::min(kTile, ins - i);
        const int64_t* channels = all ? nullptr : part.channels.data() + i;
        for (int64_t tap = 0; tap < taps; ++tap) {
          const int8_t* of_tap =
              w.data + group * w.group_step + w.first_tap + tap / s.kernel_w * w.tap_y + tap % s.kernel_w * w.tap_x;
          for (int64_t o = first; o < last; ++o) {
            const int8_t* from = of_tap + (o - group * outs) * w.out_step;
            int8_t* at = to + (o * ins + i) * taps + tap;
            if (!all)
              for (int64_t j = 0; j < count; ++j) at[j * taps] = from[channels[j] * w.in_step];
            else
              for (int64_t j = 0; j < count; ++j) at[j * taps] = from[(i + j) * w.in_step];
            for (int64_t j = 0; factors != nullptr && j < count; ++j)
              at[j * taps] = static_cast<int8_t>(at[j * taps] * factors[group * ins + i + j]);
          }
        }
      }
    }
  });
  return to;
}

// Packs a part's weights from where they are; false: its kernel cannot, or takes some channels only.
bool pack_in_place(const Part& part, const Plan& plan, int threads, const int32_t* pad, uint8_t* packed) {
  constexpr int64_t kGrain = 65536;  // weights that are worth a thread
  const ConvKernel& kernel = *part.kernel;
  if (!part.channels.empty() || kernel.pack_parts == nullptr) return false;
  const ConvShape& s = part.shape;
  const int64_t parts = kernel.pack_parts(s);
  if (parts == 0) return false;
  const int64_t of_part = s.out_c * s.group_in() * s.kernel_h * s.kernel_w / parts;
  parallel_for(threads, parts, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, of_part)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i)
                   kernel.pack_part(s, part.weights, weight_factors(plan, part), pad, packed, i);
               });
  return true;
}

struct Range {
  int32_t lo, hi;
};

Range range_of_some(const int8_t* w, int64_t count) {
  uint8_t least = 255, most = 0;  // with the sign bit turned round, which every processor compares fast
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t v = static_cast<uint8_t>(static_cast<uint8_t>(w[i]) ^ 0x80);
    least = v < least ? v : least;
    most = most < v ? v : most;
  }
  return {least - 128, most - 128};
}

Range range_of(int threads, const int8_t* w, int64_t count) {
  constexpr int64_t kGrain = 1 << 19;  // weights that are worth a thread
  Range all = range_of_some(w, std::min<int64_t>(count, 1));
  std::mutex mutex;
  parallel_for(threads, count, kGrain, [&](int64_t begin, int64_t end) {
    const Range some = range_of_some(w + begin, end - begin);
    const std::lock_guard<std::mutex> lock(mutex);
    all = {std::min(all.lo, some.lo), std::max(all.hi, some.hi)};
  });
  return all;
}

}  // namespace

void add_phase(Plan* plan, Phase phase, const ConvShape& shape, int64_t crop_y, int64_t crop_x, int64_t map_w,
               const WeightCodes& w) {
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
    s.code_lo = std::min(plan->w_lo, plan->w_lo * (1 << plan->shifts.most_weights));  // not all channels are shifted
    s.code_hi = std::max(plan->w_hi, plan->w_hi * (1 << plan->shifts.most_weights));
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
  int64_t bytes = 0, channels = 0;
  for (Phase& phase : plan->phases)
    for (Part& part : phase.parts) {
      const ConvShape& s = part.shape;
      part.packed_at = bytes;
      bytes += align_up(part.kernel->packed_bytes(s));
      channels = std::max(channels, s.in_c);
    }
  uint8_t* packed = plan->shared.get(kPackedBuffer, bytes);
  const std::vector<int32_t> pad(static_cast<size_t>(channels), 0);
  for (const Phase& phase : plan->phases)
    for (const Part& part : phase.parts) {
      uint8_t* to = packed + part.packed_at;
      if (!pack_in_place(part, *plan, threads, pad.data(), to))
        part.kernel->pack(part.shape, gather(*plan, part, threads), pad.data(), to);
    }
}

Plan make_plan(const Kernels& kernels, int threads, const ProductCodes& x, int64_t in_c, int64_t out_c, int64_t groups,
               const int8_t* w, int64_t weights, Workspace& shared) {
  const Range range = range_of(threads, w, weights);
  return {kernels, x, in_c, out_c, groups, range.lo, range.hi, distribute(x, in_c, range.lo, range.hi), {}, shared};
}

}  // namespace bitstrata
