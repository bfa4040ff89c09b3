// The weight gradient of kernels of 3x3, four products for six: the minimal filtering algorithm F(3, 2) of Winograd
// (Arithmetic Complexity of Computations, 1980) along rows, with AVX-512 BF16.
//
// Two neighbouring gradients g0, g1 and the four codes d0..d3 that they meet are a tile. Its three taps d0 g0 + d1 g1,
// d1 g0 + d2 g1, d2 g0 + d3 g1 are
//   m0 + m1 + m2, m1 - m2, m1 + m2 + m3 with m0 = (d0 - d2) g0, m1 = (d1 + d2) (g0 + g1) / 2,
//   m2 = (d2 - d1) (g0 - g1) / 2, m3 = (d3 - d1) g1.
// Each of the four products m is summed over all tiles, two at a time in bfloat16, and the taps are taken of the sums.
// Codes within -128..128 have sums and differences that bfloat16 holds; sums and differences of gradients are rounded
// to it once, as the gradients themselves were.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "../common/unroll.h"
#include "avx512bf16.h"

namespace bitstrata {
namespace {

constexpr int kLanes = 16, kOuts = 8, kRows = 3, kTaps = 9, kProducts = 4;
constexpr int64_t kTile = 4;  // output positions of a step, which are two tiles
constexpr int64_t kVectorBytes = 64, kGradientBytes = kOuts * 4, kBlock = kOuts * kLanes;

// Lanes are input channels. Sums are [vector][panel of outputs][product][kernel row][output][lane]; packed codes
// [vector][product][image][row][step], packed gradients [panel][product][image][row][step].
struct Plan {
  Plan(const ConvShape& s, int64_t images, int64_t rows)
      : vectors((s.in_c + kLanes - 1) / kLanes),
        panels((s.out_c + kOuts - 1) / kOuts),
        panel_sums(kProducts * kRows * kBlock),
        sums(vectors * panels * panel_sums),
        steps((s.out_w + kTile - 1) / kTile),
        positions(steps * kTile),
        in_rows(rows + kRows - 1),
        x_image(in_rows * steps),
        g_image(rows * steps),
        x_product(images * x_image),
        g_product(images * g_image),
        g_at(vectors * kProducts * x_product * kVectorBytes),
        row_at(g_at + panels * kProducts * g_product * kGradientBytes),
        bytes(row_at + std::max((positions + 2) * vectors * kLanes, positions * panels * kOuts * 2)) {}
  int64_t vectors, panels, panel_sums, sums;
  int64_t steps, positions, in_rows, x_image, g_image, x_product, g_product;
  int64_t g_at, row_at, bytes;
};

int64_t sums(const ConvShape& s) { return Plan(s, 1, 1).sums; }
int64_t scratch_bytes(const ConvShape& s, int64_t images, int64_t rows) { return Plan(s, images, rows).bytes; }

struct Call {
  Call(const ConvShape& s, const WeightGradBlock& b, uint8_t* scratch)
      : s(s),
        b(b),
        plan(s, b.images, b.row_end - b.row_begin),
        xs(scratch),
        gs(xs + plan.g_at),
        row(xs + plan.row_at) {}
  const ConvShape& s;
  const WeightGradBlock& b;
  Plan plan;
  uint8_t *xs, *gs, *row;
};

BITSTRATA_INLINE __m256i load_codes(const uint8_t* from, bool is_signed) {
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return is_signed ? _mm256_cvtepi8_epi16(codes) : _mm256_cvtepu8_epi16(codes);
}
// Of these floats' bits the lower 16 are 0.
BITSTRATA_INLINE __m512i floats(__m256i x) { return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(x))); }
BITSTRATA_INLINE void store_pair(uint8_t* to, __m256i first, __m256i second) {
  _mm512_store_si512(to, _mm512_or_si512(_mm512_srli_epi32(floats(first), 16), floats(second)));
}

// The four factors of a tile's codes.
BITSTRATA_INLINE void code_factors(const __m256i* d, __m256i* factors) {
  factors[0] = _mm256_sub_epi16(d[0], d[2]);
  factors[1] = _mm256_add_epi16(d[1], d[2]);
  factors[2] = _mm256_sub_epi16(d[2], d[1]);
  factors[3] = _mm256_sub_epi16(d[3], d[1]);
}

// A padded row, positions `pitch` bytes apart, that can be read beyond its end.
void pack_row(const Plan& p, const uint8_t* from, int64_t pitch, bool is_signed, uint8_t* to) {
  const int64_t next = p.x_product * kVectorBytes;
  for (int64_t v = 0; v < p.vectors; ++v, from += kLanes, to += kProducts * next)
    for (int64_t step = 0; step < p.steps; ++step) {
      const uint8_t* at = from + step * kTile * pitch;
      __m256i d[6], a[kProducts], b[kProducts];
      each<6>([&](auto i) { d[i] = load_codes(at + i * pitch, is_signed); });
      code_factors(d, a);
      code_factors(d + 2, b);
      each<kProducts>([&](auto m) { store_pair(to + m * next + step * kVectorBytes, a[m], b[m]); });
    }
}

