// Speed of convolutions and of those followed by a requantization, one thread, on layers of a CIFAR ResNet-20 and of a
// ResNet-18, for every instruction set here:
//   conv_bench [activation bits [weight bits [lowest activation code]]]
// Beside each convolution stands the kernel that the same instruction set has for 4 bits, on the same codes. Times are
// the thread's own processor time, the least of many rounds in which both take turns.
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "bitstrata/dispatch.h"
#include "bitstrata/graph.h"

namespace {

using namespace bitstrata;

double now() {
  timespec t{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// Seconds of one call each, the least of many rounds.
template <typename... F>
std::vector<double> seconds(const F&... f) {
  std::vector<double> best;
  for (int round = 0; round < 25; ++round) {
    std::vector<double> times;
    const auto measure = [&](const auto& g) {
      int calls = 0;
      const double start = now();
      double elapsed = 0;
      while (elapsed < 0.002) {
        g();
        ++calls;
        elapsed = now() - start;
      }
      times.push_back(elapsed / calls);
    };
    (measure(f), ...);
    if (best.empty()) best = times;
    for (size_t i = 0; i < times.size(); ++i) best[i] = std::min(best[i], times[i]);
  }
  return best;
}

// Cycles a second, from a chain of additions that each take one.
double clock_rate() {
  constexpr int kAdditions = 100000;
  const double s = seconds([] {
    unsigned long x = 1;
    for (int i = 0; i < kAdditions / 10; ++i)
      for (int j = 0; j < 10; ++j) {
        x += 1;
        __asm__ volatile("" : "+r"(x));
      }
  })[0];
  return kAdditions / s;
}

struct Layer {
  int64_t size, in, out, kernel, stride, groups;
};

struct Bits {
  int activation, weight;
  int32_t lowest;  // activation code
  int32_t highest() const { return lowest + (1 << activation) - 1; }
  int32_t half() const { return 1 << (weight - 1); }
  DType dtype() const { return lowest < 0 ? DType::s8 : DType::u8; }
};

ConvShape shape_of(const Layer& l, const Bits& bits) {
  ConvShape s{};
  s.in_h = s.in_w = l.size, s.in_c = l.in, s.out_c = l.out, s.groups = l.groups;
  s.kernel_h = s.kernel_w = l.kernel, s.pad_top = s.pad_left = l.kernel / 2;
  s.stride_h = s.stride_w = l.stride, s.dilation_h = s.dilation_w = 1;
  s.out_h = s.out_w = (l.size + 2 * (l.kernel / 2) - l.kernel) / l.stride + 1;
  s.mul = 2, s.add = 1, s.code_lo = -bits.half(), s.code_hi = bits.half() - 1;
  s.input_lo = bits.lowest, s.input_hi = bits.highest(), s.input_dtype = bits.dtype();
  return s;
}

std::vector<uint8_t> random_codes(int64_t count, int32_t lo, int32_t hi) {
  std::vector<uint8_t> codes(static_cast<size_t>(count));
  for (auto& c : codes) c = static_cast<uint8_t>(lo + std::rand() % (hi - lo + 1));
  return codes;
}

// A kernel with its own buffers, on one image.
class Convolution {
 public:
  Convolution(const ConvKernel& kernel, const ConvShape& s, const int8_t* codes, const uint8_t* image)
      : kernel_(kernel),
        s_(s),
        image_(image),
        packed_(allocate(kernel.packed_bytes(s))),
        staged_(allocate(kernel.staged_row_bytes(s) * s.padded_h())),
        out_(static_cast<size_t>(s.out_h * s.out_w * s.out_c)) {
    const std::vector<int32_t> pad(static_cast<size_t>(s.in_c), s.input_lo);
    kernel.pack(s, codes, pad.data(), packed_.get());
  }
  void run() {
    const bool direct = kernel_.staged_row_bytes(s_) == 0;
    if (!direct) kernel_.stage(s_, packed_.get(), image_, staged_.get(), 0, s_.padded_h());
    kernel_.run(s_, packed_.get(), direct ? image_ : staged_.get(), out_.data(), 0, s_.out_h);
  }
  const std::vector<int32_t>& out() const { return out_; }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  using Buffer = std::unique_ptr<void, Free>;
  static Buffer allocate(int64_t bytes) {
    return Buffer(std::aligned_alloc(64, static_cast<size_t>(bytes / 64 + 1) * 64));
  }

  const ConvKernel& kernel_;
  const ConvShape s_;
  const void* image_;
  Buffer packed_, staged_;
  std::vector<int32_t> out_;
};

void bench_kernels(const Kernels& row, const Layer& l, const Bits& bits, double hertz) {
  const ConvShape s = shape_of(l, bits), four = shape_of(l, {4, 4, bits.lowest < 0 ? -8 : 0});
  const bool low = bits.activation <= 4 && bits.weight <= 4;
  const ConvKernel &kernel = *row.conv(s), &other = *row.conv(low ? four : s);
  const int64_t count = s.out_c * s.group_in() * s.kernel_h * s.kernel_w;
  const std::vector<uint8_t> codes = random_codes(count, s.code_lo, s.code_hi);
  const std::vector<uint8_t> image = random_codes(s.in_h * s.in_w * s.in_c, s.input_lo, s.input_hi);
  const int8_t* weights = reinterpret_cast<const int8_t*>(codes.data());
  Convolution a(kernel, s, weights, image.data()), b(other, s, weights, image.data());
  const std::vector<double> t = seconds([&] { a.run(); }, [&] { b.run(); });
  const double macs = static_cast<double>(s.out_h * s.out_w * count);
  std::printf(" %9.2f us %6.1f MAC/cycle, %5.2f times %s%s\n", t[0] * 1e6, macs / t[0] / hertz, t[1] / t[0], other.name,
              a.out() == b.out() ? "" : " (DIFFERENT RESULTS)");
}

void bench_graph(const char* isa, const Layer& l, const Bits& bits) {
  const int64_t in_group = l.in / l.groups, count = l.out * in_group * l.kernel * l.kernel, p = l.kernel / 2;
  const std::vector<uint8_t> codes = random_codes(count, -bits.half(), bits.half() - 1);
  std::vector<int32_t> pad(static_cast<size_t>(l.in), bits.lowest), multiplier(static_cast<size_t>(l.out), 1 << 20);
  std::vector<int64_t> bias(static_cast<size_t>(l.out), 1 << 23);
  std::vector<uint8_t> shift(static_cast<size_t>(l.out), 24);
  Graph g(isa, 1);
  int v = g.input({l.size, l.size, l.in}, bits.dtype(), bits.lowest, bits.highest());
  v = g.conv("conv", v,
             {reinterpret_cast<const int8_t*>(codes.data()),
              {l.out, in_group, l.kernel, l.kernel},
              pad.data(),
              l.in,
              2,
              1,
              {l.stride, l.stride},
              {p, p, p, p},
              {1, 1},
              l.groups});
  const char* kernel = g.kernel(v);
  v = g.requant("requant", v,
                {multiplier.data(), bias.data(), shift.data(), l.out, bits.lowest, bits.highest(), bits.dtype()});
  g.finish(v);
  const int64_t batch = l.size == 1 ? 64 : 1;
  const std::vector<uint8_t> x = random_codes(batch * g.value(0).bytes(), bits.lowest, bits.highest());
  std::vector<uint8_t> out(static_cast<size_t>(batch * g.value(v).bytes()));
  std::vector<void*> to(static_cast<size_t>(g.values()), nullptr);
  to.back() = out.data();
  const double s = seconds([&] { g.run(x.data(), batch, to); })[0];
  std::printf("%-10s %-20s %3ldx%-3ld %4ld->%-4ld k%ld s%ld g%-3ld  with requant%s %9.2f us, alone", isa, kernel,
              static_cast<long>(l.size), static_cast<long>(l.size), static_cast<long>(l.in), static_cast<long>(l.out),
              static_cast<long>(l.kernel), static_cast<long>(l.stride), static_cast<long>(l.groups),
              batch > 1 ? " x64" : "", s * 1e6);
}

}  // namespace

int main(int argc, char** argv) {
  const auto argument = [&](int i, int fallback) { return argc > i ? std::atoi(argv[i]) : fallback; };
  const Bits bits{argument(1, 4), argument(2, 4), argument(3, 0)};
  if (bits.activation < 1 || bits.activation > 8 || bits.weight < 1 || bits.weight > 8 || bits.lowest < -128 ||
      bits.highest() > highest(bits.dtype())) {
    std::fprintf(stderr, "conv_bench: bits are 1 to 8, and all activation codes are in u8 or all in s8\n");
    return 1;
  }
  const Layer layers[] = {
      {32, 3, 16, 3, 1, 1},   {32, 16, 16, 3, 1, 1},   {16, 32, 32, 3, 1, 1},   {8, 64, 64, 3, 1, 1},
      {32, 16, 32, 3, 2, 1},  {32, 16, 32, 1, 2, 1},   {16, 32, 32, 3, 1, 32},  {1, 64, 10, 1, 1, 1},
      {56, 64, 64, 3, 1, 1},  {28, 128, 128, 3, 1, 1}, {14, 256, 256, 3, 1, 1}, {7, 512, 512, 3, 1, 1},
      {56, 64, 128, 3, 2, 1}, {56, 64, 128, 1, 2, 1},  {1, 512, 1000, 1, 1, 1}, {224, 3, 64, 7, 2, 1}};
  const double hertz = clock_rate();
  std::printf("activations %d to %d, weights of %d bits (2c + 1), %.2f GHz\n", bits.lowest, bits.highest(), bits.weight,
              hertz * 1e-9);
  for (const auto& isa : available_isas())
    for (const Layer& l : layers) {
      bench_graph(isa.c_str(), l, bits);
      bench_kernels(select_kernels(isa), l, bits, hertz);
    }
}
