// Convolution of three columns with stride 1 by Winograd's F(4, 3) on AVX2, for weights and inputs that do not fit the
// narrow kernels: eight bits.
#include "../common/conv_stage.h"
#include "avx2.h"
#include "tiles_wide.h"

namespace bitstrata {
namespace {

constexpr int kTaps = 3, kColumns = kFourTile + kTaps - 1;  // of a kernel's row; of the input, for a tile
constexpr int32_t kScale = 24;
constexpr FourFactors<kTaps> kFactors(kScale);
static_assert(kFactors.largest_data() * UINT8_MAX <= INT16_MAX);
constexpr double kMostPasses = 0.7;  // above, transforming takes what the products gain: maps too narrow for tiles
constexpr int64_t kLeastChannels = 8;
constexpr int64_t kFetch = 64;  // steps between fetches

// Staged rows: [tile][position][channels, filled up to pairs] in 16 bits.
struct Rows {
  explicit Rows(const ConvShape& s)
      : pairs((s.in_c + 1) / 2),
        tiles((s.out_w + kFourTile - 1) / kFourTile),
        tile_bytes(kFourShared * pairs * 4),
        bytes(tiles * tile_bytes) {}
  int64_t steps(int) const { return pairs; }
  int64_t place(int position) const { return position * pairs * 4; }

  int64_t pairs, tiles, tile_bytes, bytes;
};

struct Three {
  using Rows = bitstrata::Rows;
  static constexpr int kPositions = kFourShared;
  static constexpr uint32_t kInverse = 0xAAAAAAAB;
  static_assert(kInverse * (kScale >> kFourShift) == 1);

  template <typename Put>
  static int32_t channel(const ConvShape& s, const int8_t* codes, const Put& put) {
    int32_t total = 0;
    const int64_t channel = s.kernel_h * kTaps;
    for (int64_t c = 0; c < s.in_c; c += 2)
      for (int64_t ky = 0; ky < s.kernel_h; ++ky) {
        int32_t g[2][kTaps] = {};
        for (int64_t i = 0; i < 2 && c + i < s.in_c; ++i)
          for (int k = 0; k < kTaps; ++k) total += g[i][k] = s.mul * codes[(c + i) * channel + ky * kTaps + k] + s.add;
        each<kPositions>([&](auto position) {
          int32_t weight[2] = {};
          each<kTaps>([&](auto k) {
            for (int i = 0; i < 2; ++i) weight[i] += kFactors.weight[position][k] * g[i][k];
          });
          put(position, ky, c / 2, weight[0], weight[1]);
        });
      }
    return total;
  }

  template <int kP, int kV>
  static void multiply(const TilesBlock<Three>& b, int position, const __m256i* w, __m256i (&total)[kP][kV]) {
    __m256i sum[kP][kV];
    each<kP>([&](auto i) { each<kV>([&](auto j) { sum[i][j] = _mm256_setzero_si256(); }); });
    const int64_t steps = b.rows.pairs;
    int64_t place = b.rows.place(position);
    for (int64_t ky = 0; ky < b.kernel_h; ++ky, place += b.row_step)
      for (int64_t first = 0; first < steps; first += kFetch) {
        const int64_t count = steps - first < kFetch ? steps - first : kFetch;
        b.ahead->fetch(count);
        const uint8_t* at[kP];
        each<kP>([&](auto i) { at[i] = settled(b.window[i] + place + 4 * first); });
        for (int64_t s = 0; s < count; ++s, w += kV) multiply_step<kP, kV>(at, 4 * s, w, sum);
      }
    each<kP>([&](auto i) { each<kV>([&](auto j) { total[i][j] = sum[i][j]; }); });
  }

