#include "bitstrata/quantize.h"

#include <atomic>
#include <cmath>
#include <limits>
#include <mutex>

#include "quantize_rows.h"

namespace bitstrata {
ShiftGrid shift_grid(const std::vector<float>& ranges, const ShiftFormat& f) {
  const float largest = static_cast<float>(f.largest());
  float top = 0;
  for (float r : ranges) top = larger(top, r * f.clip);
  ShiftGrid grid;
  grid.exponents.assign(ranges.size(), 0);
  if (!std::isfinite(top)) {
    grid.scale = std::numeric_limits<float>::quiet_NaN();
    return grid;
  }
  grid.scale = top / largest;
  if (grid.scale < kSmallestScale) grid.scale = 0;
  std::vector<float> fits;  // ranges up to fits[e] can have the exponent e + 1
  for (int e = 1; e < f.groups; ++e) fits.push_back(std::ldexp(top, -e));
  for (size_t c = 0; c < ranges.size(); ++c)
    for (const float limit : fits) {
      if (ranges[c] * f.clip > limit) break;
      ++grid.exponents[c];
    }
  return grid;
}

std::vector<float> channel_ranges(const Rows& r, const RealTensor& x) {
  const Training& k = *r.kernels.training;
  const int64_t period = period_of(r.channels);
  std::vector<float> wide(static_cast<size_t>(period), 0.0f);
  std::mutex mutex;
  for_blocks(r, [&](int64_t at, int64_t count) {
    std::vector<float> part(static_cast<size_t>(period), 0.0f);
    if (x.bf16 != nullptr)
      k.range_bf16(x.bf16 + at, count, period, part.data());
    else
      k.range_f32(x.f32 + at, count, period, part.data());
    std::lock_guard<std::mutex> lock(mutex);
    for (size_t i = 0; i < wide.size(); ++i) wide[i] = larger(part[i], wide[i]);
  });
  return folded_range(wide, r.channels);
}

std::vector<int64_t> code_sums(const Rows& r, const int8_t* codes) {
  const Training& k = *r.kernels.training;
  const int64_t period = period_of(r.channels);
  std::vector<int64_t> wide(static_cast<size_t>(period), 0);
  std::mutex mutex;
  for_blocks(r, [&](int64_t at, int64_t count) {
    std::vector<int64_t> part(static_cast<size_t>(period), 0);
    k.sum_codes(codes + at, count, period, part.data());
    std::lock_guard<std::mutex> lock(mutex);
    for (size_t i = 0; i < wide.size(); ++i) wide[i] += part[i];
  });
  return folded_sum(wide, r.channels);
}

ShiftGrid shift_codes(const Rows& r, const RealTensor& x, const ShiftFormat& f, const Noise* noise, uint8_t* out,
                      const float* ranges) {
  const Training& k = *r.kernels.training;
  const ShiftGrid grid =
      shift_grid(ranges != nullptr ? std::vector<float>(ranges, ranges + r.channels) : channel_ranges(r, x), f);
  if (std::isnan(grid.scale)) return grid;
  const int64_t period = period_of(r.channels);
  const CodeTables tables(grid, f, period);
  for_blocks(r, [&](int64_t at, int64_t count) {
    const Noise from = moved(noise, at);
    const CodeArgs args = tables.args(noise ? &from : nullptr);
    if (x.bf16 != nullptr)
      k.codes_bf16(x.bf16 + at, count, period, args, out + at);
    else
      k.codes_f32(x.f32 + at, count, period, args, out + at);
  });
  return grid;
}

namespace {

float scale_of(float range, float largest) {
  const float scale = range / largest;
  return scale < kSmallestScale ? 0.0f : scale;
}

float inverse_of(float scale) { return scale > 0 ? 1.0f / scale : 0.0f; }

// So many weights with one scale.
bool row_codes(const Training& k, const float* weight, int64_t inner, float largest, uint8_t* codes, float* scale) {
  constexpr int64_t kPeriod = 64;
  float ranges[kPeriod] = {}, factor[kPeriod];
  const int32_t shift[kPeriod] = {};
  k.range_f32(weight, inner, kPeriod, ranges);
  float top = 0;
  for (float r : ranges) top = larger(top, r);
  if (!std::isfinite(top)) return false;
  *scale = scale_of(top, largest);
  std::fill_n(factor, kPeriod, inverse_of(*scale));
  k.codes_f32(weight, inner, kPeriod, {factor, shift, -largest, largest, nullptr}, codes);
  return true;
}

// The output channels of one group, as rows of in * taps, with a scale for each input channel.
bool column_codes(const Rows& r, const float* weight, int64_t taps, float largest, uint8_t* codes, float* scale) {
  RealTensor real;
  real.f32 = weight;
  const std::vector<float> ranges = channel_ranges(r, real);
  std::vector<float> factors(ranges.size());
  for (int64_t i = 0; i < r.channels / taps; ++i) {
    float top = 0;
    for (int64_t t = 0; t < taps; ++t) top = larger(top, ranges[static_cast<size_t>(i * taps + t)]);
    if (!std::isfinite(top)) return false;
    scale[i] = scale_of(top, largest);
    std::fill_n(factors.begin() + i * taps, taps, inverse_of(scale[i]));
  }
  const int64_t period = period_of(r.channels);
  const std::vector<float> factor = repeated(factors, period);
  const std::vector<int32_t> shift(static_cast<size_t>(period), 0);
  for_blocks(r, [&](int64_t at, int64_t count) {
    r.kernels.training->codes_f32(weight + at, count, period, {factor.data(), shift.data(), -largest, largest, nullptr},
                                  codes + at);
  });
  return true;
}

}  // namespace

bool weight_codes(const Kernels& kernels, int threads, const float* weight, const WeightShape& s, int bits,
                  bool by_output, WeightScales scales, int8_t* codes, float* scale) {
  const float largest = static_cast<float>((1 << (bits - 1)) - 1);
  uint8_t* to = reinterpret_cast<uint8_t*>(codes);
  const int64_t inner = s.in * s.taps;
  if (scales == WeightScales::kTensor) {
    if (!row_codes(*kernels.training, weight, s.elements(), largest, to, scale)) return false;
    std::fill_n(scale, by_output ? s.out : s.in * s.groups, *scale);
    return true;
  }
  std::atomic<bool> finite{true};
  if (by_output) {
    const int64_t grain = std::max<int64_t>((1 << 15) / inner, 1);
    parallel_for(threads, s.out, grain, [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o)
        if (!row_codes(*kernels.training, weight + o * inner, inner, largest, to + o * inner, scale + o))
          finite = false;
    });
    return finite;
  }
  const int64_t rows = s.out / s.groups;
  for (int64_t group = 0; group < s.groups; ++group) {
    const Rows r{kernels, threads, rows, inner};
    const int64_t at = group * rows * inner;
    if (!column_codes(r, weight + at, s.taps, largest, to + at, scale + group * s.in)) finite = false;
  }
  return finite;
}

