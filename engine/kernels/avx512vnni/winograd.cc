// Convolution by Winograd's F(2, 3) and F(4, 3) with AVX-512 VNNI.
#include <immintrin.h>

#include "../common/winograd_conv.h"
#include "avx512vnni.h"
#include "results.h"
#include "set_packer.h"
#include "steps.h"

namespace bitstrata {
namespace {

constexpr int kMostTiles = 8;  // of a block, at most: their window's addresses fill the general registers
constexpr int kMostSums = 24;  // of a block's position: with the weights and one broadcast in 32 registers

struct Zmm {
  using Vector = __m512i;
};

struct Ops16 {
  using Vector = __m512i;
  static __m512i add(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }
  static __m512i sub(__m512i a, __m512i b) { return _mm512_sub_epi32(a, b); }
  static __m512i mul(__m512i a, uint32_t b) { return _mm512_mullo_epi32(a, _mm512_set1_epi32(static_cast<int>(b))); }
  static __m512i left(__m512i a, unsigned places) { return _mm512_slli_epi32(a, places); }
  static __m512i right(__m512i a, unsigned places) { return _mm512_srai_epi32(a, places); }
};

// The products of a block's positions: sums [position][tile][vector]. What becomes of them is not part of it, so that
// it is there once for both forms and all results.
template <int kP, int kV>
void multiply_positions(const WinogradProducts<Zmm>& b, int64_t positions, __m512i* sums) {
  const __m512i *w = b.weights, *ahead = b.ahead;
  for (int64_t position = 0; position < positions; ++position, sums += kP * kV) {
    __m512i sum[kP][kV];
    each<kP>([&](auto i) { each<kV>([&](auto j) { sum[i][j] = _mm512_setzero_si512(); }); });
    for (int64_t row = 0; row < b.kernel_h; ++row) {
      const int64_t at = position * b.lanes + row * b.row_step;
      each<kP>([&](auto i) { __builtin_prefetch(b.window[i] + at + b.lanes); });  // of the next position
      multiply_run<kP, kV>(b.window, at, b.lanes, w, ahead, sum);
    }
    each<kP>([&](auto i) { each<kV>([&](auto j) { _mm512_store_si512(sums + i * kV + j, sum[i][j]); }); });
  }
}

using MultiplyFn = void (*)(const WinogradProducts<Zmm>&, int64_t, __m512i*);
template <int kV>
constexpr MultiplyFn kByTiles[kMostTiles] = {
    multiply_positions<1, kV>, multiply_positions<2, kV>, multiply_positions<3, kV>, multiply_positions<4, kV>,
    multiply_positions<5, kV>, multiply_positions<6, kV>, multiply_positions<7, kV>, multiply_positions<8, kV>};
constexpr const MultiplyFn* kBySet[kVectors] = {kByTiles<1>, kByTiles<2>, kByTiles<3>, kByTiles<4>};

template <typename Form, typename Results>
struct BlockOf {
  int64_t vectors, tiles;

  void operator()(const WinogradBlock<Zmm, Results>& b) const {
    alignas(64) __m512i sums[Form::kPositions * kMostSums];
    kBySet[vectors - 1][tiles - 1](b, Form::kPositions, sums);
    for (int64_t j = 0; j + 1 < vectors; ++j) finish<false>(b, j, sums);
    finish<true>(b, vectors - 1, sums);
  }