void pack_codes(const Call& c, const uint8_t* x) {
  const ConvShape& s = c.s;
  const Plan& p = c.plan;
  const int64_t pitch = s.in_c, first = s.pad_left, copied = std::min(s.in_w, p.positions + 2 - first);
  std::memset(c.row, 0, static_cast<size_t>((p.positions + 2) * p.vectors * kLanes));
  for (int64_t image = 0; image < c.b.images; ++image)
    for (int64_t r = 0; r < p.in_rows; ++r) {
      const int64_t y = c.b.row_begin + r - s.pad_top;
      uint8_t* to = c.xs + (image * p.x_image + r * p.steps) * kVectorBytes;
      if (y < 0 || y >= s.in_h) {
        for (int64_t i = 0; i < p.vectors * kProducts; ++i)
          std::memset(to + i * p.x_product * kVectorBytes, 0, static_cast<size_t>(p.steps * kVectorBytes));
        continue;
      }
      if (copied > 0)
        std::memcpy(c.row + first * pitch, x + (image * s.in_h + y) * s.in_w * s.in_c,
                    static_cast<size_t>(copied * pitch));
      pack_row(p, c.row, pitch, s.input_dtype == DType::s8, to);
    }
}

BITSTRATA_INLINE __m256 wide(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
BITSTRATA_INLINE __m128i narrow(__m256 x) { return (__m128i)_mm256_cvtneps_pbh(x); }
BITSTRATA_INLINE void store_outs(uint8_t* to, __m128i first, __m128i second) {
  _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi16(first, second));
  _mm_store_si128(reinterpret_cast<__m128i*>(to) + 1, _mm_unpackhi_epi16(first, second));
}

// One step of a panel: gradients at four positions, `pitch` elements apart.
BITSTRATA_INLINE void pack_outs(const uint16_t* from, int64_t pitch, uint8_t* to, int64_t next) {
  __m128i g[kTile];
  __m256 f[kTile];
  each<kTile>([&](auto i) {
    g[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * pitch));
    f[i] = wide(g[i]);
  });
  store_outs(to, g[0], g[2]);
  store_outs(to + next, narrow(_mm256_add_ps(f[0], f[1])), narrow(_mm256_add_ps(f[2], f[3])));
  store_outs(to + 2 * next, narrow(_mm256_sub_ps(f[0], f[1])), narrow(_mm256_sub_ps(f[2], f[3])));
  store_outs(to + 3 * next, g[1], g[3]);
}

void pack_gradient(const Call& c, const uint16_t* g, int64_t panel_begin, int64_t panel_end) {
  const ConvShape& s = c.s;
  const Plan& p = c.plan;
  const int64_t next = p.g_product * kGradientBytes, padded = p.panels * kOuts;
  const bool whole = s.out_w == p.positions && s.out_c == padded;
  uint16_t* copy = reinterpret_cast<uint16_t*>(c.row);
  if (!whole) std::memset(copy, 0, static_cast<size_t>(p.positions * padded * 2));
  for (int64_t image = 0; image < c.b.images; ++image)
    for (int64_t y = c.b.row_begin; y < c.b.row_end; ++y) {
      const uint16_t* row = g + (image * s.out_h + y) * s.out_w * s.out_c;
      if (!whole) std::memcpy(copy, row, static_cast<size_t>(s.out_w * s.out_c * 2));
      const uint16_t* from = whole ? row : copy;
      uint8_t* to = c.gs + (image * p.g_image + (y - c.b.row_begin) * p.steps) * kGradientBytes;
      for (int64_t panel = panel_begin; panel < panel_end; ++panel)
        for (int64_t step = 0; step < p.steps; ++step)
          pack_outs(from + step * kTile * s.out_c + panel * kOuts, s.out_c,
                    to + panel * kProducts * next + step * kGradientBytes, next);
    }
}

// One product of a vector with a panel, for all kernel rows.
void block(const Call& c, int64_t vector, int64_t panel, int64_t product, float* sums, bool fresh) {
  const Plan& p = c.plan;
  const int64_t next = p.steps * kVectorBytes;
  const uint8_t* x = c.xs + (vector * kProducts + product) * p.x_product * kVectorBytes;
  const uint8_t* g = c.gs + (panel * kProducts + product) * p.g_product * kGradientBytes;
  __m512 sum[kOuts][kRows];
  each<kOuts>([&](auto o) { each<kRows>([&](auto r) { sum[o][r] = _mm512_setzero_ps(); }); });
  for (int64_t image = 0; image < c.b.images; ++image) {
    const uint8_t *codes = x + image * p.x_image * kVectorBytes, *gradient = g + image * p.g_image * kGradientBytes;
    for (int64_t step = 0; step < p.g_image; ++step, codes += kVectorBytes, gradient += kGradientBytes) {
      __m512 a[kRows];
      each<kRows>([&](auto r) { a[r] = _mm512_load_ps(codes + r * next); });
      each<kOuts>([&](auto o) {
        float two;
        std::memcpy(&two, gradient + o * 4, 4);
        const __m512 b = _mm512_set1_ps(two);
        each<kRows>([&](auto r) { sum[o][r] = _mm512_dpbf16_ps(sum[o][r], (__m512bh)a[r], (__m512bh)b); });
      });
    }
  }
  float* to = sums + (vector * p.panels + panel) * p.panel_sums + product * kRows * kBlock;
  each<kOuts>([&](auto o) {
    each<kRows>([&](auto r) {
      float* at = to + r * kBlock + o * kLanes;
      _mm512_storeu_ps(at, fresh ? sum[o][r] : _mm512_add_ps(_mm512_loadu_ps(at), sum[o][r]));
    });
  });
}

