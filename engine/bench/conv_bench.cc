// Speed of convolution and requantization, one core, on layer shapes of a CIFAR ResNet-20 and of a ResNet-18:
//   conv_bench [activation bits] [weight bits]
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "bitstrata/dispatch.h"
#include "bitstrata/graph.h"

namespace {

using namespace bitstrata;
using Clock = std::chrono::steady_clock;

// Seconds a call, the best of several rounds.
template <typename F>
double seconds(F&& f) {
  double best = 1e9;
  for (int round = 0; round < 15; ++round) {
    int calls = 0;
    const auto start = Clock::now();
    double elapsed = 0;
    while (elapsed < 0.01) {
      f();
      ++calls;
      elapsed = std::chrono::duration<double>(Clock::now() - start).count();
    }
    if (elapsed / calls < best) best = elapsed / calls;
  }
  return best;
}

struct Layer {
  int64_t size, in, out, kernel, stride, groups;
};

void bench(const char* isa, const Layer& l, int a_bits, int w_bits, bool requantize) {
  const int32_t a_max = (1 << a_bits) - 1, half = 1 << (w_bits - 1);
  const int64_t in_group = l.in / l.groups, count = l.out * in_group * l.kernel * l.kernel, p = l.kernel / 2;
  std::vector<int8_t> codes(static_cast<size_t>(count));
  for (auto& c : codes) c = static_cast<int8_t>(std::rand() % (2 * half) - half);
  std::vector<int32_t> pad(static_cast<size_t>(l.in), 0), multiplier(static_cast<size_t>(l.out), 1 << 20);
  std::vector<int64_t> bias(static_cast<size_t>(l.out), 1 << 23);
  std::vector<uint8_t> shift(static_cast<size_t>(l.out), 24);
  Graph g(isa, 1);
  int v = g.input({l.size, l.size, l.in}, DType::u8, 0, a_max);
  v = g.conv("conv", v,
             {codes.data(),
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
  if (requantize)
    v = g.requant("requant", v, {multiplier.data(), bias.data(), shift.data(), l.out, 0, a_max, DType::u8});
  g.finish(v);
  const int64_t batch = l.size == 1 ? 64 : 1;
  std::vector<uint8_t> x(static_cast<size_t>(batch * g.value(0).bytes()));
  for (auto& code : x) code = static_cast<uint8_t>(std::rand() % (a_max + 1));
  std::vector<uint8_t> out(static_cast<size_t>(batch * g.value(v).bytes()));
  std::vector<void*> to(static_cast<size_t>(g.values()), nullptr);
  to.back() = out.data();
  const double s = seconds([&] { g.run(x.data(), batch, to); });
  const Shape& o = g.value(v).shape;
  const double macs = static_cast<double>(batch * o.h * o.w * count);
  std::printf("%-8s %-15s %2ldx%-2ld %3ld->%-3ld k%ld s%ld g%-3ld %-8s %9.2f us %8.2f GMAC/s\n", isa, kernel,
              static_cast<long>(l.size), static_cast<long>(l.size), static_cast<long>(l.in), static_cast<long>(l.out),
              static_cast<long>(l.kernel), static_cast<long>(l.stride), static_cast<long>(l.groups),
              requantize ? "+requant" : "", s * 1e6, macs / s * 1e-9);
}

}  // namespace

int main(int argc, char** argv) {
  const int a_bits = argc > 1 ? std::atoi(argv[1]) : 4, w_bits = argc > 2 ? std::atoi(argv[2]) : 4;
  const Layer layers[] = {{32, 3, 16, 3, 1, 1},    {32, 16, 16, 3, 1, 1},   {16, 32, 32, 3, 1, 1},
                          {8, 64, 64, 3, 1, 1},    {32, 16, 32, 3, 2, 1},   {32, 16, 32, 1, 2, 1},
                          {16, 32, 32, 3, 1, 32},  {1, 64, 10, 1, 1, 1},    {56, 64, 64, 3, 1, 1},
                          {28, 128, 128, 3, 1, 1}, {14, 256, 256, 3, 1, 1}, {7, 512, 512, 3, 1, 1},
                          {56, 64, 128, 3, 2, 1},  {1, 512, 1000, 1, 1, 1}};
  std::printf("u%d activations, s%d weights (2c + 1)\n", a_bits, w_bits);
  for (const auto& isa : available_isas())
    for (const Layer& l : layers)
      for (bool requantize : {false, true}) bench(isa.c_str(), l, a_bits, w_bits, requantize);
}