namespace {

constexpr int64_t kPackGrain = 1 << 16;  // codes, of which eight begin at a whole byte

}  // namespace

void pack_codes(const Kernels& kernels, int threads, const uint8_t* codes, int64_t count, int width, uint8_t* out) {
  parallel_for(threads, (count + kPackGrain - 1) / kPackGrain, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kPackGrain, last = std::min(count, end * kPackGrain);
    kernels.training->pack(codes + first, last - first, width, out + first / 8 * width);
  });
}

void unpack_codes(const Kernels& kernels, int threads, const uint8_t* packed, int64_t count, int width, bool is_signed,
                  uint8_t* out) {
  parallel_for(threads, (count + kPackGrain - 1) / kPackGrain, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kPackGrain, last = std::min(count, end * kPackGrain);
    kernels.training->unpack(packed + first / 8 * width, last - first, width, is_signed, out + first);
  });
}

void pack_codes(const Rows& r, const uint8_t* codes, const ShiftGrid& grid, const ShiftFormat& f, uint8_t* out) {
  if (!f.absorb || f.groups == 1) return pack_codes(r.kernels, r.threads, codes, r.elements(), f.bits, out);
  std::vector<uint16_t> factors;
  for (uint8_t exponent : grid.exponents) factors.push_back(static_cast<uint16_t>(1 << exponent));
  const int64_t period = period_of(r.channels);
  factors = repeated(factors, period);
  const Training& k = *r.kernels.training;
  for_blocks(r, [&](int64_t begin, int64_t all) {
    const int64_t block = std::min(all, block_rows(r.channels) * r.channels);
    std::vector<uint8_t> bare(static_cast<size_t>(block));
    for (int64_t at = begin; at < begin + all; at += block) {
      const int64_t count = std::min(block, begin + all - at);
      k.unshift(codes + at, count, period, factors.data(), f.groups - 1, bare.data());
      k.pack(bare.data(), count, f.bits, out + at / 8 * f.bits);
    }
  });
}

}  // namespace bitstrata
