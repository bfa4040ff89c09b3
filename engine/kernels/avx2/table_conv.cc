// Direct convolution by tables on AVX2: 32 output channels a vector, several output pixels a block.
//
// Weights are taken by planes of one bit, inputs by digits of two bits. One step looks up what four digits give with
// each of the sixteen ways to choose among them, a table of sixteen bytes, and takes from it, for each of 32 output
// channels, the sum of the digits whose weights have their bit set (pshufb). Sums are kept in bytes for as many steps
// as fit, then widened to 16 bits, which hold the whole result: table_fits makes sure of it. Pairs of a plane and a
// digit are taken in order of falling significance, the sums doubled in between.
#include <immintrin.h>

#include "../common/store_lanes.h"
#include "avx2.h"
#include "table_form.h"

namespace bitstrata {
namespace {

constexpr int kVectors = 2;     // of a set, at most
constexpr int kPixels = 8;      // of a block, at most
constexpr int64_t kTile = 192;  // pixels convolved with all weights in turn, so that their windows stay in the L1 cache

// Pixels of a block: with the sums of its vectors, the weights, a table and what it gives in 16 registers.
constexpr int pixels_of(int vectors) { return vectors == kVectors ? 4 : kPixels; }

// [four digits, the first lowest][which of them][sum].
struct Tables {
  constexpr Tables() : sums() {
    for (int digits = 0; digits < 256; ++digits)
      for (int chosen = 0; chosen < 16; ++chosen)
        for (int i = 0; i < 4; ++i)
          if ((chosen >> i & 1) != 0)
            sums[digits][chosen] = static_cast<uint8_t>(sums[digits][chosen] + (digits >> (2 * i) & 3));
  }
  alignas(64) uint8_t sums[256][kTableBytes];
};
constexpr Tables kTables;

void stage(const ConvShape& s, const void* packed, const void* image, void* staged, int64_t row_begin,
           int64_t row_end) {
  const Packed p(s, kVectors);
  const uint8_t* pad = static_cast<const uint8_t*>(packed) + p.pad_at;
  const uint8_t* from = static_cast<const uint8_t*>(image);
  uint8_t* to = static_cast<uint8_t*>(staged);
  if (p.cells.digits == 1)
    stage_cells(s, p.cells, PackDigits<1, 2>(s, p), pad, from, to, row_begin, row_end);
  else
    stage_cells(s, p.cells, PackDigits<0, 2>(s, p), pad, from, to, row_begin, row_end);
}

// What the blocks of a tile need. A block's first pixel is at window[0], window_sum[0], out.
struct Block {
  const Packed& p;
  CellRuns runs;
  int64_t weight_plane;          // vectors from plane to plane of the weights
  const uint8_t* const* window;  // where each pixel's window starts in the first digit
  const uint32_t* window_sum;    // base * the sum of its moved codes
  const __m256i* weights;
  const int32_t* correction;
  int32_t mul;
  int64_t channels;  // that are real
  int32_t* out;
  int64_t out_pitch;
};

// Sums of the even and of the odd bytes' channels in 16 bits.
template <int kP, int kV>
using Wide = __m256i[kP][kV][2];

// Adds the sums in bytes to those in 16 bits, and clears them.
template <int kP, int kV>
inline void widen(__m256i (&sum)[kP][kV], Wide<kP, kV>& wide) {
  const __m256i even = _mm256_set1_epi16(0xff);
  each<kP>([&](auto i) {
    each<kV>([&](auto j) {
      wide[i][j][0] = _mm256_add_epi16(wide[i][j][0], _mm256_and_si256(sum[i][j], even));
      wide[i][j][1] = _mm256_add_epi16(wide[i][j][1], _mm256_srli_epi16(sum[i][j], 8));
      sum[i][j] = _mm256_setzero_si256();
    });
  });
}

template <int kP, int kV>
inline void double_sums(Wide<kP, kV>& wide) {
  each<kP>([&](auto i) {
    each<2 * kV>([&](auto k) {
      __m256i& x = wide[i][k / 2][k % 2];
      x = _mm256_add_epi16(x, x);
    });
  });
}

// `count` steps.
template <int kP, int kV>
inline void look_up(const uint8_t* const* at, const __m256i* w, int64_t count, __m256i (&sum)[kP][kV]) {
  const uint8_t* tables = kTables.sums[0];
  for (int64_t s = 0; s < count; ++s, w += kV) {
    __m256i weights[kV];
    each<kV>([&](auto j) { weights[j] = _mm256_load_si256(w + j); });
    each<kP>([&](auto i) {
      uint16_t place;
      std::memcpy(&place, at[i] + kWordBytes * s, kWordBytes);
      const __m256i table =
          _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(tables + place)));
      each<kV>([&](auto j) { sum[i][j] = _mm256_add_epi8(sum[i][j], _mm256_shuffle_epi8(table, weights[j])); });
    });
  }
}

