// Convolution by Winograd's F(2, 3) on AVX2: pair sums of u8 and s8 products in int16, for `chunk` steps, then widened.
#include <immintrin.h>

#include "../common/winograd_lanes8.h"
#include "avx2.h"
#include "chunk.h"
#include "steps.h"

namespace bitstrata {
namespace {

constexpr int kLanes = 8;    // output channels of a vector
constexpr int kVectors = 2;  // of a set, at most
constexpr int kTiles = 5;    // of a block: with two vectors, ten sums and a few temporaries fill the registers

// Where fewer steps than this fit int16, widening so often makes direct kernels faster.
constexpr int64_t kLeastChunk = 8;

using Block = Lanes8Block;
using Form = TwoOutputs;

template <int kP, int kV>
using Sums = __m256i[Form::kPositions][kP][kV];

// Adds int16 sums to those of a position.
template <int kP, int kV>
inline void widen(const __m256i (&sum)[kP][kV], __m256i (&total)[kP][kV]) {
  for (int i = 0; i < kP; ++i)
    for (int j = 0; j < kV; ++j)
      total[i][j] = _mm256_add_epi32(total[i][j], _mm256_madd_epi16(sum[i][j], _mm256_set1_epi16(1)));
}

template <int kP, int kV>
inline void clear(__m256i (&sum)[kP][kV]) {
  for (auto& row : sum)
    for (auto& v : row) v = _mm256_setzero_si256();
}

template <int kP, int kV>
void multiply_all(const Block& b, Sums<kP, kV>& sums) {
  const __m256i* w = b.weights;
  const int64_t row_steps = b.lanes / kWinogradStep;
  Ahead ahead{reinterpret_cast<const char*>(b.ahead), 2};  // a line is two vectors
  for (int64_t position = 0; position < Form::kPositions; ++position) {
    __m256i sum[kP][kV];
    clear(sum);
    int64_t left = b.chunk;  // steps until the int16 sums may be full
    for (int64_t row = 0; row < b.kernel_h; ++row) {
      const int64_t offset = position * b.lanes + row * b.row_step;
      for (int64_t s = 0; s < row_steps;) {
        const int64_t count = left < row_steps - s ? left : row_steps - s;
        const uint8_t* at[kP];
        for (int i = 0; i < kP; ++i) at[i] = b.window[i] + offset + 4 * s;
        if (b.ahead != b.weights) ahead.fetch(count);
        multiply<false, kP, kV>(at, w, count, sum);
        w += count * kV, s += count, left -= count;
        if (left == 0) {
          widen<kP, kV>(sum, sums[position]);
          clear(sum);
          left = b.chunk;
        }
      }
    }
    if (left < b.chunk) widen<kP, kV>(sum, sums[position]);
  }
}

template <int kP, int kV>
void convolve(const Block& b) {
  Sums<kP, kV> sums;
  std::memset(sums, 0, sizeof(sums));
  multiply_all<kP, kV>(b, sums);
  store_tiles<Form>(b, kP, kV, &sums[0][0][0]);
}

using BlockFn = void (*)(const Block&);
template <int kV>
constexpr BlockFn kBlocks[kTiles] = {convolve<1, kV>, convolve<2, kV>, convolve<3, kV>, convolve<4, kV>,
                                     convolve<5, kV>};
constexpr const BlockFn* kBySet[kVectors] = {kBlocks<1>, kBlocks<2>};

struct Avx2 {
  using Form = bitstrata::Form;
  static constexpr int64_t kLanes = bitstrata::kLanes, kVectors = bitstrata::kVectors;
  using Registers = Lanes8;
  static int64_t tiles_of(int64_t) { return kTiles; }
  template <typename R>
  static BlockFn block(int64_t vectors, int64_t tiles) {
    return kBySet[vectors - 1][tiles - 1];
  }
  static constexpr auto pack_set = pack_winograd_set<Avx2>;
  static int64_t chunk(const ConvShape& s, const WinogradPacked<Avx2>& p, const int8_t* weights) {
    Chunk chunk(static_cast<int32_t>(WinogradOffsets<Form>::largest(s)));
    for (int64_t set = 0; set < p.sets; ++set) {
      const int64_t vectors = p.first_vector(set + 1) - p.first_vector(set);
      for (int position = 0; position < Form::kPositions; ++position, weights += p.steps * vectors * 32)
        chunk.add(weights, p.steps, vectors * 16);
    }
    return chunk.steps(p.steps);
  }
};

using Conv = WinogradConv<Avx2>;

void run(const ConvShape& s, const void* packed, const void* staged, int32_t* out, int64_t row_begin, int64_t row_end) {
  Conv::run_to<Sums32>(s, packed, staged, {out, s.out_c}, row_begin, row_end);
}

}  // namespace

bool avx2_winograd_fits(const ConvShape& s) {
  const int64_t step = 2 * winograd_largest_weight<Form>(s) * WinogradOffsets<Form>::largest(s);
  return winograd_fits<Form>(s) && kLeastChunk * step <= INT16_MAX;
}

// With fewer channels, transforming inputs and sums takes what the products gain: from measurements on Zen 5.
bool avx2_winograd_pays(const ConvShape& s) {
  return avx2_winograd_fits(s) && s.out_w > 3 && s.in_c > 16 && s.out_c > 16;
}

extern const ConvKernel kAvx2Winograd = {"avx2-winograd",
                                         Conv::packed_bytes,
                                         Conv::pack,
                                         Conv::staged_row_bytes,
                                         Conv::stage,
                                         run,
                                         nullptr,
                                         nullptr,
                                         nullptr,
                                         nullptr,
                                         winograd_passes<Form>};

}  // namespace bitstrata
