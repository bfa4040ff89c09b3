// Every kernel of every instruction set available or emulated here, or of those that are named, on buffers that touch
// unmapped pages, against plain formulas:
//   kernel_test [ISA...]
#include <algorithm>
#include <exception>
#include <string>
#include <vector>

#include "bitstrata/dispatch.h"
#include "conv_check.h"
#include "input_gradient_test.h"
#include "low_bit_test.h"
#include "tiles_test.h"
#include "weight_grad_test.h"

namespace bitstrata::test {
namespace {

// The kernel that the row chooses.
void check_conv(const Kernels& row, const ConvShape& shape, const Range& range, int bits, Edge edge, uint64_t seed,
                bool saturate = false) {
  const ConvShape s = with_bounds(shape, range, bits);
  check_kernel(row.isa, *row.conv(s), s, edge, seed, saturate);
}

// The largest inputs and weights throughout: sums in few bits are driven to the bound that was proved for them.
void test_saturation(const Kernels& row, const Range& range, int bits) {
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    Random random(seed);
    const int64_t in = random.in(60, 70), out = random.in(1, 9);
    for (int32_t sign : {1, -1}) {
      ConvShape s = conv_shape(4, 4, in, out, 1, random);
      s.mul *= sign;
      check_conv(row, s, range, bits, Edge::end, seed, true);
    }
  }
}

void test_convs(const Kernels& row) {
  const Range ranges[] = {
      {DType::u8, 0, 255}, {DType::u8, 0, 15}, {DType::u8, 0, 1}, {DType::s8, -8, 7}, {DType::s8, -128, 127}};
  const int64_t extents[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 15, 16, 17, 31, 32, 33};
  uint64_t seed = 0;
  for (const Range& range : ranges)
    for (int bits : {1, 2, 3, 4, 5, 6, 7, 8}) {
      test_saturation(row, range, bits);
      for (int64_t n : extents) {
        Random random(++seed);
        const Edge edge = seed % 2 == 0 ? Edge::end : Edge::begin;
        const int64_t m = random.in(1, 9);
        check_conv(row, conv_shape(n, m, 3, 5, 1, random), range, bits, edge, seed);
        check_conv(row, conv_shape(m, n, 4, 8, 1, random), range, bits, edge, seed);
        check_conv(row, conv_shape(4, m, n, 7, 1, random), range, bits, edge, seed);
        check_conv(row, conv_shape(4, m, 6, n, 1, random), range, bits, edge, seed);
        check_conv(row, conv_shape(3, m, 1, 1, n, random), range, bits, edge, seed);
        check_conv(row, conv_shape(3, m, 2, n, 3, random), range, bits, edge, seed);
        check_conv(row, conv_shape(3, m, 1, n, 2, random), range, bits, edge, seed);
        check_conv(row, conv_shape(3, m, 2, n, 2, random), range, bits, edge, seed);
      }
    }
}

// What needs more channels, wider maps or larger kernels than the rest: blocks of many vectors, several tiles, windows
// read from the image itself, depthwise kernels of more than one step and those that one kernel leaves to another.
void test_large_convs(const Kernels& row) {
  struct Large {
    int64_t h, w, in, out, groups, kernel_h, kernel_w, stride, dilation, pad;
  };
  const Large shapes[] = {
      {4, 70, 3, 16, 1, 3, 3, 1, 1, 1},   {5, 31, 20, 7, 2, 2, 3, 1, 1, 1},   {3, 29, 66, 81, 1, 3, 3, 1, 1, 1},
      {3, 70, 3, 17, 1, 3, 3, 1, 1, 1},   {9, 41, 4, 49, 1, 3, 3, 1, 1, 1},   {2, 5, 5, 65, 1, 2, 2, 1, 1, 0},
      {2, 7, 8, 144, 1, 3, 1, 2, 1, 1},   {3, 5, 16, 80, 1, 1, 1, 1, 1, 0},   {5, 6, 12, 33, 1, 1, 1, 2, 1, 0},
      {7, 1, 20, 9, 1, 1, 1, 1, 1, 0},    {5, 5, 1, 1, 64, 3, 3, 1, 1, 1},    {4, 9, 1, 1, 65, 3, 3, 1, 1, 1},
      {4, 50, 1, 1, 97, 3, 3, 1, 1, 1},   {9, 11, 1, 1, 80, 5, 5, 1, 1, 2},   {9, 90, 1, 1, 17, 7, 7, 2, 1, 3},
      {12, 12, 1, 1, 129, 8, 2, 1, 1, 1}, {9, 9, 1, 1, 20, 9, 9, 1, 1, 4},    {3, 50, 1, 1, 16, 1, 3, 1, 20, 20},
      {6, 9, 1, 1, 66, 2, 3, 1, 1, 1},    {6, 9, 1, 1, 113, 4, 3, 1, 2, 1},   {3, 9, 1, 1, 70, 1, 3, 1, 1, 1},
      {40, 3, 1, 1, 34, 3, 3, 3, 3, 3},   {3, 44, 1, 1, 30, 1, 4, 1, 13, 13}, {7, 7, 1, 1, 150, 6, 3, 1, 1, 2}};
  const Range ranges[] = {{DType::u8, 0, 255}, {DType::u8, 0, 15}, {DType::s8, -128, 127}, {DType::s8, 0, 127}};
  uint64_t seed = 1000;
  for (const Large& l : shapes)
    for (const Range& range : ranges)
      for (int bits : {4, 8})
        for (int form = 0; form < 2; ++form) {
          ConvShape s{};
          s.groups = l.groups, s.in_h = l.h, s.in_w = l.w, s.in_c = l.in * l.groups, s.out_c = l.out * l.groups;
          s.kernel_h = l.kernel_h, s.kernel_w = l.kernel_w, s.stride_h = s.stride_w = l.stride;
          s.dilation_h = s.dilation_w = l.dilation, s.pad_top = s.pad_left = l.pad;
          s.out_h = (l.h + 2 * l.pad - (l.kernel_h - 1) * l.dilation - 1) / l.stride + 1;
          s.out_w = (l.w + 2 * l.pad - (l.kernel_w - 1) * l.dilation - 1) / l.stride + 1;
          s.mul = 1 + form, s.add = form;
          ++seed;
          check_conv(row, s, range, bits, seed % 2 == 0 ? Edge::end : Edge::begin, seed);
        }
}

int64_t read(DType t, const void* p, int64_t i) {
  if (t == DType::u8) return static_cast<const uint8_t*>(p)[i];
  if (t == DType::s8) return static_cast<const int8_t*>(p)[i];
  return static_cast<const int32_t*>(p)[i];
}

void write(DType t, void* p, int64_t i, int64_t v) {
  if (t == DType::i32)
    static_cast<int32_t*>(p)[i] = static_cast<int32_t>(v);
  else
    static_cast<uint8_t*>(p)[i] = static_cast<uint8_t>(v);
}

constexpr DType kAll[] = {DType::u8, DType::s8, DType::i32};

void fill(DType t, void* p, int64_t count, Random& random) {
  for (int64_t i = 0; i < count; ++i) write(t, p, i, random.in(lowest(t), highest(t)));
}

void test_requant(const Kernels& row, DType in, DType to, int64_t channels, Edge edge, uint64_t seed) {
  Random random(seed);
  const int64_t pixels = random.in(1, 5), count = pixels * channels;
  const Guarded x(count * size_of(in), edge, size_of(in)), out(count * size_of(to), edge, size_of(to));
  const Guarded m(channels * 8, edge, 8), b(channels * 8, edge, 8), shift(channels * 8, edge, 8);
  fill(in, x.get(), count, random);
  for (int64_t c = 0; c < channels; ++c) {
    m.get<int64_t>()[c] = random.in(INT32_MIN, INT32_MAX);
    b.get<int64_t>()[c] = random.in(-(int64_t{1} << 61), int64_t{1} << 61);
    shift.get<int64_t>()[c] = random.in(0, 62);
  }
  const int64_t p = random.in(lowest(to), highest(to)), q = random.in(lowest(to), highest(to));
  const RequantArgs args{m.get<int64_t>(),
                         b.get<int64_t>(),
                         shift.get<int64_t>(),
                         channels,
                         static_cast<int32_t>(std::min(p, q)),
                         static_cast<int32_t>(std::max(p, q))};
  row.requant[static_cast<int>(in)][static_cast<int>(to)](args, x.get(), out.get(), pixels);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t c = i % channels;
    const int64_t y = (read(in, x.get(), i) * args.multiplier[c] + args.bias[c]) >> args.shift[c];
    expect_equal(row.isa, "requant", name_of(to), i, read(to, out.get(), i),
                 std::min<int64_t>(std::max<int64_t>(y, args.lo), args.hi));
  }
}

