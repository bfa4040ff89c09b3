// An attempt: additive-only convolutions that visit the weights which are not zero, on bits.
//
//   g++ -O3 -march=native -o sparse recipes/operations/sparse.cc && ./sparse 0.125
//
// Weights are -1, 0 or 1, inputs 0 or 1, and an output is whether a sum exceeds its channel's threshold. A channel of
// the input is a plane of bits, kept three times: as it is, and shifted by a pixel to either side, with a row of zeros
// above and below, so that a tap of a 3x3 kernel is a load at an offset. Sums of many positions are counters whose bit
// l is a vector: a full adder is two three-operand instructions for 512 positions. Needs AVX-512.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

namespace {

using Bits = __m512i;
constexpr int kBits = 12;  // of a counter

Bits parity(Bits a, Bits b, Bits c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
Bits majority(Bits a, Bits b, Bits c) { return _mm512_ternarylogic_epi64(a, b, c, 0xE8); }

// Adds one bit of weight 2^from to the counter.
void add(Bits* counter, int from, int bits, Bits carry) {
  for (int l = from; l < bits; ++l) {
    const Bits next = _mm512_and_si512(counter[l], carry);
    counter[l] = _mm512_xor_si512(counter[l], carry);
    carry = next;
  }
}

// What two bits add to a bit of a counter: the carry.
Bits reduce(Bits* low, Bits a, Bits b) {
  const Bits carry = majority(*low, a, b);
  *low = parity(*low, a, b);
  return carry;
}

// The sum of the planes at these offsets; returns how many bits it has. Eight planes at a time pass a tree of adders.
int sum(const uint8_t* planes, const std::vector<int32_t>& taps, Bits* counter) {
  const int bits = std::max(4, 32 - __builtin_clz(static_cast<unsigned>(taps.size()) | 1));
  Bits ones = _mm512_setzero_si512(), twos = ones, fours = ones;  // in registers
  size_t k = 0;
  const auto load = [&](size_t i) { return _mm512_loadu_si512(planes + taps[k + i]); };
  for (; k + 8 <= taps.size(); k += 8) {
    const Bits twos_a = reduce(&ones, load(0), load(1)), twos_b = reduce(&ones, load(2), load(3));
    const Bits fours_a = reduce(&twos, twos_a, twos_b);
    const Bits twos_c = reduce(&ones, load(4), load(5)), twos_d = reduce(&ones, load(6), load(7));
    const Bits fours_b = reduce(&twos, twos_c, twos_d);
    add(counter, 3, bits, reduce(&fours, fours_a, fours_b));
  }
  for (; k < taps.size(); ++k) {
    const Bits none = _mm512_setzero_si512();
    add(counter, 3, bits, reduce(&fours, reduce(&twos, reduce(&ones, load(0), none), none), none));
  }
  counter[0] = ones, counter[1] = twos, counter[2] = fours;
  return bits;
}

// Whether more - less > threshold: the sign of more + ~less + 1 - (threshold + 1), in two's complement.
Bits exceeds(const Bits* more, const Bits* less, int bits, int threshold) {
  const Bits all = _mm512_set1_epi64(-1), none = _mm512_setzero_si512();
  Bits carry = none, carry_constant = none, sign = none;
  for (int l = 0; l < bits + 2; ++l) {
    const Bits a = l < bits ? more[l] : none, b = l < bits ? _mm512_xor_si512(less[l], all) : all;
    const Bits constant = (static_cast<uint32_t>(-threshold) >> l) & 1 ? all : none;
    const Bits difference = parity(a, b, carry);
    carry = majority(a, b, carry);
    sign = parity(difference, constant, carry_constant);
    carry_constant = majority(difference, constant, carry_constant);
  }
  return _mm512_xor_si512(sign, all);
}

struct Layer {
  int channels, outputs, side;  // side: 8 to 64, a multiple of 8
  int row() const { return side / 8; }
  size_t plane() const { return (static_cast<size_t>(side + 2) * row() + 127) / 64 * 64; }
};

struct Taps {
  std::vector<int32_t> more, less;  // offsets of the planes that are added and subtracted
  int threshold;
};

// Codes as the engine keeps them, (pixels, channels) bytes of 0 or 1, to planes. Plain C++ but for the first loop.
void to_planes(const Layer& layer, const uint8_t* x, uint8_t* planes, uint8_t* bits) {
  const int side = layer.side, row = layer.row(), groups = layer.channels / 8;
  const size_t plane = layer.plane(), count = static_cast<size_t>(side) * side * layer.channels;
  for (size_t i = 0; i < count; i += 64) {
    const uint64_t mask = _mm512_test_epi8_mask(_mm512_loadu_si512(x + i), _mm512_set1_epi8(1));
    std::memcpy(bits + i / 8, &mask, 8);
  }
  for (int y = 0; y < side; ++y)
    for (int b = 0; b < row; ++b)
      for (int g = 0; g < groups; ++g) {  // 8 pixels of 8 channels, transposed
        uint64_t m = 0, t;
        for (int j = 0; j < 8; ++j) m |= static_cast<uint64_t>(bits[(y * side + b * 8 + j) * groups + g]) << (8 * j);
        t = (m ^ (m >> 7)) & 0x00AA00AA00AA00AAull, m ^= t ^ (t << 7);
        t = (m ^ (m >> 14)) & 0x0000CCCC0000CCCCull, m ^= t ^ (t << 14);
        t = (m ^ (m >> 28)) & 0x00000000F0F0F0F0ull, m ^= t ^ (t << 28);
        for (int j = 0; j < 8; ++j)
          planes[((g * 8 + j) * 3 + 1) * plane + (y + 1) * row + b] = static_cast<uint8_t>(m >> (8 * j));
      }
  for (int c = 0; c < layer.channels; ++c) {
    uint8_t* middle = planes + (c * 3 + 1) * plane;
    for (int y = 1; y <= side; ++y) {
      uint64_t v = 0;
      std::memcpy(&v, middle + y * row, row);
      const uint64_t left = v << 1, right = v >> 1;  // the bit that leaves the row is not copied
      std::memcpy(middle - plane + y * row, &left, row);
      std::memcpy(middle + plane + y * row, &right, row);
    }
  }
}

void convolve(const Layer& layer, const std::vector<Taps>& weights, const uint8_t* planes, uint8_t* out) {
  Bits more[kBits], less[kBits];
  const size_t bytes = static_cast<size_t>(layer.side) * layer.row();
  for (size_t o = 0; o < weights.size(); ++o)
    for (size_t at = 0; at < bytes; at += 64) {
      std::fill(more, more + kBits, _mm512_setzero_si512());
      std::fill(less, less + kBits, _mm512_setzero_si512());
      const int a = sum(planes + at, weights[o].more, more), b = sum(planes + at, weights[o].less, less);
      _mm512_storeu_si512(out + o * layer.plane() + at, exceeds(more, less, std::max(a, b), weights[o].threshold));
    }
}

template <typename Work>
double least_us(const Work& work) {
  double least = 1e9;
  for (int i = 0; i < 300; ++i) {
    const auto begun = std::chrono::steady_clock::now();
    work();
    least = std::min(least, std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count() * 1e6);
  }
  return least;
}

void measure(const Layer& layer, double share) {
  std::mt19937 random(1);
  const int side = layer.side, channels = layer.channels;
  std::vector<uint8_t> x(static_cast<size_t>(side) * side * channels + 64);
  for (uint8_t& v : x) v = random() % 100 < 14;
  std::vector<int8_t> weights(static_cast<size_t>(layer.outputs) * channels * 9);
  for (int8_t& w : weights) {
    const double u = (random() % 100000) / 1e5;
    w = u < share / 2 ? 1 : u < share ? -1 : 0;
  }
  std::vector<Taps> taps(layer.outputs);
  for (int o = 0; o < layer.outputs; ++o) {
    taps[o].threshold = static_cast<int>(random() % 5) - 2;
    for (int i = 0; i < channels * 9; ++i) {
      const int8_t w = weights[static_cast<size_t>(o) * channels * 9 + i];
      const auto offset = static_cast<int32_t>((i / 9 * 3 + i % 3) * layer.plane() + i % 9 / 3 * layer.row());
      if (w != 0) (w > 0 ? taps[o].more : taps[o].less).push_back(offset);
    }
  }
  std::vector<uint8_t> planes(channels * 3 * layer.plane() + 4096), out(layer.outputs * layer.plane() + 4096);
  std::vector<uint8_t> bits(x.size() / 8 + 64);
  const double conversion = least_us([&] { to_planes(layer, x.data(), planes.data(), bits.data()); });
  const double products = least_us([&] { convolve(layer, taps, planes.data(), out.data()); });
  long wrong = 0;
  for (int o = 0; o < layer.outputs; ++o)
    for (int p = 0; p < side * side; ++p) {
      int total = 0;
      for (int k = 0; k < 9; ++k) {
        const int row = p / side + k / 3 - 1, column = p % side + k % 3 - 1;
        if (row < 0 || row >= side || column < 0 || column >= side) continue;
        for (int c = 0; c < channels; ++c)
          total += weights[(static_cast<size_t>(o) * channels + c) * 9 + k] * x[(row * side + column) * channels + c];
      }
      wrong += (out[o * layer.plane() + p / 8] >> (p % 8) & 1) != (total > taps[o].threshold);
    }
  std::printf("%3d to %3d, %2dx%2d: sums and thresholds %7.2f us, planes from codes %6.2f us, wrong bits %ld\n",
              channels, layer.outputs, side, side, products, conversion, wrong);
}

}  // namespace

int main(int argc, char** argv) {
  const double share = argc > 1 ? std::atof(argv[1]) : 0.125;  // of weights that are not zero
  const Layer layers[] = {{16, 16, 32},   {32, 32, 16},   {64, 64, 8},  {64, 64, 32},
                          {128, 128, 32}, {256, 256, 16}, {512, 512, 8}};
  for (const Layer& layer : layers) measure(layer, share);
}