void add(const ConvShape& s, const void* x, const uint16_t* g, const WeightGradBlock& b, void* scratch, float* sums,
         bool fresh) {
  const Call c(s, b, static_cast<uint8_t*>(scratch));
  const int64_t begin = b.out_begin / kOuts, end = (b.out_end + kOuts - 1) / kOuts;
  pack_codes(c, static_cast<const uint8_t*>(x));
  pack_gradient(c, g, begin, end);
  for (int64_t vector = 0; vector < c.plan.vectors; ++vector)
    for (int64_t product = 0; product < kProducts; ++product)
      for (int64_t panel = begin; panel < end; ++panel) block(c, vector, panel, product, sums, fresh);
}

// The taps of kLanes input channels and one output; from: the sums of product 0 and kernel row 0.
BITSTRATA_INLINE void read_taps(const float* from, __m512 (&taps)[kTaps]) {
  const __m512 half = _mm512_set1_ps(0.5f);
  each<kRows>([&](auto ky) {
    const auto product = [&](int m) { return _mm512_loadu_ps(from + (m * kRows + ky) * kBlock); };
    const __m512 m1 = _mm512_mul_ps(product(1), half), m2 = _mm512_mul_ps(product(2), half),
                 both = _mm512_add_ps(m1, m2);
    taps[ky * 3] = _mm512_add_ps(product(0), both);
    taps[ky * 3 + 1] = _mm512_sub_ps(m1, m2);
    taps[ky * 3 + 2] = _mm512_add_ps(both, product(3));
  });
}

const float* sums_of(const Plan& p, const float* sums, int64_t out, int64_t vector) {
  return sums + (vector * p.panels + out / kOuts) * p.panel_sums + out % kOuts * kLanes;
}

void read(const ConvShape& s, const float* sums, const WeightBlock& b, float* rows, int64_t pitch, bool fresh) {
  const Plan p(s, 1, 1);
  alignas(64) float found[kTaps][kLanes];
  for (int64_t o = b.out_begin; o < b.out_end; ++o, rows += pitch)
    for (int64_t v = b.in_begin / kLanes; v * kLanes < b.in_end; ++v) {
      __m512 taps[kTaps];
      read_taps(sums_of(p, sums, o, v), taps);
      each<kTaps>([&](auto tap) { _mm512_store_ps(found[tap], taps[tap]); });
      const int64_t first = std::max(v * kLanes, b.in_begin), last = std::min((v + 1) * kLanes, b.in_end);
      float* to = rows + (first - b.in_begin) * kTaps;
      for (int64_t i = first - v * kLanes; i < last - v * kLanes; ++i, to += kTaps)
        each<kTaps>([&](auto tap) { to[tap] = fresh ? found[tap][i] : to[tap] + found[tap][i]; });
    }
}

void read_last(const ConvShape& s, const float* sums, int64_t out_begin, int64_t out_end, float* rows, bool fresh) {
  const Plan p(s, 1, 1);
  for (int64_t o = out_begin; o < out_end; ++o, rows += kTaps * s.in_c)
    for (int64_t v = 0; v < p.vectors; ++v) {
      __m512 taps[kTaps];
      read_taps(sums_of(p, sums, o, v), taps);
      const int64_t left = s.in_c - v * kLanes;
      const __mmask16 mask = static_cast<__mmask16>(left >= kLanes ? 0xFFFF : (1u << left) - 1);
      each<kTaps>([&](auto tap) {
        float* to = rows + tap * s.in_c + v * kLanes;
        if (!fresh) taps[tap] = _mm512_add_ps(taps[tap], _mm512_maskz_loadu_ps(mask, to));
        if (left >= kLanes)  // stores with a mask take long
          _mm512_storeu_ps(to, taps[tap]);
        else
          _mm512_mask_storeu_ps(to, mask, taps[tap]);
      });
    }
}

}  // namespace

const FloatWeightGradKernel kAvx512Bf16TilesWeightGrad = {"avx512bf16-tiles", kOuts, sums, scratch_bytes, add, read,
                                                          read_last};

}  // namespace bitstrata