int64_t align(int64_t v, int shift) {
  return shift <= 0 ? v * (int64_t{1} << -shift) : (v + (int64_t{1} << (shift - 1))) >> shift;
}

void test_add_and_clip(const Kernels& row, int64_t count, Edge edge, uint64_t seed) {
  Random random(seed);
  const Guarded a(count * 4, edge, 4), b(count * 4, edge, 4), sum(count * 4, edge, 4);
  fill(DType::i32, a.get(), count, random);
  fill(DType::i32, b.get(), count, random);
  for (int shift_a : {-31, -1, 0, 1, 2, 30, 31, 32, 33, 62}) {
    const int shift_b = static_cast<int>(random.in(-31, 62));
    row.add(a.get<int32_t>(), b.get<int32_t>(), sum.get<int32_t>(), count, shift_a, shift_b);
    for (int64_t i = 0; i < count; ++i)
      expect_equal(row.isa, "add", "wrapped", i, sum.get<int32_t>()[i],
                   static_cast<int32_t>(align(a.get<int32_t>()[i], shift_a) + align(b.get<int32_t>()[i], shift_b)));
  }
  for (DType t : kAll) {
    const Guarded x(count * size_of(t), edge, size_of(t)), out(count * size_of(t), edge, size_of(t));
    fill(t, x.get(), count, random);
    const int64_t lo = random.in(lowest(t), highest(t)), hi = random.in(lo, highest(t));
    row.clip[static_cast<int>(t)](x.get(), out.get(), count, static_cast<int32_t>(lo), static_cast<int32_t>(hi));
    for (int64_t i = 0; i < count; ++i)
      expect_equal(row.isa, "clip", name_of(t), i, read(t, out.get(), i),
                   std::min(std::max(read(t, x.get(), i), lo), hi));
  }
}