// Adds what one plane of kV vectors of weights and one digit of kP pixels' windows give.
template <int kP, int kV>
inline void add_pair(const CellRuns& runs, int64_t chunk, const uint8_t* const* x, int64_t digit, const __m256i* w,
                     Wide<kP, kV>& wide) {
  __m256i sum[kP][kV];
  each<kP>([&](auto i) { each<kV>([&](auto j) { sum[i][j] = _mm256_setzero_si256(); }); });
  __asm__("" : "+m"(wide));  // these sums stay in memory: the registers are for those of the steps
  const int64_t run_steps = runs.bytes / kWordBytes;
  int64_t left = chunk;  // steps until the sums may be full
  for (int64_t row = 0; row < runs.rows; ++row)
    for (int64_t column = 0; column < runs.per_row; ++column) {
      const int64_t offset = digit + row * runs.row_step + column * runs.column_step;
      for (int64_t s = 0; s < run_steps;) {
        const int64_t count = least(left, run_steps - s);
        const uint8_t* at[kP];
        each<kP>([&](auto i) { at[i] = x[i] + offset + kWordBytes * s; });
        look_up<kP, kV>(at, w, count, sum);
        w += count * kV;
        s += count;
        left -= count;
        if (left == 0) {
          widen<kP, kV>(sum, wide);
          left = chunk;
        }
      }
    }
  if (left < chunk) widen<kP, kV>(sum, wide);
}

// The results of one pixel and vector from its sums, those of the even and of the odd bytes' channels; `channels` of
// them are real.
inline void finish(const __m256i (&wide)[2], int32_t factor, const int32_t* correction, uint32_t window_sum,
                   int64_t channels, int32_t* to) {
  const __m256i mul = _mm256_set1_epi32(factor), added = _mm256_set1_epi32(static_cast<int32_t>(window_sum));
  const __m128i eights[4] = {_mm256_castsi256_si128(wide[0]), _mm256_extracti128_si256(wide[0], 1),
                             _mm256_castsi256_si128(wide[1]), _mm256_extracti128_si256(wide[1], 1)};
  each<4>([&](auto i) {
    const int64_t left = channels - i * 8;
    if (left <= 0) return;
    const __m256i product = _mm256_mullo_epi32(_mm256_cvtepu16_epi32(eights[i]), mul);
    const __m256i other = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(correction) + i);
    const __m256i x = _mm256_add_epi32(product, _mm256_add_epi32(added, other));
    store_lanes(to + i * 8, left, x);
  });
}

template <int kP, int kV>
void convolve(const Block& b) {
  Wide<kP, kV> wide;
  each<kP>([&](auto i) { each<kV>([&](auto j) { wide[i][j][0] = wide[i][j][1] = _mm256_setzero_si256(); }); });
  const int64_t digits = b.p.cells.digits;
  const int64_t highest = 2 * (digits - 1) + b.p.form.weight_bits - 1;
  for (int64_t level = highest; level >= 0; --level) {
    if (level < highest) double_sums<kP, kV>(wide);
    for (int64_t digit = 0; digit < digits && 2 * digit <= level; ++digit)
      if (level - 2 * digit < b.p.form.weight_bits)
        add_pair<kP, kV>(b.runs, b.p.chunk, b.window, digit * b.p.cells.digit_bytes,
                         b.weights + (level - 2 * digit) * b.weight_plane, wide);
  }
  for (int i = 0; i < kP; ++i)
    for (int j = 0; j < kV; ++j)
      finish(wide[i][j], b.mul, b.correction + j * kLanes, b.window_sum[i], b.channels - j * kLanes,
             b.out + i * b.out_pitch + j * kLanes);
}

using BlockFn = void (*)(const Block&);
constexpr BlockFn kOne[kPixels] = {convolve<1, 1>, convolve<2, 1>, convolve<3, 1>, convolve<4, 1>,
                                   convolve<5, 1>, convolve<6, 1>, convolve<7, 1>, convolve<8, 1>};
constexpr BlockFn kTwo[pixels_of(kVectors)] = {convolve<1, 2>, convolve<2, 2>, convolve<3, 2>, convolve<4, 2>};

// All `pixels` of a tile, for one set of vectors: as few blocks as can be, of nearly equal size.
void convolve_tile(Block b, int64_t vectors, int64_t pixels) {
  const BlockFn* by_pixels = vectors == 1 ? kOne : kTwo;
  const int64_t largest = pixels_of(static_cast<int>(vectors)), blocks = (pixels + largest - 1) / largest;
  for (int64_t left = blocks; left > 0; --left) {
    const int64_t size = (pixels + left - 1) / left;
    by_pixels[size - 1](b);
    b.window += size, b.window_sum += size, b.out += size * b.out_pitch;
    pixels -= size;
  }
}