 private:
  template <bool kLast>
  void finish(const WinogradBlock<Zmm, Results>& b, int64_t j, const __m512i* sums) const {
    const __mmask16 mask = kLast ? static_cast<__mmask16>((1u << (b.channels - j * kLanes)) - 1) : 0xFFFF;
    __m512i correction[Form::kOutputs];
    each<Form::kOutputs>([&](auto k) { correction[k] = _mm512_loadu_si512(b.correction + k * b.pitch + j * kLanes); });
    b.out.template vector<kLast>(j, mask, [&](const auto& store) {
      for (int64_t i = 0; i < tiles; ++i) {
        __m512i m[Form::kPositions], y[Form::kOutputs];
        each<Form::kPositions>([&](auto position) { m[position] = sums[(position * tiles + i) * vectors + j]; });
        winograd_outputs(Ops16(), m, correction, y);
        each<Form::kOutputs>([&](auto k) {
          if (k < b.outputs[i]) store(b.pixel[i] + k, y[k]);
        });
      }
    });
  }
};

// A position's weights from those of taps, in bytes.
template <typename Form, int kPosition>
BITSTRATA_INLINE __m512i of_position(const __m512i (&g)[kWinogradTaps]) {
  __m512i sum = _mm512_setzero_si512();
  each<kWinogradTaps>([&](auto k) {
    constexpr int32_t kFactor = Form::kWeight[kPosition][k], kTimes = kFactor < 0 ? -kFactor : kFactor;
    static_assert(kTimes == 0 || kTimes == 1 || kTimes == 2 || kTimes == 4);
    __m512i x = g[k];
    for (int32_t times = kTimes; times > 1; times /= 2) x = _mm512_add_epi8(x, x);
    if constexpr (kTimes != 0) sum = kFactor < 0 ? _mm512_sub_epi8(sum, x) : _mm512_add_epi8(sum, x);
  });
  return sum;
}

// Codes are packed with position kx of a row in the place of tap kx, and then made what belongs there.
template <typename Packed>
void pack_set(const ConvShape& s, const Packed& p, const WeightCodes& codes, const uint8_t* factor, int64_t set,
              uint8_t* weights, int32_t* correction, int64_t pitch) {
  using Form = typename Packed::Form;
  const int64_t first = p.first_vector(set), vectors = p.first_vector(set + 1) - first;
  __m512i* at = reinterpret_cast<__m512i*>(weights);
  SetPacker(s, codes, factor, {0, first, vectors, p.row_steps, 1, s.kernel_h}, at).pack();
  const __m512i ones = _mm512_set1_epi8(1);
  const __m512i mul = _mm512_set1_epi16(static_cast<int16_t>(s.mul & 255)),
                add = _mm512_set1_epi8(static_cast<char>(s.add));
  const auto weight = [&](const __m512i& from) {
    const __m512i code = _mm512_load_si512(&from);
    if (s.mul == 1 && s.add == 0) return code;
    const __m512i low = _mm512_mullo_epi16(code, mul), high = _mm512_mullo_epi16(_mm512_srli_epi16(code, 8), mul);
    return _mm512_add_epi8(_mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaa, low, _mm512_slli_epi16(high, 8)), add);
  };
  const int64_t apart = p.steps * vectors;  // positions
  // Inputs that fill a step up are 0 without an offset: what weights they have matters not, but for the corrections.
  const int64_t real = s.in_c % kStep == 0 ? kStep : s.in_c % kStep;
  const __m512i last = _mm512_set1_epi32(static_cast<int32_t>(0x01010101u >> (8 * (kStep - real))));
  const WinogradCorrections<Form> corrections(s);
  for (int64_t v = 0; v < vectors; ++v) {
    __m512i sum[Form::kPositions];
    each<Form::kPositions>([&](auto k) { sum[k] = _mm512_setzero_si512(); });
    for (int64_t step = 0; step < p.steps; ++step) {
      __m512i* to = at + step * vectors + v;
      const __m512i g[kWinogradTaps] = {weight(to[0]), weight(to[apart]), weight(to[2 * apart])};
      const __m512i counted = step % p.row_steps == p.row_steps - 1 ? last : ones;
      each<Form::kPositions>([&](auto k) {
        const __m512i made = of_position<Form, k>(g);
        _mm512_store_si512(to + k * apart, made);
        sum[k] = _mm512_dpbusd_epi32(sum[k], counted, made);
      });
    }
    each<Form::kOutputs>([&](auto y) {
      __m512i total = _mm512_setzero_si512();
      each<Form::kPositions>([&](auto k) {
        const __m512i by = _mm512_set1_epi32(corrections.factor[y][k]);
        total = _mm512_add_epi32(total, _mm512_mullo_epi32(sum[k], by));
      });
      _mm512_storeu_si512(correction + y * pitch + v * kLanes, total);
    });
  }
}

template <typename F>
struct Vnni512 {
  using Form = F;
  static constexpr int64_t kLanes = bitstrata::kLanes, kVectors = bitstrata::kVectors;
  using Registers = Zmm;
  static int64_t tiles_of(int64_t vectors) { return vectors == kVectors ? kMostSums / kVectors : kMostTiles; }
  template <typename R>
  static BlockOf<Form, R> block(int64_t vectors, int64_t tiles) {
    return {vectors, tiles};
  }
  static constexpr auto pack_set = bitstrata::pack_set<WinogradPacked<Vnni512>>;
  static int64_t chunk(const ConvShape&, const WinogradPacked<Vnni512>&, const int8_t*) { return 0; }
};

template <typename Form>
using Conv = WinogradConv<Vnni512<Form>>;

template <typename Form>
void run(const ConvShape& s, const void* packed, const void* staged, int32_t* out, int64_t row_begin, int64_t row_end) {
  Conv<Form>::template run_to<Results<int32_t>>(s, packed, staged, {out, s.out_c}, row_begin, row_end);
}

template <typename Form>
void run_codes(const ConvShape& s, const void* packed, const void* staged, const RequantArgs& requant, uint8_t* out,
               int64_t row_begin, int64_t row_end) {
  Conv<Form>::template run_to<Results<uint8_t>>(s, packed, staged, {out, s.out_c, &requant, 0}, row_begin, row_end);
}

template <typename Form>
constexpr ConvKernel kernel(const char* name) {
  using Conv = bitstrata::Conv<Form>;
  ConvKernel made{name, Conv::packed_bytes, Conv::pack, Conv::staged_row_bytes, Conv::stage, run<Form>};
  made.pack_parts = Conv::pack_parts;
  made.pack_part = Conv::pack_part;
  made.run_codes = run_codes<Form>;
  made.passes = winograd_passes<Form>;
  return made;
}

constexpr double kMostOfTwo = 0.93;  // as of the 256-bit row

}  // namespace

bool avx512vnni_winograd_fits(const ConvShape& s) { return winograd_fits<TwoOutputs>(s); }
bool avx512vnni_winograd_four_fits(const ConvShape& s) { return winograd_fits<FourOutputs>(s); }

// With fewer channels, transforming inputs and sums takes what the products gain: from measurements on Zen 5.
bool avx512vnni_winograd_pays(const ConvShape& s) {
  return winograd_fits<TwoOutputs>(s) && s.out_w > 3 && s.in_c > 32 && s.out_c > 32;
}
bool avx512vnni_winograd_four_pays(const ConvShape& s) {
  return winograd_fits<FourOutputs>(s) && s.in_c > 32 && s.out_c > 32 &&
         winograd_passes<FourOutputs>(s) < kMostOfTwo * winograd_passes<TwoOutputs>(s);
}

extern const ConvKernel kAvx512VnniWinograd = kernel<TwoOutputs>("avx512vnni-winograd");
extern const ConvKernel kAvx512VnniWinogradFour = kernel<FourOutputs>("avx512vnni-winograd-four");

}  // namespace bitstrata
