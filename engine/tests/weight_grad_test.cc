#include "weight_grad_test.h"

#include <string>
#include <vector>

#include "guarded.h"

namespace bitstrata::test {
namespace {

struct Data {
  const ConvShape& s;
  int64_t images;
  const uint8_t* x;
  const int8_t* g;

  int64_t input(int64_t image, int64_t y, int64_t x_, int64_t c) const {
    if (y < 0 || x_ < 0 || y >= s.in_h || x_ >= s.in_w) return 0;
    const uint8_t code = x[((image * s.in_h + y) * s.in_w + x_) * s.in_c + c];
    return s.input_dtype == DType::u8 ? code : static_cast<int8_t>(code);
  }
  // What the weight (o, i, ky, kx) multiplied, summed.
  int64_t sum(int64_t o, int64_t i, int64_t ky, int64_t kx) const {
    int64_t all = 0;
    for (int64_t image = 0; image < images; ++image)
      for (int64_t y = 0; y < s.out_h; ++y)
        for (int64_t u = 0; u < s.out_w; ++u)
          all += g[((image * s.out_h + y) * s.out_w + u) * s.out_c + o] *
                 input(image, y * s.stride_h + ky * s.dilation_h - s.pad_top,
                       u * s.stride_w + kx * s.dilation_w - s.pad_left, o / s.group_out() * s.group_in() + i);
    return all;
  }
};

// Reads sums in blocks of weights, of which `first_out` is the first output channel of the data; rows are `extra`
// elements longer than they need be.
void check_sums(const Kernels& row, const WeightGradKernel& kernel, const ConvShape& s, const Data& data,
                const int32_t* sums, int64_t first_out, Edge edge, Random& random) {
  const int64_t taps = s.kernel_h * s.kernel_w;
  const int64_t outs = random.in(1, s.out_c), ins = random.in(1, s.group_in()), extra = random.in(0, 2);
  for (int64_t o = 0; o < s.out_c; o += outs)
    for (int64_t i = 0; i < s.group_in(); i += ins) {
      const WeightBlock b{o, o + outs < s.out_c ? o + outs : s.out_c, i,
                          i + ins < s.group_in() ? i + ins : s.group_in()};
      const int64_t pitch = (b.in_end - b.in_begin) * taps + extra, count = (b.out_end - b.out_begin) * pitch - extra;
      const Guarded wide(count * 8, edge, 8), narrow(count * 4, edge, 4);
      for (bool first : {true, false}) {  // the second reading doubles the sums
        kernel.read(s, sums, b, wide.get<int64_t>(), pitch, first);
        kernel.read_short(s, sums, b, narrow.get<int32_t>(), pitch, first);
      }
      for (int64_t u = b.out_begin; u < b.out_end; ++u)
        for (int64_t v = b.in_begin; v < b.in_end; ++v)
          for (int64_t tap = 0; tap < taps; ++tap) {
            const int64_t at = (u - b.out_begin) * pitch + (v - b.in_begin) * taps + tap;
            const int64_t want = 2 * data.sum(first_out + u, v, tap / s.kernel_w, tap % s.kernel_w);
            expect_equal(row.isa, kernel.name, "sum", at, wide.get<int64_t>()[at], want);
            expect_equal(row.isa, kernel.name, "short sum", at, narrow.get<int32_t>()[at], static_cast<int32_t>(want));
          }
    }
}

// Sums of all rows in two calls; then those of some output channels alone. Codes and gradients fill their ranges.
void check(const Kernels& row, const ConvShape& s, int64_t images, Edge edge, Random& random) {
  const int64_t in = images * s.in_h * s.in_w * s.in_c, out = images * s.out_h * s.out_w * s.out_c;
  const Guarded x(in, edge), g(out, edge);
  for (int64_t i = 0; i < in; ++i) x.get<uint8_t>()[i] = static_cast<uint8_t>(random.in(s.input_lo, s.input_hi));
  for (int64_t i = 0; i < out; ++i) g.get<int8_t>()[i] = static_cast<int8_t>(random.in(s.code_lo, s.code_hi));
  const Data data{s, images, x.get<uint8_t>(), g.get<int8_t>()};
  const WeightGradKernel& kernel = *row.products->weight_grad(s);
  const int64_t cut = random.in(0, s.out_h);
  const auto rows = {std::pair(int64_t{0}, cut), std::pair(cut, s.out_h)};
  const Guarded sums(kernel.sums(s) * 4, edge, 64);
  bool fresh = true;
  for (const auto& [begin, end] : rows) {
    if (begin == end) continue;
    const Guarded scratch(kernel.scratch_bytes(s, images, end - begin), edge, 64);
    kernel.add(s, x.get(), g.get<int8_t>(), images, begin, end, scratch.get(), sums.get<int32_t>(), fresh);
    fresh = false;
  }
  check_sums(row, kernel, s, data, sums.get<int32_t>(), 0, edge, random);
  if (kernel.outs == 0 || s.groups != 1) return;
  ConvShape alone = s;
  const int64_t first = random.in(0, (s.out_c - 1) / kernel.outs) * kernel.outs;
  alone.out_c = random.in(1, s.out_c - first);
  const Guarded some(kernel.sums(alone) * 4, edge, 64);
  fresh = true;
  for (const auto& [begin, end] : rows) {
    if (begin == end) continue;
    const Guarded scratch(kernel.scratch_bytes(s, images, end - begin), edge, 64);
    kernel.pack(s, x.get(), images, begin, end, scratch.get());
    kernel.add_outs(s, g.get<int8_t>(), {images, begin, end, first, first + alone.out_c}, scratch.get(),
                    some.get<int32_t>(), fresh);
    fresh = false;
  }
  check_sums(row, kernel, alone, data, some.get<int32_t>(), first, edge, random);
}

}  // namespace

void test_weight_grads(const Kernels& row) {
  struct Sizes {
    int64_t in, out, groups;
  };
  const Sizes all[] = {{3, 5, 1},  {4, 8, 1}, {1, 1, 1}, {7, 9, 1},   {16, 16, 1}, {33, 17, 1},
                       {1, 1, 20}, {2, 3, 3}, {1, 4, 5}, {13, 11, 2}, {64, 3, 1},  {5, 40, 1}};
  uint64_t seed = 0;
  for (const Sizes& z : all)
    for (DType dtype : {DType::u8, DType::s8})
      for (int round = 0; round < 6; ++round) {
        Random random(++seed);
        ConvShape s{};
        const int32_t largest = round % 2 == 0 ? 127 : 63;
        const bool few = round >= 3;  // bits; then three columns of weights, for which Winograd's kernels are
        s.input_lo = dtype == DType::u8 ? 0 : few ? -largest : -128;
        s.input_hi = few ? largest : dtype == DType::u8 ? 255 : 127;
        s.code_lo = few ? -largest : -128, s.code_hi = few ? largest : 127;
        s.groups = z.groups, s.in_c = z.in * z.groups, s.out_c = z.out * z.groups, s.input_dtype = dtype;
        s.in_h = random.in(1, 7), s.in_w = random.in(1, 11);
        s.stride_h = random.in(1, 2), s.stride_w = random.in(1, 2);
        s.dilation_h = random.in(1, 2), s.dilation_w = random.in(1, 2);
        s.kernel_h = random.in(1, 3), s.kernel_w = few ? 3 : random.in(1, 3);
        if (few) s.stride_w = s.dilation_w = 1;
        s.pad_top = (s.kernel_h - 1) * s.dilation_h, s.pad_left = (s.kernel_w - 1) * s.dilation_w;
        s.out_h = (s.in_h + s.pad_top - 1) / s.stride_h + 1, s.out_w = (s.in_w + s.pad_left - 1) / s.stride_w + 1;
        check(row, s, random.in(1, 3), seed % 2 == 0 ? Edge::end : Edge::begin, random);
      }
}

}  // namespace bitstrata::test
