// Direct convolution on AVX2: eight output channels a vector, kPixels output pixels a block.
//
// One step multiplies four bytes of each pixel's window, broadcast to all lanes, with a vector of weights holding, for
// each of eight output channels, the four bytes that belong to them:
//   narrow: four u8 activations x four s8 weights (maddubs), pair sums kept in int16 for `chunk` steps, then widened;
//   wide: two int16 activations x two int16 weights (madd), int32 at once.
// Narrow is taken only where the int16 sums are proved to fit, from the actual weights and the input's bounds. Signed
// activations are staged with an offset that makes them unsigned, and weights mul*c + add that leave s8 are applied as
// mul * sum(c*a) + add * sum(a).
#include <immintrin.h>

#include "../common/conv_stage.h"
#include "avx2.h"
#include "chunk.h"
#include "steps.h"

namespace bitstrata {
namespace {

constexpr int kLanes = 8;  // output channels of a vector
constexpr int kPixels =
    5;  // of a block: with two vectors, ten sums, two weights and a few temporaries fill the registers
// Pixels convolved with all weights in turn, so that their windows stay in the L1 cache: whole blocks.
constexpr int kTile = 38 * kPixels;

// Where fewer steps than this fit int16, widening so often makes the wide kernel faster.
constexpr int32_t kLeastChunk = 3;

int64_t abs64(int64_t a) { return a < 0 ? -a : a; }

// How the narrow kernel sees weights and inputs; the wide one uses weights and inputs as they are.
struct Form {
  explicit Form(const ConvShape& s, bool wide) {
    const int32_t w_lo = s.mul * s.code_lo + s.add, w_hi = s.mul * s.code_hi + s.add;
    whole = wide || (min64(w_lo, w_hi) >= INT8_MIN && max64(w_lo, w_hi) <= INT8_MAX);
    pack_mul = whole ? s.mul : 1;
    pack_add = whole ? s.add : 0;
    mul = whole ? 1 : s.mul;
    add = whole ? 0 : s.add;
    offset = wide || s.input_lo >= 0 ? 0 : -s.input_lo;
    largest_weight =
        static_cast<int32_t>(max64(abs64(pack_mul * s.code_lo + pack_add), abs64(pack_mul * s.code_hi + pack_add)));
    largest_input = s.input_hi + offset;
  }
  bool whole;                  // weights are packed as they are
  int32_t pack_mul, pack_add;  // packed weight = pack_mul * c + pack_add
  int32_t mul, add;            // weight = mul * packed + add
  int32_t offset;              // staged activation = a + offset
  int32_t largest_weight, largest_input;
};

template <bool kWide>
struct Types;
template <>
struct Types<false> {
  using Staged = uint8_t;
  using Weight = int8_t;
};
template <>
struct Types<true> {
  using Staged = int16_t;
  using Weight = int16_t;
};

// Sizes and positions of everything that is packed: int64 chunk; int32 correction[padded out_c]; padding; weights.
template <bool kWide>
struct Packed {
  using Staged = typename Types<kWide>::Staged;
  using Weight = typename Types<kWide>::Weight;
  static constexpr int64_t kStep = 4 / sizeof(Staged);  // activations of a step

  explicit Packed(const ConvShape& s)
      : form(s, kWide),
        stage(dense_rows(s, kStep) ? dense_staging<Staged>(s, kStep, form.offset, !form.whole)
                                   : Staging<Staged>(s, round_up(s.group_in(), kStep), form.offset, !form.whole)),
        runs(dense_runs(s, stage, kStep)),
        columns(s.kernel_w / runs.per_row),
        vectors(round_up(s.group_out(), kLanes) / kLanes),
        steps(runs.count * runs.elements / kStep),
        correction_at(64),
        padding_at(correction_at + s.groups * vectors * kLanes * 4),
        weights_at(round_up(padding_at + s.groups * stage.lanes * static_cast<int64_t>(sizeof(Staged)), 64)),
        bytes(weights_at + s.groups * vectors * steps * 32) {}

  // Where a tap's first channel is in a window.
  int64_t place(int64_t tap) const { return tap / columns * runs.elements + tap % columns * stage.lanes; }

