#include "input_gradient_test.h"

#include <cstring>
#include <utility>

#include "guarded.h"

namespace bitstrata::test {
namespace {

uint16_t to_bf16(int64_t integer) {  // to nearest, ties to even
  const float f = static_cast<float>(integer);
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// The gradient at a position of the input, of integers.
int64_t expected(const ConvShape& s, const int64_t* g, const int64_t* w, int64_t y, int64_t x, int64_t c) {
  int64_t sum = 0;
  for (int64_t v = 0; v < s.out_h; ++v)
    for (int64_t u = 0; u < s.out_w; ++u) {
      const int64_t from_y = y + s.pad_top - v * s.stride_h, from_x = x + s.pad_left - u * s.stride_w;
      const int64_t ky = from_y / s.dilation_h, kx = from_x / s.dilation_w;
      if (from_y < 0 || from_x < 0 || from_y % s.dilation_h != 0 || from_x % s.dilation_w != 0) continue;
      if (ky >= s.kernel_h || kx >= s.kernel_w) continue;
      for (int64_t o = 0; o < s.out_c; ++o)
        sum += g[(v * s.out_w + u) * s.out_c + o] * w[((o * s.in_c + c) * s.kernel_h + ky) * s.kernel_w + kx];
    }
  return sum;
}

// Rows in two calls.
void check(const Kernels& row, const ConvShape& s, Edge edge, Random& random) {
  const int64_t weights = s.out_c * s.in_c * s.kernel_h * s.kernel_w, gs = s.out_h * s.out_w * s.out_c;
  const bool wide = random.in(0, 1) != 0;
  const Guarded high(weights, edge), low(weights, edge), g(gs * 2, edge, 2), out(s.in_h * s.in_w * s.in_c * 2, edge, 2);
  const Guarded w64(weights * 8, edge, 8), g64(gs * 8, edge, 8);
  for (int64_t i = 0; i < weights; ++i) {
    high.get<int8_t>()[i] = static_cast<int8_t>(random.in(-8, 7));
    low.get<int8_t>()[i] = static_cast<int8_t>(random.in(0, 1));
    w64.get<int64_t>()[i] = wide ? 2 * high.get<int8_t>()[i] + low.get<int8_t>()[i] : high.get<int8_t>()[i];
  }
  for (int64_t i = 0; i < gs; ++i) g.get<uint16_t>()[i] = to_bf16(g64.get<int64_t>()[i] = random.in(-9, 9));
  const InputGradientKernel& kernel = *float_products_of(row).input_gradient(s, 17);
  const Guarded packed(kernel.packed_bytes(s), edge, 64);
  for (int64_t part = 0; part < kernel.pack_parts(s); ++part)
    kernel.pack(s, high.get<int8_t>(), wide ? low.get<int8_t>() : nullptr, packed.get(), part);
  const int64_t cut = random.in(0, s.in_h);
  for (const auto& [begin, end] : {std::pair(int64_t{0}, cut), std::pair(cut, s.in_h)}) {
    if (begin == end) continue;
    const Guarded scratch(kernel.scratch_bytes(s, end - begin), edge, 64);
    kernel.run(s, packed.get(), g.get<uint16_t>(), scratch.get(), out.get<uint16_t>(), begin, end);
  }
  for (int64_t i = 0; i < s.in_h * s.in_w * s.in_c; ++i)
    expect_equal(row.isa, kernel.name, "input gradient", i, out.get<uint16_t>()[i],
                 to_bf16(expected(s, g64.get<int64_t>(), w64.get<int64_t>(), i / s.in_c / s.in_w, i / s.in_c % s.in_w,
                                  i % s.in_c)));
}

}  // namespace

void test_input_gradients(const Kernels& row) {
  uint64_t seed = 0;
  for (int64_t in : {17, 32, 50})  // dense kernels of 3x3, which may have kernels of their own
    for (int64_t out : {17, 24, 32, 41})
      for (Edge edge : {Edge::end, Edge::begin}) {
        Random random(++seed);
        ConvShape s{};
        s.groups = s.stride_h = s.stride_w = s.dilation_h = s.dilation_w = 1;
        s.in_c = in, s.out_c = out, s.kernel_h = s.kernel_w = 3;
        s.pad_top = random.in(0, 3), s.pad_left = random.in(0, 3);
        s.in_h = random.in(3, 7), s.in_w = random.in(3, 21);
        s.out_h = s.in_h + 2 * s.pad_top - 2, s.out_w = s.in_w + 2 * s.pad_left - 2;
        check(row, s, edge, random);
      }
  for (int64_t in : {1, 4, 5, 8, 9, 16, 33, 48})
    for (int64_t out : {1, 8, 9, 16, 23, 40})
      for (Edge edge : {Edge::end, Edge::begin}) {
        Random random(++seed);
        ConvShape s{};
        s.groups = 1, s.in_c = in, s.out_c = out;
        s.in_h = random.in(1, 6), s.in_w = random.in(1, 19);
        s.stride_h = random.in(1, 3), s.stride_w = random.in(1, 3);
        s.dilation_h = random.in(1, 2), s.dilation_w = random.in(1, 2);
        s.kernel_h = random.in(1, 3), s.kernel_w = random.in(1, 3);
        s.pad_top = (s.kernel_h - 1) * s.dilation_h, s.pad_left = (s.kernel_w - 1) * s.dilation_w;
        s.out_h = (s.in_h + s.pad_top - 1) / s.stride_h + 1, s.out_w = (s.in_w + s.pad_left - 1) / s.stride_w + 1;
        check(row, s, edge, random);
      }
}

}  // namespace bitstrata::test
