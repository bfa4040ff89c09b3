// Convolution of few input channels by seven columns with stride 2, as networks begin with, on AVX2: pairs of int16
// products at less than half of the positions; see ../common/strided_winograd.h for what is computed.
#include <immintrin.h>

#include <cstring>

#include "../common/store_lanes.h"
#include "../common/strided_winograd.h"
#include "../common/unroll.h"
#include "avx2.h"
#include "steps.h"

namespace bitstrata {
namespace {

constexpr int kLanes = 8;            // output channels of a vector
constexpr int kVectors = 2;          // of a set, at most
constexpr int kTiles = 5;            // of a block: with two vectors, ten sums and a few temporaries fill the registers
constexpr int64_t kGroup = 60;       // tiles convolved with all weights in turn
constexpr int64_t kPairs = 16;       // int16 of a vector of weights
constexpr double kMostPasses = 0.6;  // above, transforming takes what the products gain: maps too narrow for tiles
constexpr uint8_t kSign = 0x80;      // what makes signed codes unsigned, 128 larger

// Sizes and positions of everything that is packed: int32 correction[vectors * kLanes]; pad codes, four bytes; weights
// [set][position][row of the kernel][step][vector of the set][lane][2] in 16 bits.
struct Packed {
  explicit Packed(const ConvShape& s)
      : rows(s),
        vectors((s.out_c + kLanes - 1) / kLanes),
        sets((vectors + kVectors - 1) / kVectors),
        steps(s.kernel_h * (kStemShared * rows.channels + rows.pairs)),
        pad_at(vectors * kLanes * 4),
        weights_at((pad_at + 4 + 63) / 64 * 64),
        bytes(weights_at + vectors * steps * 32) {}
  int64_t first_vector(int64_t set) const { return set * vectors / sets; }

  StemRows rows;
  int64_t vectors, sets, steps;
  int64_t pad_at, weights_at, bytes;
};

int64_t packed_bytes(const ConvShape& s) { return Packed(s).bytes; }
int64_t staged_row_bytes(const ConvShape& s) { return Packed(s).rows.bytes; }
uint8_t flip(const ConvShape& s) { return s.input_dtype == DType::s8 ? kSign : 0; }

// One output channel's weights: at `lane` of its vector, `pitch` int16 from step to step. Returns their sum.
int32_t pack_channel(const ConvShape& s, const Packed& p, const int8_t* codes, int64_t pitch, int16_t* lane) {
  int32_t total = 0;
  for (int64_t c = 0; c < s.in_c; ++c)
    for (int64_t ky = 0; ky < s.kernel_h; ++ky) {
      int32_t g[kStemTaps];
      for (int64_t kx = 0; kx < kStemTaps; ++kx) {
        g[kx] = s.mul * codes[(c * s.kernel_h + ky) * kStemTaps + kx] + s.add;
        total += g[kx];
      }
      for (int position = 0; position < kStemPositions; ++position)
        for (int odd = 0; odd < (position < kStemShared ? 2 : 1); ++odd) {
          int32_t sum = 0;
          for (int k = 0; k < (odd != 0 ? kStemOdd : kStemEven); ++k)
            sum += kStemFactors.weight[odd][position][k] * g[2 * k + odd];
          const int64_t at = odd * s.in_c + c;
          const int64_t step = position * s.kernel_h * p.rows.channels + ky * p.rows.steps(position) + at / 2;
          lane[step * pitch + at % 2] = static_cast<int16_t>(sum);
        }
    }
  return total;
}

void pack(const ConvShape& s, const int8_t* codes, const int32_t* pad, void* packed) {
  const Packed p(s);
  uint8_t* base = static_cast<uint8_t*>(packed);
  std::memset(packed, 0, static_cast<size_t>(p.bytes));
  for (int64_t c = 0; c < s.in_c; ++c) base[p.pad_at + c] = static_cast<uint8_t>(pad[c]);
  int32_t* correction = reinterpret_cast<int32_t*>(base);
  for (int64_t set = 0; set < p.sets; ++set) {
    const int64_t first = p.first_vector(set), vectors = p.first_vector(set + 1) - first;
    int16_t* weights = reinterpret_cast<int16_t*>(base + p.weights_at + first * p.steps * 32);
    for (int64_t o = first * kLanes; o < (first + vectors) * kLanes && o < s.out_c; ++o)
      correction[o] = -flip(s) * pack_channel(s, p, codes + o * s.in_c * s.kernel_h * kStemTaps, vectors * kPairs,
                                              weights + (o - first * kLanes) * 2);
  }
}

// Transforms rows of the map. A vector has two tiles, eight places each: a pair of columns' channels.
class Transform {
 public:
  Transform(const ConvShape& s, const uint8_t* pad)
      : s_(s), pad_(pad), rows_(s), flip_(_mm_set1_epi8(static_cast<char>(flip(s)))) {
    for (int i = 0; i < kStemPositions; ++i)
      for (int k = 0; k < kStemPositions; ++k)
        for (int64_t lane = 0; lane < 8; ++lane) {
          const int64_t odd = lane / s.in_c;  // with one channel, 2 and more stand for no column
          factor_[i][k][lane] = odd > 1 ? int16_t{0} : static_cast<int16_t>(kStemFactors.data[odd][i][k]);
        }
  }

