// The gradient of the input of kernels of 3x3, four products for six: the minimal filtering algorithm F(2, 3) of
// Winograd (Arithmetic Complexity of Computations, 1980) along rows, with AVX-512 BF16.
//
// Two neighbouring pixels and the four gradients d0..d3 that reach them are a tile. With h0, h1, h2 the weights of a
// kernel's row from its last column to its first, its pixels d0 h0 + d1 h1 + d2 h2, d1 h0 + d2 h1 + d3 h2 are
//   m0 + m1 + m2, m1 - m2 - m3 with m0 = (d0 - d2) h0, m1 = (d1 + d2) (h0 + h1 + h2) / 2,
//   m2 = (d2 - d1) (h0 - h1 + h2) / 2, m3 = (d1 - d3) h2.
// Each of the four products is summed over channels and kernel rows, two at a time in bfloat16, and the pixels are
// taken of the sums. Weights within kLargest have sums that bfloat16 holds; sums and differences of gradients are
// rounded to it once, as the gradients themselves were. Tiles of several rows lie one after the other, so that a
// kernel's row is one address away, and as many tiles as registers hold are computed together, whatever the width of
// the map.
#include "avx512bf16.h"
#include "gradient_plan.h"
#include "gradient_tile.h"
#include "gradient_weights.h"

namespace bitstrata {
namespace {

constexpr int kLanes = 16, kRows = 3, kTaps = 9, kProducts = 4;
constexpr int kWidths[] = {1, 4, 8, 11, 14, 16};
constexpr int kMostSums = 2 * 14;  // vectors of a product

struct TilesPlan {
  explicit TilesPlan(const ConvShape& shape)
      : s(shape),
        vectors((s.in_c + kLanes - 1) / kLanes),
        pairs((s.out_c - 1) % 16 < 8 ? 4 : 8),
        blocks((s.out_c + 2 * pairs - 1) / (2 * pairs)),
        tiles((s.in_w + 1) / 2) {}

  // Bytes of: a tile of a block of g's channels; a row of tiles; all rows of one block of one product.
  int64_t tile_bytes() const { return pairs * 4; }
  int64_t row_bytes() const { return tiles * tile_bytes(); }
  int64_t plane_bytes(int64_t rows) const { return (rows + kRows - 1) * row_bytes(); }
  // Bytes of the weights of one product and kernel row, for so many vectors of the input's channels.
  int64_t weight_row(int64_t count) const { return blocks * pairs * count * kLanes * 4; }
  int64_t vector_bytes() const { return kProducts * kRows * weight_row(1); }

  const ConvShape& s;
  int64_t vectors;  // of the input's channels
  int64_t pairs;    // of g's channels in a block
  int64_t blocks, tiles;
};

int64_t packed_bytes(const ConvShape& s) {
  const TilesPlan p(s);
  return p.vectors * p.vector_bytes();
}

int64_t pack_parts(const ConvShape& s) { return (TilesPlan(s).vectors + kVectors - 1) / kVectors; }

BITSTRATA_INLINE __m512 first_of(__m512i words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }
BITSTRATA_INLINE __m512 second_of(__m512i words) {
  return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-65536)));
}
// Of floats that bfloat16 holds.
BITSTRATA_INLINE __m512i words_of(__m512 first, __m512 second) {
  return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(first), 16), _mm512_castps_si512(second));
}

// The factors of a kernel's row, `next` words apart: pairs of weights of sixteen channels.
BITSTRATA_INLINE void weight_factors(__m512i h0, __m512i h1, __m512i h2, uint32_t* to, int64_t next) {
  const __m512 half = _mm512_set1_ps(0.5f), one = first_of(h1), two = second_of(h1);
  const __m512 ends[] = {_mm512_add_ps(first_of(h0), first_of(h2)), _mm512_add_ps(second_of(h0), second_of(h2))};
  const auto halved = [&](__m512 a, __m512 b) { return words_of(_mm512_mul_ps(a, half), _mm512_mul_ps(b, half)); };
  _mm512_storeu_si512(to, h0);
  _mm512_storeu_si512(to + next, halved(_mm512_add_ps(ends[0], one), _mm512_add_ps(ends[1], two)));
  _mm512_storeu_si512(to + 2 * next, halved(_mm512_sub_ps(ends[0], one), _mm512_sub_ps(ends[1], two)));
  _mm512_storeu_si512(to + 3 * next, h2);
}

