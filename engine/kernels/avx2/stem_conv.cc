// Convolution of few input channels by seven columns with stride 2, as networks begin with, on AVX2.
#include "avx2.h"
#include "tiles_wide.h"

namespace bitstrata {
namespace {

constexpr int kTaps = 7, kColumns = 2 * kFourTile + kTaps - 2;  // of a kernel's row; of the input, for a tile
constexpr int64_t kMostChannels = 4;                            // which eight bytes hold two columns of
constexpr int32_t kScale = 120;
constexpr FourFactors<4> kEven(kScale);
constexpr FourFactors<3> kOdd(kScale);
static_assert(kEven.largest_data() * UINT8_MAX <= INT16_MAX);  // those of kOdd are smaller
constexpr double kMostPasses = 0.6;  // above, transforming takes what the products gain: maps too narrow for tiles

// Staged rows: [tile][position][even columns' channels, odd ones'] in 16 bits, the last position without odd ones, its
// channels filled up to pairs.
struct Rows {
  static constexpr int64_t kSlack = 16;  // what whole vectors may write behind a row

  explicit Rows(const ConvShape& s)
      : channels(s.in_c),
        pairs((s.in_c + 1) / 2),
        tiles((s.out_w + kFourTile - 1) / kFourTile),
        tile_bytes((kFourShared * 2 * channels + 2 * pairs) * 2),
        bytes(tiles * tile_bytes + kSlack) {}
  int64_t steps(int position) const { return position < kFourShared ? channels : pairs; }
  int64_t place(int position) const { return position * 4 * channels; }

  int64_t channels, pairs, tiles, tile_bytes, bytes;
};

struct Stem {
  using Rows = bitstrata::Rows;
  static constexpr int kPositions = kFourPositions;
  static constexpr uint32_t kInverse = 0xEEEEEEEF;
  static_assert(kInverse * (kScale >> kFourShift) == 1);

  template <typename Put>
  static int32_t channel(const ConvShape& s, const int8_t* codes, const Put& put) {
    int32_t total = 0;
    for (int64_t ky = 0; ky < s.kernel_h; ++ky) {
      int32_t weight[kPositions][2 * kMostChannels] = {};
      for (int64_t c = 0; c < s.in_c; ++c) {
        int32_t g[kTaps];
        for (int64_t kx = 0; kx < kTaps; ++kx) {
          g[kx] = s.mul * codes[(c * s.kernel_h + ky) * kTaps + kx] + s.add;
          total += g[kx];
        }
        for (int position = 0; position < kPositions; ++position) {
          for (int k = 0; k < 4; ++k) weight[position][c] += kEven.weight[position][k] * g[2 * k];
          for (int k = 0; k < 3 && position < kFourShared; ++k)
            weight[position][s.in_c + c] += kOdd.weight[position][k] * g[2 * k + 1];
        }
      }
      const Rows rows(s);
      for (int position = 0; position < kPositions; ++position)
        for (int64_t pair = 0; pair < rows.steps(position); ++pair)
          put(position, ky, pair, weight[position][2 * pair], weight[position][2 * pair + 1]);
    }
    return total;
  }

  template <int kSteps, int kP, int kV>
  BITSTRATA_INLINE static void multiply_rows(const TilesBlock<Stem>& b, int64_t place, const __m256i* w,
                                             __m256i (&total)[kP][kV]) {
    __m256i sum[kP][kV];
    each<kP>([&](auto i) { each<kV>([&](auto j) { sum[i][j] = _mm256_setzero_si256(); }); });
    for (int64_t ky = 0; ky < b.kernel_h; ++ky, place += b.row_step, w += kSteps * kV) {
      const uint8_t* at[kP];
      each<kP>([&](auto i) { at[i] = settled(b.window[i] + place); });
      each<kSteps>([&](auto s) { multiply_step<kP, kV>(at, 4 * s, w + s * kV, sum); });
    }
    each<kP>([&](auto i) { each<kV>([&](auto j) { total[i][j] = sum[i][j]; }); });
  }

  template <int kP, int kV>
  static void multiply(const TilesBlock<Stem>& b, int position, const __m256i* w, __m256i (&total)[kP][kV]) {
    const int64_t place = b.rows.place(position);
    switch (b.rows.steps(position)) {
      case 1:
        return multiply_rows<1, kP, kV>(b, place, w, total);
      case 2:
        return multiply_rows<2, kP, kV>(b, place, w, total);
      case 3:
        return multiply_rows<3, kP, kV>(b, place, w, total);
      default:
        return multiply_rows<4, kP, kV>(b, place, w, total);
    }
  }