  // from: the row's first code, or null if it lies outside the map; end: of the image.
  void row(const uint8_t* from, const uint8_t* end, uint8_t* to) const {
    alignas(32) uint8_t edge[2][kEdgeBytes] = {};
    for (int64_t t = 0; t < rows_.tiles; t += 2, to += 2 * rows_.tile_bytes) {
      const bool both = t + 1 < rows_.tiles;
      const uint8_t* const first = window(from, end, t, edge[0]);
      const uint8_t* const second = both ? window(from, end, t + 1, edge[1]) : first;
      two(first, second, to, both ? to + rows_.tile_bytes : nullptr);
    }
  }

 private:
  static constexpr int64_t kEdgeBytes = (kStemColumns + 1) * 4 + 8;

  // Where the columns of a tile are; in `edge`, if they do not all exist or are too near to the end to be read whole.
  const uint8_t* window(const uint8_t* from, const uint8_t* end, int64_t t, uint8_t* edge) const {
    const int64_t x = 2 * kStemTile * t - s_.pad_left, c = s_.in_c;
    if (from != nullptr && x >= 0 && x + kStemColumns <= s_.in_w && from + (x + kStemColumns - 1) * c + 8 <= end)
      return from + x * c;
    for (int64_t k = 0; k < kStemColumns; ++k) {
      const bool inside = from != nullptr && x + k >= 0 && x + k < s_.in_w;
      std::memcpy(edge + k * c, inside ? from + (x + k) * c : pad_, static_cast<size_t>(c));
    }
    return edge;
  }

  __m256i columns(const uint8_t* first, const uint8_t* second) const {
    const __m128i both = _mm_unpacklo_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(first)),
                                            _mm_loadl_epi64(reinterpret_cast<const __m128i*>(second)));
    return _mm256_cvtepu8_epi16(_mm_xor_si128(both, flip_));
  }

  // Two tiles; second_to: null if there is but one. Positions are written in order, over the unused places before them.
  void two(const uint8_t* first, const uint8_t* second, uint8_t* to, uint8_t* second_to) const {
    __m256i d[kStemPositions], m[kStemPositions];
    each<kStemPositions>([&](auto k) { d[k] = columns(first + 2 * k * s_.in_c, second + 2 * k * s_.in_c); });
    each<kStemPositions>([&](auto i) {
      __m256i sum = _mm256_setzero_si256();
      each<kStemPositions>([&](auto k) {
        if constexpr (kStemFactors.data[0][i][k] != 0 || kStemFactors.data[1][i][k] != 0)
          sum = _mm256_add_epi16(sum, _mm256_mullo_epi16(d[k], _mm256_broadcastsi128_si256(_mm_load_si128(
                                                                   reinterpret_cast<const __m128i*>(factor_[i][k])))));
      });
      m[i] = sum;
    });
    const auto store = [&](uint8_t* at, auto half) {
      each<kStemPositions>([&](auto i) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at + rows_.place(i)), _mm256_extracti128_si256(m[i], half));
      });
    };
    store(to, std::integral_constant<int, 0>{});
    if (second_to != nullptr) store(second_to, std::integral_constant<int, 1>{});
  }

  const ConvShape& s_;
  const uint8_t* pad_;
  StemRows rows_;
  __m128i flip_;
  alignas(16) int16_t factor_[kStemPositions][kStemPositions][8];
};