// Packed: for each part [product][kernel row][block][pair][vector][lane][2].
void pack(const ConvShape& s, const int8_t* high, const int8_t* low, void* packed, int64_t part) {
  const TilesPlan p(s);
  const int64_t first = part * kVectors, count = smaller(kVectors, p.vectors - first);
  const int64_t channels = smaller(count * kLanes, s.in_c - first * kLanes);
  const int64_t row = p.weight_row(count) / 4, product = kRows * row;
  uint32_t* to = reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(packed) + first * p.vector_bytes());
  uint32_t words[kVectors * kLanes * kTaps];
  alignas(64) uint32_t taps[kTaps][kVectors * kLanes] = {};
  for (int64_t pair = 0; pair < p.blocks * p.pairs; ++pair, to += count * kLanes) {
    const int64_t even = (2 * pair * s.in_c + first * kLanes) * kTaps, odd = even + s.in_c * kTaps;
    if (2 * pair < s.out_c) {
      pair_words(high, low, even, 2 * pair + 1 < s.out_c ? odd : -1, channels * kTaps, words);
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t tap = 0; tap < kTaps; ++tap) taps[tap][c] = words[c * kTaps + tap];
    } else {
      std::memset(taps, 0, sizeof taps);
    }
    for (int64_t ky = 0; ky < kRows; ++ky)
      for (int64_t v = 0; v < count; ++v) {
        const auto at = [&](int64_t kx) { return _mm512_load_si512(taps[ky * kRows + kx] + v * kLanes); };
        weight_factors(at(2), at(1), at(0), to + ky * row + v * kLanes, product);
      }
  }
}

int64_t scratch_bytes(const ConvShape& s, int64_t rows) {
  const TilesPlan p(s);
  return kProducts * p.blocks * p.plane_bytes(rows);
}

// One row of g, in tiles, a plane for each product and block. row: null for zeros.
template <int kPairs>
void stage_row(const TilesPlan& p, const uint16_t* row, uint8_t* to, int64_t plane) {
  for (int64_t block = 0; block < p.blocks; ++block, to += plane) {
    const int64_t left = p.s.out_c - block * 2 * kPairs;
    const __mmask16 mask = static_cast<__mmask16>(left >= 2 * kPairs ? (1u << 2 * kPairs) - 1 : (1u << left) - 1);
    const auto column = [&](int64_t x) {
      if (row == nullptr || x < 0 || x >= p.s.out_w) return _mm512_setzero_ps();
      const __m256i g = _mm256_maskz_loadu_epi16(mask, row + x * p.s.out_c + block * 2 * kPairs);
      return first_of(_mm512_cvtepu16_epi32(g));
    };
    int64_t x = p.s.pad_left - 2;
    __m512 d0 = column(x), d1 = column(x + 1);
    for (int64_t t = 0; t < p.tiles; ++t) {
      const __m512 d2 = column(x += 2), d3 = column(x + 1);
      const auto put = [&](int64_t product, __m512 factor) {
        const __m256i narrow = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(factor));
        uint8_t* at = to + product * p.blocks * plane + t * kPairs * 4;
        if (kPairs == 8)
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), narrow);
        else
          _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm256_castsi256_si128(narrow));
      };
      put(0, _mm512_sub_ps(d0, d2));
      put(1, _mm512_add_ps(d1, d2));
      put(2, _mm512_sub_ps(d2, d1));
      put(3, _mm512_sub_ps(d1, d3));
      d0 = d2, d1 = d3;
    }
  }
}

// The sums of one product: [tile][vector][lane].
using RunTiles = void (*)(const Tile&, float* sums);
template <int kTiles, int kCount, int kPairs>
void run_tiles(const Tile& t, float* to) {
  __m512 sums[kTiles][kCount];
  sum_tile<kLanes, kPairs>(t, sums);
  each<kTiles>([&](auto p) BITSTRATA_BODY {
    each<kCount>([&](auto v) BITSTRATA_BODY { _mm512_store_ps(to + (p * kCount + v) * kLanes, sums[p][v]); });
  });
}