  static void outputs(const __m256i (&m)[kPositions], __m256i (&y)[kFourTile]) {
    const auto add = [](__m256i a, __m256i b) { return _mm256_add_epi32(a, b); };
    const auto times = [](__m256i a, int shift) { return _mm256_slli_epi32(a, shift); };
    const __m256i ones = add(m[1], m[2]), twos = add(m[3], m[4]), three = add(m[6], times(m[6], 1));
    const __m256i one = _mm256_sub_epi32(m[1], m[2]), two = times(_mm256_sub_epi32(m[3], m[4]), 1);
    const __m256i nine = add(three, times(three, 1));
    y[0] = add(add(m[0], ones), add(twos, m[6]));
    y[1] = add(add(one, two), three);
    y[2] = add(add(ones, times(twos, 2)), nine);
    y[3] = add(add(add(one, times(two, 2)), add(nine, times(nine, 1))), m[kFourInfinity]);
  }
};

// Transforms rows of the map. A vector has two tiles, eight places each: a pair of columns' channels.
class Transform {
 public:
  Transform(const ConvShape& s, const uint8_t* pad)
      : s_(s), pad_(pad), rows_(s), flip_(_mm_set1_epi8(static_cast<char>(flip(s)))) {
    for (int i = 0; i < kFourPositions; ++i)
      for (int k = 0; k < kFourPositions; ++k)
        for (int64_t lane = 0; lane < 8; ++lane) {
          const int64_t odd = lane / s.in_c;  // with few channels, 2 and more stand for no column
          const int32_t factor = odd == 0 ? kEven.data[i][k] : odd == 1 ? kOdd.data[i][k] : 0;
          factor_[i][k][lane] = static_cast<int16_t>(factor);
        }
  }

  // from: the row's first code, or null if it lies outside the map; end: of the image.
  void row(const uint8_t* from, const uint8_t* end, uint8_t* to) const {
    uint8_t edge[2][kEdgeBytes] = {};
    for (int64_t t = 0; t < rows_.tiles; t += 2, to += 2 * rows_.tile_bytes) {
      const bool both = t + 1 < rows_.tiles;
      const uint8_t* const first = window(from, end, t, edge[0]);
      const uint8_t* const second = both ? window(from, end, t + 1, edge[1]) : first;
      two(first, second, to, both ? to + rows_.tile_bytes : nullptr);
    }
  }

 private:
  static constexpr int64_t kRead = 8;  // bytes at once
  static constexpr int64_t kEdgeBytes = kColumns * kMostChannels + kRead;

  // Where the columns of a tile are; in `edge`, if they do not all exist or are too near to the end to be read whole.
  const uint8_t* window(const uint8_t* from, const uint8_t* end, int64_t t, uint8_t* edge) const {
    const int64_t x = 2 * kFourTile * t - s_.pad_left, c = s_.in_c;
    if (from != nullptr && x >= 0 && x + kColumns <= s_.in_w && end - from >= (x + kColumns - 1) * c + kRead)
      return from + x * c;
    for (int64_t k = 0; k < kColumns; ++k) {
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
    __m256i d[kFourPositions], m[kFourPositions];
    each<kFourPositions>([&](auto k) { d[k] = columns(first + 2 * k * s_.in_c, second + 2 * k * s_.in_c); });
    each<kFourPositions>([&](auto i) {
      m[i] = _mm256_setzero_si256();
      each<kFourPositions>([&](auto k) {
        if constexpr (kEven.data[i][k] != 0 || kOdd.data[i][k] != 0) {
          const __m128i factor = _mm_load_si128(reinterpret_cast<const __m128i*>(factor_[i][k]));
          m[i] = _mm256_add_epi16(m[i], _mm256_mullo_epi16(d[k], _mm256_broadcastsi128_si256(factor)));
        }
      });
    });
    const auto store = [&](uint8_t* at, auto half) {
      each<kFourPositions>([&](auto i) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at + rows_.place(i)), _mm256_extracti128_si256(m[i], half));
      });
    };
    store(to, std::integral_constant<int, 0>{});
    if (second_to != nullptr) store(second_to, std::integral_constant<int, 1>{});
  }

  const ConvShape& s_;
  const uint8_t* pad_;
  Rows rows_;
  __m128i flip_;
  alignas(16) int16_t factor_[kFourPositions][kFourPositions][8];
};

using Conv = TilesConv<Stem>;

void stage(const ConvShape& s, const void* packed, const void* image, void* staged, int64_t row_begin,
           int64_t row_end) {
  const Conv::Packed p(s);
  const Transform transform(s, static_cast<const uint8_t*>(packed) + p.pad_at);
  const uint8_t* codes = static_cast<const uint8_t*>(image);
  for (int64_t r = row_begin; r < row_end; ++r) {
    const int64_t y = r - s.pad_top;
    transform.row(y >= 0 && y < s.in_h ? codes + y * s.in_w * s.in_c : nullptr, codes + s.in_h * s.in_w * s.in_c,
                  static_cast<uint8_t*>(staged) + r * p.rows.bytes);
  }
}

// Products of pairs in all positions, to those of all taps.
double passes(const ConvShape& s) {
  const Rows rows(s);
  return static_cast<double>(rows.tiles * rows.tile_bytes / 2) / static_cast<double>(s.out_w * kTaps * s.in_c);
}

}  // namespace

bool avx2_stem_fits(const ConvShape& s) {
  const bool columns = s.kernel_w == kTaps && s.stride_w == 2 && s.dilation_w == 1 && s.groups == 1;
  return columns && s.in_c <= kMostChannels && four_fits(s, kEven.largest_weight());
}
bool avx2_stem_pays(const ConvShape& s) { return avx2_stem_fits(s) && passes(s) <= kMostPasses; }

extern const ConvKernel kAvx2Stem = {"avx2-stem",    Conv::packed_bytes,
                                     Conv::pack,     Conv::staged_row_bytes,
                                     stage,          Conv::run,
                                     nullptr,        nullptr,
                                     &kAvx2WidePeak, nullptr,
                                     passes};

}  // namespace bitstrata