  Form form;
  Staging<Staged> stage;
  Runs<Staged> runs;
  int64_t columns;  // of a run
  int64_t vectors;  // of output channels, in each group
  int64_t steps;    // of a window
  int64_t correction_at, padding_at, weights_at, bytes;
};

template <bool kWide>
int64_t packed_bytes(const ConvShape& s) {
  return Packed<kWide>(s).bytes;
}

template <bool kWide>
int64_t staged_row_bytes(const ConvShape& s) {
  return Packed<kWide>(s).stage.row_bytes;
}

// Channels [begin, end) of one output channel's weights (channel, tap); `pitch`: from step to step of its vector.
// Returns the sum of the codes.
template <bool kWide>
int64_t pack_channels(const Packed<kWide>& p, const int8_t* codes, int64_t taps, int64_t begin, int64_t end,
                      int64_t pitch, typename Packed<kWide>::Weight* weights) {
  constexpr int64_t kStep = Packed<kWide>::kStep;
  int64_t sum = 0;
  for (int64_t i = begin; i < end; ++i)
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int32_t c = codes[i * taps + tap];
      const int64_t at = p.place(tap) + i;
      weights[at / kStep * pitch + at % kStep] =
          static_cast<typename Packed<kWide>::Weight>(p.form.pack_mul * c + p.form.pack_add);
      sum += c;
    }
  return sum;
}

// Vectors come in pairs, interleaved by step, a last odd one alone: the weights of vector v of a group start at
// (v & ~1) * steps, and follow each other at 2 vectors' distance, or 1.
template <bool kWide>
void pack(const ConvShape& s, const int8_t* codes, const int32_t* pad, void* packed) {
  using P = Packed<kWide>;
  using Weight = typename P::Weight;
  constexpr int64_t kTogether = 16;  // channels whose packed weights for a pair of vectors stay in the L1 cache
  const P p(s);
  uint8_t* base = static_cast<uint8_t*>(packed);
  std::memset(packed, 0, static_cast<size_t>(p.bytes));
  stage_padding(s, p.stage, pad, reinterpret_cast<typename P::Staged*>(base + p.padding_at));
  int32_t* correction = reinterpret_cast<int32_t*>(base + p.correction_at);
  const int64_t taps = s.kernel_h * s.kernel_w, row = s.group_in() * taps;
  Chunk chunk(p.form.largest_input);
  for (int64_t group = 0; group < s.groups; ++group)
    for (int64_t v = 0; v < p.vectors; v += 2) {
      const int64_t pitch = (v + 1 < p.vectors ? 2 : 1) * kLanes * P::kStep;
      const int64_t first = v * kLanes, last = min64(first + 2 * kLanes, s.group_out());
      Weight* weights = reinterpret_cast<Weight*>(base + p.weights_at + (group * p.vectors + v) * p.steps * 32);
      const int8_t* of_group = codes + group * s.group_out() * row;
      int64_t sums[2 * kLanes] = {};
      for (int64_t i = 0; i < s.group_in(); i += kTogether)
        for (int64_t o = first; o < last; ++o)
          sums[o - first] += pack_channels<kWide>(p, of_group + o * row, taps, i, min64(i + kTogether, s.group_in()),
                                                  pitch, weights + (o - first) * P::kStep);
      for (int64_t o = first; o < last; ++o) {
        const uint32_t sum = static_cast<uint32_t>(sums[o - first]) * static_cast<uint32_t>(s.mul) +
                             static_cast<uint32_t>(row) * static_cast<uint32_t>(s.add);  // of the full weights
        correction[group * p.vectors * kLanes + o] = static_cast<int32_t>(sum * static_cast<uint32_t>(-p.form.offset));
      }
      if constexpr (!kWide) chunk.add(weights, p.steps, pitch / 2);
    }
  *static_cast<int64_t*>(packed) = chunk.steps(p.steps);
}

template <bool kWide>
void stage(const ConvShape& s, const void* packed, const void* image, void* staged, int64_t row_begin,
           int64_t row_end) {
  const Packed<kWide> p(s);
  const auto* padding =
      reinterpret_cast<const typename Packed<kWide>::Staged*>(static_cast<const uint8_t*>(packed) + p.padding_at);
  stage_rows(s, p.stage, padding, image, staged, row_begin, row_end);
}

template <int kVectors>
inline void clear(__m256i (&sum)[kPixels][kVectors]) {
  for (auto& row : sum)
    for (auto& v : row) v = _mm256_setzero_si256();
}

// Steps between fetches, at most: lines of which too many are asked for at once are waited for.
constexpr int64_t kFetch = 128;

// The raw sums of a block: windows start at x[i].
template <bool kWide, int kVectors>
inline void block(const Packed<kWide>& p, int64_t chunk, const uint8_t* const* x, const __m256i* w, Ahead* ahead,
                  __m256i (&total)[kPixels][kVectors]) {
  const int64_t run_steps = p.runs.elements / Packed<kWide>::kStep;
  const uint8_t* at[kPixels];
  __m256i sum[kPixels][kVectors];
  clear(sum);
  if (!kWide && chunk >= p.steps) {  // int16 holds the whole sum
    for (int64_t run = 0; run < p.runs.count; ++run, w += run_steps * kVectors) {
      const int64_t offset = p.runs.offset(run);
      for (int64_t s = 0; s < run_steps; s += kFetch) {
        const int64_t count = min64(kFetch, run_steps - s);
        for (int i = 0; i < kPixels; ++i) at[i] = x[i] + offset + 4 * s;
        ahead->fetch(count);
        multiply<kWide, kPixels, kVectors>(at, w + s * kVectors, count, sum);
      }
    }
    for (int i = 0; i < kPixels; ++i)
      for (int j = 0; j < kVectors; ++j) total[i][j] = _mm256_madd_epi16(sum[i][j], _mm256_set1_epi16(1));
    return;
  }
  if (!kWide) clear(total);
  const auto widen = [&] {
    for (int i = 0; i < kPixels; ++i)
      for (int j = 0; j < kVectors; ++j)
        total[i][j] = _mm256_add_epi32(total[i][j], _mm256_madd_epi16(sum[i][j], _mm256_set1_epi16(1)));
  };
  int64_t left = chunk;  // steps until the int16 sums may be full
  for (int64_t run = 0; run < p.runs.count; ++run) {
    const int64_t offset = p.runs.offset(run);
    for (int64_t s = 0; s < run_steps;) {
      const int64_t count = min64(kWide ? run_steps : min64(left, kFetch), run_steps - s);
      for (int i = 0; i < kPixels; ++i) at[i] = x[i] + offset + 4 * s;
      ahead->fetch(count);
      multiply<kWide, kPixels, kVectors>(at, w, count, sum);
      w += count * kVectors;
      s += count;
      left -= count;
      if (!kWide && left == 0) {
        widen();
        clear(sum);
        left = chunk;
      }
    }
  }
  if (kWide) {
    for (int i = 0; i < kPixels; ++i)
      for (int j = 0; j < kVectors; ++j) total[i][j] = sum[i][j];
  } else {
    widen();
  }
}

// Up to kTile pixels of the output.
struct Tile {
  int64_t pixels;
  const uint8_t* window[kTile + kPixels];  // where each pixel's window starts; the last one repeated to fill a block
  int32_t sums[kTile + kPixels];           // of the window's activations
};

// kVectors vectors of output channels, `channels` of them real, for all pixels of a tile.
template <bool kWide, int kVectors>
void convolve(const Packed<kWide>& p, int64_t chunk, const Tile& tile, const __m256i* w, const __m256i* next,
              const int32_t* correction, int64_t channels, int32_t* out, int64_t out_pitch) {
  const __m256i mul = _mm256_set1_epi32(p.form.mul);
  Ahead ahead{reinterpret_cast<const char*>(next), (tile.pixels + kPixels - 1) / kPixels};
  for (int64_t first = 0; first < tile.pixels; first += kPixels) {
    __m256i total[kPixels][kVectors];
    block<kWide, kVectors>(p, chunk, tile.window + first, w, &ahead, total);
    for (int i = 0; i < kPixels && first + i < tile.pixels; ++i) {
      int32_t* to = out + (first + i) * out_pitch;
      alignas(32) int32_t row[kVectors * kLanes];
      int32_t* at = channels == kVectors * kLanes ? to : row;
      for (int j = 0; j < kVectors; ++j) {
        __m256i v = total[i][j];
        if (!kWide) {
          if (!p.form.whole) v = _mm256_add_epi32(_mm256_mullo_epi32(v, mul), _mm256_set1_epi32(tile.sums[first + i]));
          v = _mm256_add_epi32(v, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(correction) + j));
        }
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at) + j, v);
      }
      if (at == row) std::memcpy(to, row, static_cast<size_t>(channels) * 4);
    }
  }
}

