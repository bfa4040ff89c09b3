// Convolution by Winograd's F(2, 3) with AVX-512 VNNI.
#include <immintrin.h>

#include "../common/winograd_conv.h"
#include "avx512vnni.h"
#include "results.h"
#include "set_packer.h"
#include "steps.h"

namespace bitstrata {
namespace {

constexpr int kMostTiles = 8;  // of a block, at most: their window's addresses fill the general registers

struct Zmm {
  using Vector = __m512i;
};
template <typename Out>
using Block = WinogradBlock<Zmm, Results<Out>>;

// Sums of products of a block.
template <int kP, int kV>
struct Sums {
  __m512i even(int i, int j, __m512i first) const { return halved(first, at[1][i][j], at[2][i][j], at[0][i][j]); }
  __m512i odd(int i, int j, __m512i first) const {
    return halved(_mm512_sub_epi32(first, at[2][i][j]), at[1][i][j], at[3][i][j], _mm512_setzero_si512());
  }
  static __m512i halved(__m512i a, __m512i b, __m512i c, __m512i d) {
    return _mm512_srai_epi32(_mm512_add_epi32(_mm512_add_epi32(a, b), _mm512_add_epi32(c, d)), 1);
  }
  __m512i at[kPositions][kP][kV];
};

template <int kP, int kV, typename Out>
void convolve(const Block<Out>& b) {
  Sums<kP, kV> sums;
  const __m512i *w = b.weights, *ahead = b.ahead;
  for (int64_t position = 0; position < kPositions; ++position) {
    __m512i sum[kP][kV];
    each<kP>([&](auto i) { each<kV>([&](auto j) { sum[i][j] = _mm512_setzero_si512(); }); });
    for (int64_t row = 0; row < b.kernel_h; ++row) {
      const int64_t at = position * b.lanes + row * b.row_step;
      each<kP>([&](auto i) { __builtin_prefetch(b.window[i] + at + b.lanes); });  // of the next position
      multiply_run<kP, kV>(b.window, at, b.lanes, w, ahead, sum);
    }
    each<kP>([&](auto i) { each<kV>([&](auto j) { sums.at[position][i][j] = sum[i][j]; }); });
  }
  const int64_t last = b.channels - (kV - 1) * kLanes;
  const __mmask16 mask = static_cast<__mmask16>((1u << last) - 1);
  each<kV>([&](auto j) {
    const __m512i even = _mm512_loadu_si512(b.even + j * kLanes), odd = _mm512_loadu_si512(b.odd + j * kLanes);
    b.out.template vector<j == kV - 1>(j, mask, [&](const auto& store) {
      for (int i = 0; i < kP; ++i) {
        store(b.pixel[i], sums.even(i, j, even));
        if (b.whole[i]) store(b.pixel[i] + 1, sums.odd(i, j, odd));
      }
    });
  });
}

template <typename Out>
using BlockFn = void (*)(const Block<Out>&);
template <int kV, typename Out>
constexpr BlockFn<Out> kBlocks[kMostTiles] = {convolve<1, kV, Out>, convolve<2, kV, Out>, convolve<3, kV, Out>,
                                              convolve<4, kV, Out>, convolve<5, kV, Out>, convolve<6, kV, Out>,
                                              convolve<7, kV, Out>, convolve<8, kV, Out>};
template <typename Out>
constexpr const BlockFn<Out>* kBySet[kVectors] = {kBlocks<1, Out>, kBlocks<2, Out>, kBlocks<3, Out>, kBlocks<4, Out>};

// Codes are packed with position kx of a row in the place of tap kx, and then made what belongs there.
template <typename Packed>
void pack_set(const ConvShape& s, const Packed& p, const WeightCodes& codes, const uint8_t* factor, int64_t set,
              uint8_t* weights, int32_t* even, int32_t* odd) {
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
  const int64_t of_position = p.steps * vectors;
  // Inputs that fill a step up are 0 without an offset: what weights they have matters not, but for the corrections.
  const int64_t real = s.in_c % kStep == 0 ? kStep : s.in_c % kStep;
  const __m512i last = _mm512_set1_epi32(static_cast<int32_t>(0x01010101u >> (8 * (kStep - real))));
  for (int64_t v = 0; v < vectors; ++v) {
    __m512i sum[kPositions];
    each<kPositions>([&](auto k) { sum[k] = _mm512_setzero_si512(); });
    for (int64_t step = 0; step < p.steps; ++step) {
      __m512i* to = at + step * vectors + v;
      const __m512i g0 = weight(to[0]), g1 = weight(to[of_position]), g2 = weight(to[2 * of_position]);
      const __m512i both = _mm512_add_epi8(g0, g2);
      const __m512i made[kPositions] = {_mm512_add_epi8(g0, g0), _mm512_add_epi8(both, g1), _mm512_sub_epi8(both, g1),
                                        _mm512_sub_epi8(_mm512_setzero_si512(), _mm512_add_epi8(g2, g2))};
      const __m512i counted = step % p.row_steps == p.row_steps - 1 ? last : ones;
      each<kPositions>([&](auto k) {
        _mm512_store_si512(to + k * of_position, made[k]);
        sum[k] = _mm512_dpbusd_epi32(sum[k], counted, made[k]);
      });
    }
    const WinogradOffsets offset(s);
    const __m512i by = _mm512_set1_epi32(-offset.difference);
    const __m512i m1 = _mm512_mullo_epi32(sum[1], _mm512_set1_epi32(-offset.sum)), m2 = _mm512_mullo_epi32(sum[2], by);
    _mm512_storeu_si512(even + v * kLanes, _mm512_add_epi32(_mm512_add_epi32(m1, m2), _mm512_mullo_epi32(sum[0], by)));
    _mm512_storeu_si512(odd + v * kLanes, _mm512_add_epi32(_mm512_sub_epi32(m1, m2), _mm512_mullo_epi32(sum[3], by)));
  }
}

template <typename Results>
struct OutOf;
template <typename Out>
struct OutOf<Results<Out>> {
  using Type = Out;
};

struct Vnni512 {
  static constexpr int64_t kLanes = bitstrata::kLanes, kVectors = bitstrata::kVectors;
  using Registers = Zmm;
  // With the sums of its vectors, the weights and one broadcast in 32 registers.
  static int64_t tiles_of(int64_t vectors) { return vectors == kVectors ? 6 : kMostTiles; }
  template <typename R>
  static BlockFn<typename OutOf<R>::Type> block(int64_t vectors, int64_t tiles) {
    return kBySet<typename OutOf<R>::Type>[vectors - 1][tiles - 1];
  }
  static constexpr auto pack_set = bitstrata::pack_set<WinogradPacked<Vnni512>>;
  static int64_t chunk(const ConvShape&, const WinogradPacked<Vnni512>&, const int8_t*) { return 0; }
};

using Conv = WinogradConv<Vnni512>;

void run(const ConvShape& s, const void* packed, const void* staged, int32_t* out, int64_t row_begin, int64_t row_end) {
  Conv::run_to<Results<int32_t>>(s, packed, staged, {out, s.out_c}, row_begin, row_end);
}

void run_codes(const ConvShape& s, const void* packed, const void* staged, const RequantArgs& requant, uint8_t* out,
               int64_t row_begin, int64_t row_end) {
  Conv::run_to<Results<uint8_t>>(s, packed, staged, {out, s.out_c, &requant, 0}, row_begin, row_end);
}

}  // namespace

bool avx512vnni_winograd_fits(const ConvShape& s) { return winograd_fits(s); }

// With fewer channels, transforming inputs and sums takes what the products gain: from measurements on Zen 5.
bool avx512vnni_winograd_pays(const ConvShape& s) {
  return winograd_fits(s) && s.out_w > 3 && s.in_c > 32 && s.out_c > 32;
}

extern const ConvKernel kAvx512VnniWinograd = {"avx512vnni-winograd",
                                               Conv::packed_bytes,
                                               Conv::pack,
                                               Conv::staged_row_bytes,
                                               Conv::stage,
                                               run,
                                               Conv::pack_parts,
                                               Conv::pack_part,
                                               nullptr,
                                               run_codes,
                                               winograd_passes};

}  // namespace bitstrata