void test_pools(const Kernels& row, DType t, int64_t channels, Edge edge, uint64_t seed) {
  Random random(seed);
  PoolShape s{};
  s.in_h = random.in(1, 9), s.in_w = random.in(1, 9), s.channels = channels;
  s.kernel_h = random.in(1, std::min<int64_t>(s.in_h, 3)), s.kernel_w = random.in(1, std::min<int64_t>(s.in_w, 3));
  s.pad_top = s.kernel_h / 2, s.pad_left = s.kernel_w / 2;
  s.stride_h = random.in(1, 2), s.stride_w = random.in(1, 2);
  s.out_h = (s.in_h - 1) / s.stride_h + 1, s.out_w = (s.in_w - 1) / s.stride_w + 1;  // windows start in the map
  s.shift = static_cast<int32_t>(random.in(0, 40));
  const int64_t in_count = s.in_h * s.in_w * channels, count = s.out_h * s.out_w * channels;
  const Guarded x(in_count * size_of(t), edge, size_of(t)), most(count * size_of(t), edge, size_of(t));
  const Guarded sum(count * 4, edge, 4), codes(count * size_of(t), edge, size_of(t));
  fill(t, x.get(), in_count, random);
  const int64_t cut = random.in(0, s.out_h);
  PoolShape plain = s;
  plain.shift = 0;
  for (const auto& [begin, end] : {std::pair(cut, s.out_h), std::pair(int64_t{0}, cut)}) {
    row.max_pool[static_cast<int>(t)](s, x.get(), most.get(), begin, end);
    row.sum_pool[static_cast<int>(t)](s, x.get(), sum.get(), begin, end);
    if (t != DType::i32) row.sum_codes[static_cast<int>(t)](plain, x.get(), codes.get(), begin, end);
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t c = i % channels, px = i / channels % s.out_w, py = i / channels / s.out_w;
    int64_t largest = INT64_MIN, total = 0;
    for (int64_t y = py * s.stride_h - s.pad_top; y < py * s.stride_h - s.pad_top + s.kernel_h; ++y)
      for (int64_t u = px * s.stride_w - s.pad_left; u < px * s.stride_w - s.pad_left + s.kernel_w; ++u) {
        if (y < 0 || u < 0 || y >= s.in_h || u >= s.in_w) continue;
        const int64_t v = read(t, x.get(), (y * s.in_w + u) * channels + c);
        largest = std::max(largest, v);
        total += v;
      }
    expect_equal(row.isa, "max_pool", name_of(t), i, read(t, most.get(), i), largest);
    expect_equal(row.isa, "sum_pool", name_of(t), i, sum.get<int32_t>()[i],
                 static_cast<int32_t>(align(total, s.shift)));
    if (t == DType::i32) continue;
    const int64_t wrapped = t == DType::u8 ? int64_t{static_cast<uint8_t>(total)} : int64_t{static_cast<int8_t>(total)};
    expect_equal(row.isa, "sum_codes", name_of(t), i, read(t, codes.get(), i), wrapped);
  }
}