  static void outputs(const __m256i (&m)[kPositions], __m256i (&y)[kFourTile]) {
    const auto add = [](__m256i a, __m256i b) { return _mm256_add_epi32(a, b); };
    const auto times = [](__m256i a, int shift) { return _mm256_slli_epi32(a, shift); };
    const __m256i ones = add(m[1], m[2]), twos = add(m[3], m[4]);
    const __m256i one = _mm256_sub_epi32(m[1], m[2]), two = times(_mm256_sub_epi32(m[3], m[4]), 1);
    y[0] = add(add(m[0], ones), twos);
    y[1] = add(one, two);
    y[2] = add(ones, times(twos, 2));
    y[3] = add(add(one, times(two, 2)), m[kFourInfinity]);
  }
};

// Sixteen channels of a tile's columns, at d[0..5]; positions at `to` are `pitch` int16 apart.
struct Sixteen {
  static constexpr int64_t kCount = 16;
  explicit Sixteen(uint8_t flip) : flip(_mm_set1_epi8(static_cast<char>(flip))) {}
  __m256i load(const uint8_t* x) const {
    return _mm256_cvtepu8_epi16(_mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)), flip));
  }
  void operator()(const uint8_t* const* d, int64_t c, int16_t* to, int64_t pitch) const {
    const auto add = [](__m256i a, __m256i b) { return _mm256_add_epi16(a, b); };
    const auto sub = [](__m256i a, __m256i b) { return _mm256_sub_epi16(a, b); };
    const auto times = [](__m256i a, int shift) { return _mm256_slli_epi16(a, shift); };
    const __m256i d0 = load(d[0] + c), d1 = load(d[1] + c), d2 = load(d[2] + c), d3 = load(d[3] + c);
    const __m256i d4 = load(d[4] + c), d5 = load(d[5] + c);
    const __m256i u = sub(d4, times(d2, 2)), v = sub(d3, times(d1, 2));
    const __m256i p = sub(d4, d2), q = times(sub(d3, d1), 1);
    const __m256i m[kFourShared] = {add(times(sub(d0, d2), 2), p),          add(u, v), sub(u, v), add(p, q), sub(p, q),
                                    add(times(sub(d1, d3), 2), sub(d5, d3))};
    each<kFourShared>([&](auto i) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * pitch + c), m[i]); });
  }
  __m128i flip;
};

using Conv = TilesConv<Three>;

void stage(const ConvShape& s, const void* packed, const void* image, void* staged, int64_t row_begin,
           int64_t row_end) {
  const Conv::Packed p(s);
  const uint8_t* pad = static_cast<const uint8_t*>(packed) + p.pad_at;
  const uint8_t flipped = flip(s);
  const Sixteen sixteen(flipped);
  const int64_t pitch = 2 * p.rows.pairs;
  for (int64_t r = row_begin; r < row_end; ++r) {
    const int64_t y = r - s.pad_top;
    const bool inside = y >= 0 && y < s.in_h;
    const uint8_t* from = static_cast<const uint8_t*>(image) + y * s.in_w * s.in_c;
    int16_t* to = reinterpret_cast<int16_t*>(static_cast<uint8_t*>(staged) + r * p.rows.bytes);
    for (int64_t t = 0; t < p.rows.tiles; ++t, to += kFourShared * pitch) {
      const uint8_t* d[kColumns];
      for (int64_t k = 0; k < kColumns; ++k) {
        const int64_t x = kFourTile * t + k - s.pad_left;
        d[k] = inside && x >= 0 && x < s.in_w ? from + x * s.in_c : pad;
      }
      int64_t c = 0;
      for (; c + Sixteen::kCount <= s.in_c; c += Sixteen::kCount) sixteen(d, c, to, pitch);
      for (; c < s.in_c; ++c)
        for (int i = 0; i < kFourShared; ++i) {
          int32_t sum = 0;
          for (int k = 0; k < kColumns; ++k) sum += kFactors.data[i][k] * static_cast<uint8_t>(d[k][c] ^ flipped);
          to[i * pitch + c] = static_cast<int16_t>(sum);
        }
      for (; c < pitch; ++c)
        for (int i = 0; i < kFourShared; ++i) to[i * pitch + c] = 0;
    }
  }
}

double passes(const ConvShape& s) {
  return static_cast<double>(kFourShared * Rows(s).tiles) / static_cast<double>(kTaps * s.out_w);
}

}  // namespace

bool avx2_winograd_wide_fits(const ConvShape& s) {
  const bool columns = s.kernel_w == kTaps && s.stride_w == 1 && s.dilation_w == 1 && s.groups == 1;
  return columns && four_fits(s, kFactors.largest_weight());
}
bool avx2_winograd_wide_pays(const ConvShape& s) {
  return avx2_winograd_wide_fits(s) && s.in_c >= kLeastChannels && passes(s) <= kMostPasses;
}

extern const ConvKernel kAvx2WinogradWide = {"avx2-winograd-wide",
                                             Conv::packed_bytes,
                                             Conv::pack,
                                             Conv::staged_row_bytes,
                                             stage,
                                             Conv::run,
                                             nullptr,
                                             nullptr,
                                             &kAvx2WidePeak,
                                             nullptr,
                                             passes};

}  // namespace bitstrata
