// Kernels for low bits on everything they are exact for, chosen there or not, and what is chosen where.
#include "low_bit_test.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "../kernels/common/winograd.h"
#include "bitstrata/dispatch.h"
#include "conv_check.h"
#ifdef BITSTRATA_HAVE_AVX2
#include "../kernels/avx2/avx2.h"
#endif
#ifdef BITSTRATA_HAVE_AVX512VPOPCNT
#include "../kernels/avx512vpopcnt/avx512vpopcnt.h"
#endif

namespace bitstrata::test {
#ifndef BITSTRATA_HAVE_AVX2  // these kernels are for x86
void test_low_bit_kernels() {}
#else
namespace {

constexpr Range kRanges[] = {{DType::u8, 0, 1},    {DType::u8, 0, 3},      {DType::u8, 0, 15}, {DType::u8, 0, 255},
                             {DType::u8, 5, 5},    {DType::u8, 9, 11},     {DType::u8, 0, 4},  {DType::s8, -1, 0},
                             {DType::s8, -1, 1},   {DType::s8, -128, 127}, {DType::s8, -8, 7}, {DType::s8, -128, -127},
                             {DType::u8, 254, 255}};

ConvShape shape_of(int64_t size, int64_t in, int64_t out, int64_t kernel, int64_t groups) {
  ConvShape s{};
  s.in_h = s.in_w = s.out_h = s.out_w = size;
  s.in_c = in, s.out_c = out, s.groups = groups;
  s.kernel_h = s.kernel_w = kernel, s.pad_top = s.pad_left = kernel / 2;
  s.stride_h = s.stride_w = s.dilation_h = s.dilation_w = 1;
  s.mul = 2, s.add = 1;
  return s;
}

// A kernel for any bounds that `fits` allows; `row`: the first that may choose it.
void test_kernel(const char* row, const ConvKernel& kernel, bool (*fits)(const ConvShape&)) {
  uint64_t seed = 5000;
  const auto check = [&](const ConvShape& s, bool saturate) {
    ++seed;
    if (fits(s)) check_kernel(row, kernel, s, seed % 2 == 0 ? Edge::end : Edge::begin, seed, saturate);
  };
  for (const Range& range : kRanges)
    for (int bits : {1, 2, 3, 4, 8})
      for (int64_t n : {1, 2, 3, 5, 8, 11, 15, 16, 17, 31, 32, 33, 63, 64, 65, 70, 96, 127, 130}) {
        Random random(++seed);
        const int64_t m = random.in(1, 9), few = random.in(1, 5);
        const ConvShape shapes[] = {
            conv_shape(4, m, n, 7, 1, random),     conv_shape(m, 4, 9, n, 1, random),
            conv_shape(3, m, n, few, few, random), conv_shape(3, m, few, n % 40 + 1, 3, random),
            conv_shape(2, n, 3, 17, 1, random),    shape_of(3, n, 18, 3, 1),
            shape_of(4, 16 * few, n, 1, 1),
        };
        for (const ConvShape& s : shapes) check(with_bounds(s, range, bits), seed % 5 == 0);
      }
  for (const Range& range : kRanges)  // codes that are all the same, or of uneven bounds
    for (int32_t lo : {-128, -3, 0, 2})
      for (int32_t span : {0, 1, 2, 3, 5}) {
        ConvShape s = with_bounds(shape_of(5, 21, 19, 3, 1), range, 1);
        s.code_lo = lo, s.code_hi = lo + span, s.mul = lo == 2 ? -3 : 2;
        check(s, false);
      }
  for (const Range& range : {Range{DType::u8, 0, 1}, Range{DType::u8, 0, 3}, Range{DType::s8, -2, 1}})
    for (int64_t in : {8, 16, 24, 40, 48, 72, 104})  // whole bytes of bits, but no whole words
      for (int64_t kernel : {2, 3, 5})
        for (int64_t stride : {1, 2, 3}) {
          ConvShape s = shape_of(11, in, 20, kernel, 1);
          s.stride_h = s.stride_w = stride;
          s.out_h = s.out_w = (11 + kernel / 2 * 2 - kernel) / stride + 1;
          check(with_bounds(s, range, 2), false);
        }
  for (int64_t in : {500, 1500}) check(with_bounds(shape_of(2, in, 33, 3, 1), {DType::u8, 0, 1}, 1), true);
}

void expect_chosen(const char* isa, const ConvShape& s, const char* name, bool chosen) {
  const char* kernel = select_kernels(isa).conv(s)->name;
  if ((std::strcmp(kernel, name) == 0) == chosen) return;
  ++failures;
  std::fprintf(stderr, "%s: %s for %s\n", isa, kernel, describe(s).c_str());
}

void test_tables(const char* isa) {
  const char *name = kAvx2Table.name, *pairs = kAvx2Pairs.name;
  const Range one{DType::u8, 0, 1}, two{DType::u8, 0, 3};
  const ConvShape layers[] = {shape_of(56, 64, 64, 3, 1), shape_of(28, 128, 128, 3, 1), shape_of(14, 256, 256, 3, 1),
                              shape_of(7, 512, 512, 3, 1), shape_of(16, 32, 32, 3, 1)};
  for (const ConvShape& s : layers) {
    expect_chosen(isa, with_bounds(s, one, 1), pairs, true);
    expect_chosen(isa, with_bounds(s, two, 1), name, true);
    expect_chosen(isa, with_bounds(s, {DType::u8, 0, 15}, 4), name, false);
    expect_chosen(isa, with_bounds(s, {DType::u8, 0, 255}, 1), name, false);
  }
  // Two bits of both take as many steps as VNNI does with half of the products.
  expect_chosen(isa, with_bounds(shape_of(28, 128, 128, 3, 1), two, 2), name, std::strcmp(isa, "avx2") == 0);
  expect_chosen(isa, with_bounds(shape_of(1, 512, 512, 1, 1), one, 1), name, true);  // there are no pairs
  for (const char* kernel : {name, pairs}) {
    expect_chosen(isa, with_bounds(shape_of(32, 3, 16, 3, 1), one, 1), kernel, false);
    expect_chosen(isa, with_bounds(shape_of(16, 1, 1, 3, 32), one, 1), kernel, false);  // groups of one channel
  }
}

// The most inputs whose sums of products 16 bits hold, and one more.
void test_the_bound_of_tables(const char* isa) {
  struct Bound {
    Range range;
    int bits;
    int64_t taps;
  };
  for (const Bound& b : {Bound{{DType::u8, 0, 1}, 1, 65535}, Bound{{DType::s8, -1, 2}, 2, 7281}}) {
    const ConvShape within = with_bounds(shape_of(1, b.taps, 64, 1, 1), b.range, b.bits);
    const ConvShape beyond = with_bounds(shape_of(1, b.taps + 1, 64, 1, 1), b.range, b.bits);
    expect_chosen(isa, within, kAvx2Table.name, true);
    expect_chosen(isa, beyond, kAvx2Table.name, false);
    for (const ConvShape& s : {within, beyond}) check_kernel(isa, *select_kernels(isa).conv(s), s, Edge::end, 1, true);
  }
}

// The kernel of that name that a row has, for any shape it fits.
const ConvKernel& find(const char* isa, const char* name) {
  const ConvShape typical = with_bounds(shape_of(14, 64, 64, 3, 1), {DType::u8, 0, 15}, 4);
  for (const ConvKernel* kernel : conv_kernels(select_kernels(isa), typical))
    if (std::strcmp(kernel->name, name) == 0) return *kernel;
  std::fprintf(stderr, "%s has no %s\n", isa, name);
  std::abort();
}

void test_winograd(const char* isa, const char* name, bool (*fits)(const ConvShape&)) {
  const ConvKernel& kernel = find(isa, name);
  test_kernel(isa, kernel, fits);
  uint64_t seed = 9000;
  for (int bits : {1, 2, 3, 4, 5, 6})
    for (const Range& range : {Range{DType::u8, 0, (1 << bits) - 1}, Range{DType::s8, -(1 << bits) / 2, 3}})
      for (int64_t width = 1; width < 10; ++width) {
        Random random(++seed);
        ConvShape s = shape_of(0, random.in(1, 70), random.in(1, 70), 3, 1);
        s.in_w = width, s.pad_left = random.in(width < 3 ? 1 : 0, 3), s.out_w = width + 2 * s.pad_left - 2;
        s.kernel_h = random.in(1, 4), s.stride_h = random.in(1, 3), s.dilation_h = random.in(1, 2);
        s.pad_top = random.in(0, 2), s.in_h = random.in((s.kernel_h - 1) * s.dilation_h + 1, 9);
        s.out_h = (s.in_h + 2 * s.pad_top - (s.kernel_h - 1) * s.dilation_h - 1) / s.stride_h + 1;
        s.mul = static_cast<int32_t>(random.in(1, 2)), s.add = s.mul - 1;
        s = with_bounds(s, range, bits);
        if (fits(s)) check_kernel(isa, kernel, s, seed % 2 == 0 ? Edge::end : Edge::begin, seed, seed % 3 == 0);
      }
}

// `few`: the kernel for four bits; `some`: for inputs of more, if the same does not take them.
void test_winograd_choice(const char* isa, const char* few, const char* some) {
  const Range four{DType::u8, 0, 15};
  for (const ConvShape& s : {shape_of(56, 64, 64, 3, 1), shape_of(7, 512, 512, 3, 1)}) {
    expect_chosen(isa, with_bounds(s, four, 4), few, true);
    for (const char* name : {few, some}) {
      expect_chosen(isa, with_bounds(s, {DType::u8, 0, 128}, 4), name, false);  // d1 + d2 is no byte
      expect_chosen(isa, with_bounds(s, four, 7), name, false);                 // nor g0 + g1 + g2
    }
    if (few == some) continue;
    expect_chosen(isa, with_bounds(s, {DType::u8, 0, 25}, 4), few, true);
    expect_chosen(isa, with_bounds(s, {DType::u8, 0, 26}, 4), some, true);  // ten times that is no byte
    expect_chosen(isa, with_bounds(s, {DType::u8, 0, 127}, 4), some, true);
    expect_chosen(isa, with_bounds(s, four, 5), some, true);  // g0 + 2 g1 + 4 g2 is no byte
  }
  expect_chosen(isa, with_bounds(shape_of(6, 64, 64, 3, 1), four, 4), some, true);  // tiles of four save no products
  ConvShape strided = shape_of(14, 64, 64, 3, 1);
  strided.stride_w = 2, strided.out_w = 7;
  for (const char* name : {few, some}) {
    expect_chosen(isa, with_bounds(strided, four, 4), name, false);
    expect_chosen(isa, with_bounds(shape_of(14, 64, 64, 5, 1), four, 4), name, false);
  }
}

// A kernel for `columns` of weights with that stride, on maps of all widths.
void test_tiles(const char* isa, const ConvKernel& kernel, int64_t columns, int64_t stride, int64_t most_channels,
                bool (*fits)(const ConvShape&)) {
  uint64_t seed = 12000;
  for (const Range& range : kRanges)
    for (int i = 0; i < 4; ++i)
      for (int64_t width = 1; width < 40; width += width < 20 ? 1 : 6) {
        Random random(++seed);
        ConvShape s =
            shape_of(0, i < 3 && most_channels < 5 ? i + 1 : random.in(1, most_channels), random.in(1, 40), columns, 1);
        s.in_w = width, s.stride_w = stride, s.pad_left = random.in(width < columns ? (columns + 1 - width) / 2 : 0, 5);
        s.out_w = (width + 2 * s.pad_left - columns) / stride + 1;
        s.kernel_h = random.in(1, 8), s.stride_h = random.in(1, 3), s.dilation_h = random.in(1, 2);
        s.pad_top = random.in(0, 3), s.in_h = random.in((s.kernel_h - 1) * s.dilation_h + 1, 16);
        s.out_h = (s.in_h + 2 * s.pad_top - (s.kernel_h - 1) * s.dilation_h - 1) / s.stride_h + 1;
        s.mul = static_cast<int32_t>(random.in(1, 2)), s.add = s.mul - 1;
        s = with_bounds(s, range, s.mul == 1 ? 8 : 4);
        if (fits(s)) check_kernel(isa, kernel, s, seed % 2 == 0 ? Edge::end : Edge::begin, seed, seed % 3 == 0);
      }
}

void test_wide_winograd(const char* isa) {
  const char* name = kAvx2WinogradWide.name;
  test_tiles(isa, kAvx2WinogradWide, 3, 1, 70, avx2_winograd_wide_fits);
  const Range eight{DType::u8, 0, 255};
  ConvShape most = shape_of(1, 900, 9, 3, 1);  // results of nearly 29 bits
  most.mul = 1, most.add = 0;
  for (const Range& range : {eight, Range{DType::s8, -128, 127}})
    check_kernel(isa, kAvx2WinogradWide, with_bounds(most, range, 8), Edge::end, 1, true);
  for (ConvShape s : {shape_of(56, 64, 64, 3, 1), shape_of(7, 512, 512, 3, 1), shape_of(32, 16, 16, 3, 1)}) {
    s.mul = 1, s.add = 0;
    expect_chosen(isa, with_bounds(s, eight, 8), name, true);
    expect_chosen(isa, with_bounds(s, {DType::s8, -128, 127}, 8), name, true);
    expect_chosen(isa, with_bounds(s, eight, 4), name, true);
    expect_chosen(isa, with_bounds(s, eight, 2), name, false);  // int16 holds many of the narrow kernel's steps
    ConvShape strided = s;
    strided.stride_w = 2, strided.out_w = (s.out_w + 1) / 2;
    expect_chosen(isa, with_bounds(strided, eight, 8), name, false);
  }
  ConvShape beyond = shape_of(7, 1000, 8, 3, 1);
  beyond.mul = 1, beyond.add = 0;
  if (avx2_winograd_wide_fits(with_bounds(beyond, eight, 8))) ++failures;
  expect_chosen(isa, with_bounds(shape_of(5, 64, 64, 3, 1), eight, 8), name, false);  // tiles would be half empty
}

void test_stem(const char* isa) {
  const char* name = kAvx2Stem.name;
  test_tiles(isa, kAvx2Stem, 7, 2, 4, avx2_stem_fits);
  const auto stem = [](int64_t width, int64_t in, int64_t out) {
    ConvShape s = shape_of(width, in, out, 7, 1);
    s.stride_h = s.stride_w = 2, s.mul = 1, s.add = 0;
    s.out_h = s.out_w = (width - 1) / 2 + 1;
    return s;
  };
  const Range eight{DType::u8, 0, 255};
  for (const ConvShape& s : {stem(224, 3, 64), stem(32, 1, 8)}) {
    expect_chosen(isa, with_bounds(s, eight, 8), name, true);
    expect_chosen(isa, with_bounds(s, {DType::s8, -128, 127}, 8), name, true);
    expect_chosen(isa, with_bounds(s, {DType::u8, 0, 15}, 4), name,
                  std::strcmp(isa, "avx2") != 0);  // or the narrow one
  }
  expect_chosen(isa, with_bounds(stem(2, 3, 8), eight, 8), name, false);   // tiles would be nearly empty
  expect_chosen(isa, with_bounds(stem(32, 5, 8), eight, 8), name, false);  // too many channels for its rows
  ConvShape large = with_bounds(stem(32, 3, 8), eight, 8);
  large.mul = 3;  // 120 times its weights are beyond 16 bits
  expect_chosen(isa, large, name, false);
}

// Both rows of VNNI.
void test_winograd_vnni(const char* isa) {
  const std::string two = std::string(isa) + "-winograd", four = two + "-four";
  test_winograd(isa, two.c_str(), winograd_fits<TwoOutputs>);
  test_winograd(isa, four.c_str(), winograd_fits<FourOutputs>);
  test_winograd_choice(isa, four.c_str(), two.c_str());
}

#ifdef BITSTRATA_HAVE_AVX512VPOPCNT
bool always(const ConvShape&) { return true; }

void test_vpopcnt() {
  const Kernels& row = select_kernels("avx512vnni");
  test_kernel(row.isa, kAvx512VpopcntConv, always);
  const char* name = kAvx512VpopcntConv.name;
  const Range one{DType::u8, 0, 1}, four{DType::u8, 0, 15};
  const ConvShape layers[] = {shape_of(56, 64, 64, 3, 1),  shape_of(28, 128, 128, 3, 1), shape_of(14, 256, 256, 3, 1),
                              shape_of(7, 512, 512, 3, 1), shape_of(16, 32, 32, 3, 1),   shape_of(14, 64, 384, 1, 1),
                              shape_of(32, 16, 16, 3, 1)};
  for (const ConvShape& s : layers) {
    expect_chosen(row.isa, with_bounds(s, one, 1), name, true);
    expect_chosen(row.isa, with_bounds(s, {DType::s8, -1, 0}, 1), name, true);
    expect_chosen(row.isa, with_bounds(s, four, 4), name, false);
    expect_chosen(row.isa, with_bounds(s, {DType::u8, 0, 255}, 1), name, false);
    expect_chosen(row.isa, with_bounds(s, one, 8), name, false);
  }
  expect_chosen(row.isa, with_bounds(shape_of(32, 3, 16, 3, 1), one, 1), name, false);
  expect_chosen(row.isa, with_bounds(shape_of(16, 1, 1, 3, 32), one, 1), name, false);  // groups of one channel
}
#endif

bool available(const char* isa) {
  for (const std::string& name : available_isas())
    if (name == isa) return true;
  return false;
}

}  // namespace

void test_low_bit_kernels() {
  if (available("avx2")) {
    test_kernel("avx2", kAvx2Table, avx2_table_fits);
    test_kernel("avx2", kAvx2Pairs, avx2_pairs_fits);
    test_the_bound_of_tables("avx2");
    test_winograd("avx2", kAvx2Winograd.name, avx2_winograd_fits);
    test_winograd_choice("avx2", kAvx2Winograd.name, kAvx2Winograd.name);
    test_stem("avx2");
    test_wide_winograd("avx2");
  }
  if (available("avx2vnni")) test_stem("avx2vnni");
  for (const char* isa : {"avx2vnni", "avx512vnni"})
    if (available(isa)) test_winograd_vnni(isa);
  for (const char* isa : {"avx2", "avx2vnni"})
    if (available(isa)) test_tables(isa);
#ifdef BITSTRATA_HAVE_AVX512VPOPCNT
  if (available("avx512vnni") && avx512vpopcnt_supported()) test_vpopcnt();
#endif
}

#endif
}  // namespace bitstrata::test