void stage(const ConvShape& s, const void* packed, const void* image, void* staged, int64_t row_begin,
           int64_t row_end) {
  const Packed p(s);
  const Transform transform(s, static_cast<const uint8_t*>(packed) + p.pad_at);
  const uint8_t* codes = static_cast<const uint8_t*>(image);
  for (int64_t r = row_begin; r < row_end; ++r) {
    const int64_t y = r - s.pad_top;
    transform.row(y >= 0 && y < s.in_h ? codes + y * s.in_w * s.in_c : nullptr, codes + s.in_h * s.in_w * s.in_c,
                  static_cast<uint8_t*>(staged) + r * p.rows.bytes);
  }
}

// What the blocks of a group of tiles need.
struct Block {
  const StemRows& rows;
  int64_t kernel_h, row_step;    // from row to row of the kernel, in bytes
  const uint8_t* const* window;  // where each tile's window starts
  const int64_t* pixel;          // its first output
  const int64_t* count;          // its outputs that are real
  const __m256i* weights;
  const int32_t* correction;
  int64_t channels;  // that are real
  int32_t* out;      // of pixel 0
  int64_t out_pitch;
};

// x / 120, of a multiple of it.
inline __m256i unscaled(__m256i x) {
  static_assert(kStemScale == 8 * 15 && 15 * 0xEEEEEEEFu == 1);
  return _mm256_mullo_epi32(_mm256_srai_epi32(x, 3), _mm256_set1_epi32(static_cast<int32_t>(0xEEEEEEEFu)));
}

// The four outputs of a tile and vector, times 120, from what its positions give.
inline void outputs(const __m256i (&m)[kStemPositions], __m256i (&y)[kStemTile]) {
  const auto add = [](__m256i a, __m256i b) { return _mm256_add_epi32(a, b); };
  const auto times = [](__m256i a, int shift) { return _mm256_slli_epi32(a, shift); };
  const __m256i ones = add(m[1], m[2]), twos = add(m[3], m[4]), three = add(m[6], times(m[6], 1));
  const __m256i one = _mm256_sub_epi32(m[1], m[2]), two = times(_mm256_sub_epi32(m[3], m[4]), 1);
  const __m256i nine = add(three, times(three, 1));
  y[0] = add(add(m[0], ones), add(twos, m[6]));
  y[1] = add(add(one, two), three);
  y[2] = add(add(ones, times(twos, 2)), nine);
  y[3] = add(add(add(one, times(two, 2)), add(nine, times(nine, 1))), m[kStemInfinity]);
}

// Hides from the compiler how a value came to be. It would else add products to each other before it adds them to a
// sum, and compute addresses in vectors, and run out of registers in both.
inline __m256i settled(__m256i x) {
  __asm__("" : "+x"(x));
  return x;
}
inline const uint8_t* settled(const uint8_t* x) {
  __asm__("" : "+r"(x));
  return x;
}

// What one position gives, kSteps pairs of each row of the kernel.
template <int kSteps, int kP, int kV>
BITSTRATA_INLINE void multiply_rows(const Block& b, int64_t place, const __m256i* w, __m256i (&total)[kP][kV]) {
  __m256i sum[kP][kV];
  each<kP>([&](auto i) { each<kV>([&](auto j) { sum[i][j] = _mm256_setzero_si256(); }); });
  for (int64_t ky = 0; ky < b.kernel_h; ++ky, place += b.row_step, w += kSteps * kV) {
    const uint8_t* at[kP];
    each<kP>([&](auto i) { at[i] = settled(b.window[i] + place); });
    each<kSteps>([&](auto s) {
      __m256i weights[kV];
      each<kV>([&](auto j) { weights[j] = _mm256_load_si256(w + s * kV + j); });
      each<kP>([&](auto i) {
        const __m256i a = broadcast(at[i] + 4 * s);
        each<kV>([&](auto j) { sum[i][j] = settled(_mm256_add_epi32(sum[i][j], _mm256_madd_epi16(a, weights[j]))); });
      });
    });
  }
  each<kP>([&](auto i) { each<kV>([&](auto j) { total[i][j] = sum[i][j]; }); });
}