template <int kCount, int kPairs>
RunTiles tiles_of(int width) {
  switch (width) {
    case 1:
      return run_tiles<1, kCount, kPairs>;
    case 4:
      return run_tiles<4, kCount, kPairs>;
    case 8:
      return run_tiles<8, kCount, kPairs>;
    case 11:
      return run_tiles<11, kCount, kPairs>;
    case 14:
      return run_tiles<14, kCount, kPairs>;
    default:
      return run_tiles < kCount == 1 ? 16 : 14, kCount, kPairs > ;
  }
}

RunTiles tiles_of(int64_t pairs, int64_t count, int width) {
  if (pairs == 8) return count == 1 ? tiles_of<1, 8>(width) : tiles_of<2, 8>(width);
  return count == 1 ? tiles_of<1, 4>(width) : tiles_of<2, 4>(width);
}

// Pixels of `width` tiles from sums; out: row 0, at the first vector's channels.
void write_pixels(const TilesPlan& p, const float* sums, int width, int64_t count, int64_t first, uint32_t mask,
                  uint16_t* out) {
  const int64_t next = width * count * kLanes;
  for (int i = 0; i < width; ++i) {
    const int64_t x = (first + i) % p.tiles * 2;
    uint16_t* to = out + ((first + i) / p.tiles * p.s.in_w + x) * p.s.in_c;
    for (int64_t v = 0; v < count; ++v, sums += kLanes, to += kLanes) {
      const auto product = [&](int64_t m) { return _mm512_load_ps(sums + m * next); };
      const __m512 m1 = product(1), m2 = product(2);
      const uint32_t lanes = v + 1 < count ? 0xFFFF : mask;
      store_lanes<kLanes>(to, _mm512_add_ps(product(0), _mm512_add_ps(m1, m2)), lanes);
      if (x + 1 < p.s.in_w) store_lanes<kLanes>(to + p.s.in_c, _mm512_sub_ps(_mm512_sub_ps(m1, m2), product(3)), lanes);
    }
  }
}

void run(const ConvShape& s, const void* packed, const uint16_t* g, void* scratch, uint16_t* out, int64_t row_begin,
         int64_t row_end) {
  const TilesPlan p(s);
  uint8_t* staged = static_cast<uint8_t*>(scratch);
  const int64_t rows = row_end - row_begin, plane = p.plane_bytes(rows), tiles = rows * p.tiles;
  for (int64_t i = 0; i < rows + kRows - 1; ++i) {
    const int64_t y = row_begin + s.pad_top - (kRows - 1) + i;
    const uint16_t* row = y < 0 || y >= s.out_h ? nullptr : g + y * s.out_w * s.out_c;
    (p.pairs == 8 ? stage_row<8> : stage_row<4>)(p, row, staged + i * p.row_bytes(), plane);
  }
  alignas(64) float sums[kProducts * kMostSums * kLanes];
  out += row_begin * s.in_w * s.in_c;
  for (int64_t first = 0; first < p.vectors; first += kVectors) {
    const int64_t count = smaller(kVectors, p.vectors - first);
    const int width = width_of(kWidths, tiles, count);
    const RunTiles run_product = tiles_of(p.pairs, count, width);
    const uint8_t* weights = static_cast<const uint8_t*>(packed) + first * p.vector_bytes();
    const int64_t lanes = smaller(kLanes, s.in_c - (first + count - 1) * kLanes);
    Tap taps[kProducts][kRows];
    for (int64_t m = 0; m < kProducts; ++m)
      for (int64_t ky = 0; ky < kRows; ++ky)
        taps[m][ky] = {staged + m * p.blocks * plane + (kRows - 1 - ky) * p.row_bytes(),
                       weights + (m * kRows + ky) * p.weight_row(count)};
    for (int64_t done = 0; done < tiles; done += width) {
      const int64_t at = smaller(done, tiles - width);
      for (int64_t m = 0; m < kProducts; ++m)
        run_product({taps[m], kRows, p.blocks, plane, at * p.tile_bytes(), nullptr, 0, 0},
                    sums + m * width * count * kLanes);
      write_pixels(p, sums, width, count, at, (1u << lanes) - 1, out + first * kLanes);
    }
  }
}

}  // namespace

const InputGradientKernel kAvx512Bf16TilesInputGradient = {"avx512bf16-tiles", packed_bytes, pack_parts, pack,
                                                           scratch_bytes,      run};

}  // namespace bitstrata
