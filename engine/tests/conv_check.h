// A convolution kernel on buffers that touch unmapped pages, against the plain formula.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "bitstrata/kernels.h"
#include "guarded.h"

namespace bitstrata::test {

struct Range {
  DType dtype;
  int32_t lo, hi;
};

// With codes of so many bits and inputs in the range.
inline ConvShape with_bounds(ConvShape s, const Range& range, int bits) {
  s.input_dtype = range.dtype, s.input_lo = range.lo, s.input_hi = range.hi;
  s.code_lo = -(1 << (bits - 1)), s.code_hi = (1 << (bits - 1)) - 1;
  return s;
}

inline std::string describe(const ConvShape& s) {
  const int64_t numbers[] = {s.in_h,     s.in_w,       s.in_c,       s.out_c,    s.kernel_h, s.kernel_w, s.stride_h,
                             s.stride_w, s.dilation_h, s.dilation_w, s.pad_top,  s.pad_left, s.groups,   s.mul,
                             s.add,      s.code_lo,    s.code_hi,    s.input_lo, s.input_hi};
  std::string text = "conv";
  for (int64_t n : numbers) text += " " + std::to_string(n);
  return text;
}

// An odd factor of each channel, or 1, and its inverse modulo 2^8.
inline uint8_t factor_of(int64_t channel, bool factors) { return static_cast<uint8_t>(factors ? 2 * channel + 3 : 1); }
inline uint8_t inverse(uint8_t factor) {
  uint8_t x = factor;  // right in three bits, and in twice as many after each step
  for (int i = 0; i < 3; ++i) x = static_cast<uint8_t>(x * (2 - factor * x));
  return x;
}

// Packs weights in parts, the last first, from an order in which the input channels are outermost and the taps, `step`
// apart, run backwards, with factors that their values take back; false: this kernel only packs as a whole.
inline bool pack_in_parts(const ConvKernel& kernel, const ConvShape& s, const int8_t* codes, const int32_t* pad,
                          Edge edge, int64_t step, bool factors, void* packed) {
  const int64_t parts = kernel.pack_parts == nullptr ? 0 : kernel.pack_parts(s);
  const int64_t taps = s.kernel_h * s.kernel_w, record = (taps - 1) * step + 1;
  const int64_t ins = s.group_in(), outs = s.group_out();
  const Guarded there(s.out_c * ins * record, edge);
  for (int64_t o = 0; o < s.out_c; ++o)
    for (int64_t i = 0; i < ins; ++i)
      for (int64_t tap = 0; tap < taps; ++tap)
        there.get<int8_t>()[((o / outs * ins + i) * outs + o % outs) * record + (taps - 1 - tap) * step] =
            static_cast<int8_t>(codes[(o * ins + i) * taps + tap] * inverse(factor_of(o / outs * ins + i, factors)));
  std::vector<uint8_t> factor;
  for (int64_t c = 0; factors && c < s.in_c; ++c) factor.push_back(factor_of(c, factors));
  const WeightCodes w{there.get<int8_t>(), outs * ins * record, record, outs * record,
                      record - 1,          -s.kernel_w * step,  -step,  record};
  for (int64_t part = parts - 1; part >= 0; --part)
    kernel.pack_part(s, w, factors ? factor.data() : nullptr, pad, packed, part);
  return parts > 0;
}

// `kernel` on random inputs within s's bounds, and pad codes too; saturate: on the largest.
inline void check_kernel(const char* isa, const ConvKernel& kernel, const ConvShape& s, Edge edge, uint64_t seed,
                         bool saturate) {
  Random random(seed, saturate);
  const int64_t in_group = s.group_in(), in_count = s.in_h * s.in_w * s.in_c;
  const int64_t weights = s.out_c * in_group * s.kernel_h * s.kernel_w, out_count = s.out_h * s.out_w * s.out_c;
  const Guarded image(in_count, edge), codes(weights, edge), pad(s.in_c * 4, edge, 4), out(out_count * 4, edge, 4);
  for (int64_t i = 0; i < in_count; ++i)
    image.get<uint8_t>()[i] = static_cast<uint8_t>(random.in(s.input_lo, s.input_hi));
  for (int64_t i = 0; i < weights; ++i) codes.get<int8_t>()[i] = static_cast<int8_t>(random.in(s.code_lo, s.code_hi));
  for (int64_t i = 0; i < s.in_c; ++i) pad.get<int32_t>()[i] = static_cast<int32_t>(random.in(s.input_lo, s.input_hi));

  const Guarded packed(kernel.packed_bytes(s), edge, 64), staged(kernel.staged_row_bytes(s) * s.padded_h(), edge, 4);
  kernel.pack(s, codes.get<int8_t>(), pad.get<int32_t>(), packed.get());
  const int64_t stage_cut = random.in(0, s.padded_h()), cut = random.in(0, s.out_h);  // rows in two parts, second first
  kernel.stage(s, packed.get(), image.get(), staged.get(), stage_cut, s.padded_h());
  kernel.stage(s, packed.get(), image.get(), staged.get(), 0, stage_cut);
  const void* rows = kernel.staged_row_bytes(s) == 0 ? image.get() : staged.get();
  kernel.run(s, packed.get(), rows, out.get<int32_t>(), cut, s.out_h);
  kernel.run(s, packed.get(), rows, out.get<int32_t>(), 0, cut);

  const std::string where = describe(s);
  const Guarded packed_in_parts(kernel.packed_bytes(s), edge, 64), again(out_count * 4, edge, 4);
  if (pack_in_parts(kernel, s, codes.get<int8_t>(), pad.get<int32_t>(), edge, 1 + static_cast<int64_t>(seed % 2),
                    seed / 2 % 2 == 1, packed_in_parts.get())) {
    kernel.stage(s, packed_in_parts.get(), image.get(), staged.get(), 0, s.padded_h());
    kernel.run(s, packed_in_parts.get(), rows, again.get<int32_t>(), 0, s.out_h);
    for (int64_t i = 0; i < out_count; ++i)
      expect_equal(isa, "packing in parts", where.c_str(), i, again.get<int32_t>()[i], out.get<int32_t>()[i]);
  }

  const auto input = [&](int64_t y, int64_t x, int64_t c) -> int64_t {
    if (y < 0 || x < 0 || y >= s.in_h || x >= s.in_w) return pad.get<int32_t>()[c];
    const int64_t at = (y * s.in_w + x) * s.in_c + c;
    return s.input_dtype == DType::u8 ? image.get<uint8_t>()[at] : image.get<int8_t>()[at];
  };
  for (int64_t i = 0; i < out_count; ++i) {
    const int64_t o = i % s.out_c, x = i / s.out_c % s.out_w, y = i / s.out_c / s.out_w;
    int64_t sum = 0;
    for (int64_t c = 0; c < in_group; ++c)
      for (int64_t ky = 0; ky < s.kernel_h; ++ky)
        for (int64_t kx = 0; kx < s.kernel_w; ++kx)
          sum += (s.mul * codes.get<int8_t>()[((o * in_group + c) * s.kernel_h + ky) * s.kernel_w + kx] + s.add) *
                 input(y * s.stride_h + ky * s.dilation_h - s.pad_top, x * s.stride_w + kx * s.dilation_w - s.pad_left,
                       o / s.group_out() * in_group + c);
    expect_equal(isa, kernel.name, where.c_str(), i, out.get<int32_t>()[i], static_cast<int32_t>(sum));
  }
}

// A shape with the output's extent that its paddings (the bottom and right one equal to the top and left) give.
inline ConvShape conv_shape(int64_t h, int64_t w, int64_t in, int64_t out, int64_t groups, Random& random) {
  ConvShape s{};
  s.groups = groups;
  s.in_h = h, s.in_w = w, s.in_c = in * groups, s.out_c = out * groups;
  s.stride_h = random.in(1, 3), s.stride_w = random.in(1, 3);
  s.dilation_h = random.in(1, 2), s.dilation_w = random.in(1, 2);
  s.pad_top = random.in(0, 2), s.pad_left = random.in(0, 2);
  s.kernel_h = std::min(random.in(1, 3), (h + 2 * s.pad_top - 1) / s.dilation_h + 1);
  s.kernel_w = std::min(random.in(1, 3), (w + 2 * s.pad_left - 1) / s.dilation_w + 1);
  s.out_h = (h + 2 * s.pad_top - (s.kernel_h - 1) * s.dilation_h - 1) / s.stride_h + 1;
  s.out_w = (w + 2 * s.pad_left - (s.kernel_w - 1) * s.dilation_w - 1) / s.stride_w + 1;
  const bool nested = random.in(0, 1) == 1;
  s.mul = nested ? 2 : 1, s.add = nested ? 1 : 0;
  return s;
}

}  // namespace bitstrata::test