// What the profiler measures with: loops end, stay within their buffers and copy what they say they copy.
void test_limits(const Kernels& row) {
  const Limits& limits = limits_of(row);
  limits.products.run(3);
  expect_equal(row.isa, "products", limits.products.name, 0, limits.products.products > 0, 1);
  for (int64_t bytes : {0, 64, 128, 448, 4096}) {
    const Guarded from(bytes, Edge::end, 64), to(bytes, Edge::end, 64);
    for (int64_t i = 0; i < bytes; ++i) from.get<uint8_t>()[i] = static_cast<uint8_t>(7 * i);
    limits.read(from.get(), bytes);
    limits.copy(from.get(), to.get(), bytes);
    for (int64_t i = 0; i < bytes; ++i)
      expect_equal(row.isa, "copy", "inverted", i, to.get<uint8_t>()[i], static_cast<uint8_t>(~(7 * i)));
  }
}

std::vector<std::string> all_isas() {
  std::vector<std::string> isas = available_isas();
  for (const std::string& isa : emulated_isas()) isas.push_back(isa);
  return isas;
}

int run_all(const std::vector<std::string>& isas) {
  test_emulated_tiles();
  test_low_bit_kernels();
  for (const std::string& isa : isas) {
    const Kernels& row = select_kernels(isa);
    if (isa != row.isa) {
      std::fprintf(stderr, "%s was asked for, %s was given\n", isa.c_str(), row.isa);
      return 1;
    }
    test_limits(row);
    test_convs(row);
    test_large_convs(row);
    test_weight_grads(row);
    test_input_gradients(row);
    uint64_t seed = 0;
    for (int64_t n : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 15, 16, 17, 31, 32, 33, 63, 64, 65})
      for (Edge edge : {Edge::end, Edge::begin}) {
        test_add_and_clip(row, n, edge, ++seed);
        for (DType t : kAll) {
          test_pools(row, t, n, edge, ++seed);
          for (DType to : kAll) test_requant(row, t, to, n, edge, ++seed);
        }
      }
    std::printf("%s: %s\n", isa.c_str(), failures == 0 ? "ok" : "FAILED");
  }
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace bitstrata::test

int main(int argc, char** argv) {
  using namespace bitstrata::test;
  try {
    return run_all(argc > 1 ? std::vector<std::string>(argv + 1, argv + argc) : all_isas());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