// add * the sum of the activations of the window at (y, x), wrapping.
template <bool kWide>
int32_t window_sum(const ConvShape& s, const Packed<kWide>& p, const uint8_t* staged, int64_t group, int64_t y,
                   int64_t x) {
  uint32_t sum = 0;
  for (int64_t ky = 0; ky < s.kernel_h; ++ky) {
    const uint8_t* row = staged + (y * s.stride_h + ky * s.dilation_h) * p.stage.row_bytes + p.stage.sums_at;
    const int32_t* sums = reinterpret_cast<const int32_t*>(row) + group * p.stage.columns + x * s.stride_w;
    for (int64_t kx = 0; kx < s.kernel_w; ++kx) sum += static_cast<uint32_t>(sums[kx * s.dilation_w]);
  }
  return static_cast<int32_t>(sum * static_cast<uint32_t>(p.form.add));
}

template <bool kWide>
void run(const ConvShape& s, const void* packed, const void* staged, int32_t* out, int64_t row_begin, int64_t row_end) {
  const Packed<kWide> p(s);
  const uint8_t* base = static_cast<const uint8_t*>(packed);
  const uint8_t* rows = static_cast<const uint8_t*>(staged);
  const int64_t chunk = *static_cast<const int64_t*>(packed);
  const int32_t* correction = reinterpret_cast<const int32_t*>(base + p.correction_at);
  const __m256i* weights = reinterpret_cast<const __m256i*>(base + p.weights_at);
  const int64_t pixel_bytes = p.stage.lanes * static_cast<int64_t>(sizeof(typename Packed<kWide>::Staged));
  Tile tile;
  const int64_t end = row_end * s.out_w;
  for (int64_t begin = row_begin * s.out_w; begin < end; begin += tile.pixels) {
    tile.pixels = min64(kTile, end - begin);
    for (int64_t group = 0; group < s.groups; ++group) {
      int64_t y = begin / s.out_w, x = begin % s.out_w;
      for (int64_t i = 0; i < tile.pixels; ++i) {
        tile.window[i] =
            rows + y * s.stride_h * p.stage.row_bytes + (group * p.stage.columns + x * s.stride_w) * pixel_bytes;
        if (p.stage.sums) tile.sums[i] = window_sum(s, p, rows, group, y, x);
        if (++x == s.out_w) x = 0, ++y;
      }
      for (int64_t i = tile.pixels; i < tile.pixels + kPixels; ++i) tile.window[i] = tile.window[tile.pixels - 1];
      for (int64_t v = 0; v < p.vectors; v += 2) {
        const int64_t first = group * p.vectors + v;
        const __m256i* w = weights + first * p.steps;
        const __m256i* next = weights + (first + 2) % (s.groups * p.vectors) * p.steps;
        const int64_t channels = min64(2 * kLanes, s.group_out() - v * kLanes);
        int32_t* to = out + begin * s.out_c + group * s.group_out() + v * kLanes;
        if (v + 1 < p.vectors)
          convolve<kWide, 2>(p, chunk, tile, w, next, correction + first * kLanes, channels, to, s.out_c);
        else
          convolve<kWide, 1>(p, chunk, tile, w, next, correction + first * kLanes, channels, to, s.out_c);
      }
    }
  }
}

}  // namespace

int64_t avx2_narrow_steps(const ConvShape& s) {
  const Form form(s, false);
  if (form.largest_input > UINT8_MAX) return 0;
  return INT16_MAX / (2 * max64(form.largest_weight, 1) * max64(form.largest_input, 1));
}
bool avx2_narrow_fits(const ConvShape& s) { return avx2_narrow_steps(s) >= kLeastChunk; }

extern const ConvKernel kAvx2Wide = {"avx2-wide",   packed_bytes<true>, pack<true>, staged_row_bytes<true>,
                                     stage<true>,   run<true>,          nullptr,    nullptr,
                                     &kAvx2WidePeak};
extern const ConvKernel kAvx2Narrow = {"avx2-narrow",           packed_bytes<false>, pack<false>,
                                       staged_row_bytes<false>, stage<false>,        run<false>};

}  // namespace bitstrata