template <int kP, int kV>
void convolve(const Block& b) {
  __m256i sums[kStemPositions][kP][kV];
  const __m256i* w = b.weights;
  for (int position = 0; position < kStemPositions; ++position) {
    const int64_t steps = b.rows.steps(position), place = b.rows.place(position);
    switch (steps) {
      case 1:
        multiply_rows<1, kP, kV>(b, place, w, sums[position]);
        break;
      case 2:
        multiply_rows<2, kP, kV>(b, place, w, sums[position]);
        break;
      case 3:
        multiply_rows<3, kP, kV>(b, place, w, sums[position]);
        break;
      default:
        multiply_rows<4, kP, kV>(b, place, w, sums[position]);
    }
    w += b.kernel_h * steps * kV;
  }
  for (int j = 0; j < kV; ++j) {
    const __m256i correction = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b.correction) + j);
    for (int i = 0; i < kP; ++i) {
      __m256i m[kStemPositions], y[kStemTile];
      each<kStemPositions>([&](auto position) { m[position] = sums[position][i][j]; });
      outputs(m, y);
      int32_t* to = b.out + b.pixel[i] * b.out_pitch + j * kLanes;
      each<kStemTile>([&](auto k) {
        if (k < b.count[i])
          store_lanes(to + k * b.out_pitch, b.channels - j * kLanes, _mm256_add_epi32(unscaled(y[k]), correction));
      });
    }
  }
}

using BlockFn = void (*)(const Block&);
template <int kV>
constexpr BlockFn kBlocks[kTiles] = {convolve<1, kV>, convolve<2, kV>, convolve<3, kV>, convolve<4, kV>,
                                     convolve<5, kV>};
constexpr const BlockFn* kBySet[kVectors] = {kBlocks<1>, kBlocks<2>};

// All tiles of a group, for one set of vectors: as few blocks as can be, of nearly equal size.
void convolve_group(Block b, const BlockFn* by_tiles, int64_t tiles) {
  for (int64_t left = (tiles + kTiles - 1) / kTiles; left > 0; --left) {
    const int64_t some = (tiles + left - 1) / left;
    by_tiles[some - 1](b);
    b.window += some, b.pixel += some, b.count += some;
    tiles -= some;
  }
}

void run(const ConvShape& s, const void* packed, const void* staged, int32_t* out, int64_t row_begin, int64_t row_end) {
  const Packed p(s);
  const uint8_t* base = static_cast<const uint8_t*>(packed);
  const uint8_t* rows = static_cast<const uint8_t*>(staged);
  const int32_t* correction = reinterpret_cast<const int32_t*>(base);
  const __m256i* weights = reinterpret_cast<const __m256i*>(base + p.weights_at);
  const uint8_t* window[kGroup];
  int64_t pixel[kGroup], count[kGroup];
  const int64_t end = row_end * p.rows.tiles;
  int64_t tiles;
  for (int64_t begin = row_begin * p.rows.tiles; begin < end; begin += tiles) {
    tiles = end - begin < kGroup ? end - begin : kGroup;
    int64_t y = begin / p.rows.tiles, t = begin % p.rows.tiles;
    for (int64_t i = 0; i < tiles; ++i) {
      window[i] = rows + y * s.stride_h * p.rows.bytes + t * p.rows.tile_bytes;
      pixel[i] = y * s.out_w + kStemTile * t;
      count[i] = s.out_w - kStemTile * t;
      if (++t == p.rows.tiles) t = 0, ++y;
    }
    for (int64_t set = 0; set < p.sets; ++set) {
      const int64_t v = p.first_vector(set), vectors = p.first_vector(set + 1) - v;
      convolve_group({p.rows, s.kernel_h, s.dilation_h * p.rows.bytes, window, pixel, count, weights + v * p.steps,
                      correction + v * kLanes, s.out_c - v * kLanes, out + v * kLanes, s.out_c},
                     kBySet[vectors - 1], tiles);
    }
  }
}

// Products of pairs in all positions, to those of all taps.
double passes(const ConvShape& s) {
  const StemRows rows(s);
  return static_cast<double>(rows.tiles * rows.tile_bytes / 2) / static_cast<double>(s.out_w * kStemTaps * s.in_c);
}

}  // namespace

bool avx2_stem_fits(const ConvShape& s) { return stem_fits(s); }
bool avx2_stem_pays(const ConvShape& s) { return stem_fits(s) && passes(s) <= kMostPasses; }

extern const ConvKernel kAvx2Stem = {"avx2-stem", packed_bytes, pack,           staged_row_bytes, stage, run,
                                     nullptr,     nullptr,      &kAvx2WidePeak, nullptr,          passes};

}  // namespace bitstrata