void run(const ConvShape& s, const void* packed, const void* staged, int32_t* out, int64_t row_begin, int64_t row_end) {
  const Packed p(s, kVectors);
  const uint8_t* base = static_cast<const uint8_t*>(packed);
  const int32_t* correction = reinterpret_cast<const int32_t*>(base);
  const uint8_t* window[kTile];
  uint32_t sums[kTile];
  const int64_t end = row_end * s.out_w;
  int64_t pixels;
  for (int64_t begin = row_begin * s.out_w; begin < end; begin += pixels) {
    const int64_t tiles = (end - begin + kTile - 1) / kTile;
    pixels = (end - begin + tiles - 1) / tiles;
    for (int64_t group = 0; group < s.groups; ++group) {
      find_windows(s, p.cells, static_cast<const uint8_t*>(staged), group, begin, pixels,
                   static_cast<uint32_t>(p.form.base), window, sums);
      for (int64_t set = 0; set < p.sets; ++set) {
        const int64_t v = p.first_vector(set), vectors = p.first_vector(set + 1) - v;
        convolve_tile(
            {p, CellRuns(s, p.cells), p.steps * vectors, window, sums,
             reinterpret_cast<const __m256i*>(base + p.weights_of(group, v)),
             correction + (group * p.vectors + v) * kLanes, s.mul, least(vectors * kLanes, s.group_out() - v * kLanes),
             out + begin * s.out_c + group * s.group_out() + v * kLanes, s.out_c},
            vectors, pixels);
      }
    }
  }
}

// Pairs of a plane and a digit.
double passes(const ConvShape& s) {
  const CodePlanes form(s);
  return form.weight_bits * ((form.input_bits + 1) / 2);
}

constexpr ConvKernel kernel() {
  ConvKernel made{"avx2-table", packed_bytes<kVectors>, pack<kVectors>, staged_row_bytes<kVectors>, stage, run};
  made.peak = &kAvx2TablePeak;
  made.passes = passes;
  return made;
}

}  // namespace

bool avx2_table_fits(const ConvShape& s) {
  const double largest = static_cast<double>(s.code_hi - s.code_lo) * static_cast<double>(s.input_hi - s.input_lo);
  return largest * static_cast<double>(s.group_in() * s.kernel_h * s.kernel_w) <= UINT16_MAX;
}

bool avx2_pairs_fits(const ConvShape& s) { return avx2_table_fits(s) && CodePlanes(s).input_bits == 1; }

const ConvKernel* avx2_table_choice(const ConvShape& s, double step_cycles, double vector_cycles) {
  if (!avx2_table_fits(s)) return nullptr;
  const Packed p(s, kVectors);
  const double rows = static_cast<double>(s.groups * s.out_h), pixels = rows * static_cast<double>(s.out_w);
  const double staged = static_cast<double>(s.groups * Cells::read_rows(s) * p.cells.count);
  const double passes = static_cast<double>(p.form.weight_bits * p.cells.digits);
  const double parts = static_cast<double>((p.cells.codes + 31) / 32);
  const double vectors = static_cast<double>(p.vectors), steps = static_cast<double>(p.steps);
  // A table that serves one vector, the last of an odd number, costs as much as one that serves two.
  const double alone = p.vectors % 2 == 1 ? 1 / vectors : 0;
  const double step = 0.72 + (p.form.input_bits > 1 ? 0.08 : 0) + 0.28 * alone;
  const double staging = staged * (12 + parts * (5 + 4 * static_cast<double>(p.cells.digits)));
  const double by_tables = pixels * (8 + vectors * (12 + passes * (14 + step * steps))) + staging;
  const double paired = rows * static_cast<double>((s.out_w + 1) / 2 * 2);
  const double by_pairs = paired * (8 + vectors * (12 + passes * (14 + (0.42 + 0.14 * alone) * steps))) + staging;
  const bool pairs = avx2_pairs_fits(s) && by_pairs < by_tables;
  const double byte_steps = static_cast<double>(s.kernel_h * s.kernel_w * ((s.group_in() + 3) / 4));
  const double byte_vectors = static_cast<double>((s.group_out() + 7) / 8);
  const double by_bytes = pixels * (8 + byte_vectors * (vector_cycles + step_cycles * byte_steps));
  if ((pairs ? by_pairs : by_tables) * 1.06 >= by_bytes) return nullptr;
  return pairs ? &kAvx2Pairs : &kAvx2Table;
}

extern const ConvKernel kAvx2Table = kernel();

}  // namespace bitstrata
