// Direct convolution with VNNI on 256 bits: eight output channels a vector, several output pixels and up to two vectors
// a block. See ../common/pointwise.h for the unnamed namespace.
//
// One step multiplies four bytes of each pixel's window, broadcast to all lanes, with a vector of weights that holds,
// for each of eight output channels, the four bytes that belong to them. Signed activations are staged with an offset
// that makes them unsigned; what it adds is constant in each channel, and taken off where the sums begin. Weights
// mul*c + add that leave s8 are applied as mul * sum(c*a) + add * sum(a).
#pragma once

#include <immintrin.h>

#include "../common/step_weights.h"
#include "../common/unroll.h"
#include "dot.h"

namespace bitstrata {
namespace {

constexpr int kLanes = 8;    // output channels of a vector
constexpr int kVectors = 2;  // of a set, at most: two serve each broadcast
constexpr int kPixels = 8;   // of a block, at most: their window's addresses fill the general registers
constexpr int kTile = 192;   // pixels convolved with all weights in turn, so that their windows stay in the L1 cache

// Pixels of a block: with the sums of its vectors, the weights and one broadcast in 16 registers.
constexpr int pixels_of(int vectors) { return vectors == kVectors ? 6 : kPixels; }

using Packed = StepWeights<kLanes, kVectors>;
Packed packed_of(const ConvShape& s, bool direct) { return Packed(s, WeightForm(s), direct, INT32_MAX); }

int64_t packed_bytes(const ConvShape& s) { return packed_of(s, false).bytes; }
int64_t staged_row_bytes(const ConvShape& s) { return packed_of(s, false).stage.row_bytes; }
int64_t no_staged_row_bytes(const ConvShape&) { return 0; }
int64_t pack_parts(const ConvShape& s) { return s.groups * packed_of(s, false).sets; }

void pack_part(const ConvShape& s, const WeightCodes& codes, const uint8_t* factor, const int32_t* pad, void* packed,
               int64_t part) {
  pack_set(s, packed_of(s, false), codes, factor, pad, packed, part);
}

void pack(const ConvShape& s, const int8_t* codes, const int32_t* pad, void* packed) {
  pack_sets(s, packed_of(s, false), codes, pad, packed);
}

void stage(const ConvShape& s, const void* packed, const void* image, void* staged, int64_t row_begin,
           int64_t row_end) {
  const Packed p = packed_of(s, false);
  stage_rows(s, p.stage, static_cast<const uint8_t*>(packed) + p.padding_at, image, staged, row_begin, row_end);
}

void stage_nothing(const ConvShape&, const void*, const void*, void*, int64_t, int64_t) {}

inline __m256i broadcast(const uint8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

inline __m256i load(const int32_t* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }

// Hides from the compiler where an address comes from. It would else keep parts of the sum that outlive the inner loop
// in vector registers, and move one to a general register for every load.
inline const uint8_t* in_register(const uint8_t* address) {
  __asm__("" : "+r"(address));
  return address;
}

// Adds the products of kP pixels' windows, which start at x[i], and kV vectors of weights to the sums.
template <int kP, int kV>
inline void multiply(const Packed& p, const uint8_t* const* x, const __m256i* w, __m256i (&sum)[kP][kV]) {
  const int64_t rows = p.runs.count / p.runs.per_row, run_bytes = p.runs.elements;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < p.runs.per_row; ++column) {
      const int64_t offset = row * p.runs.row_step + column * p.runs.column_step;
      const uint8_t* at[kP];
      each<kP>([&](auto i) { at[i] = in_register(x[i] + offset); });
      for (int64_t b = 0; b < run_bytes; b += Packed::kStep, w += kV) {
        __m256i weights[kV];
        each<kV>([&](auto j) { weights[j] = _mm256_load_si256(w + j); });
        each<kP>([&](auto i) {
          const __m256i a = broadcast(at[i] + b);
          each<kV>([&](auto j) { sum[i][j] = dot(sum[i][j], a, weights[j]); });
        });
      }
    }
}

// What the blocks of a tile need. A block's first pixel is at window[0], window_sum[0], out.
struct Block {
  const Packed& p;
  const uint8_t* const* window;  // where each pixel's window starts
  const int32_t* window_sum;     // add * the sum of its activations
  const __m256i* weights;
  const int32_t* correction;
  int64_t channels;  // that are real
  int32_t* out;
  int64_t out_pitch;
};

template <int kP, int kV>
void convolve(const Block& b) {
  __m256i sum[kP][kV];
  const bool whole = b.p.form.whole;
  each<kV>([&](auto j) {
    const __m256i first = whole ? load(b.correction + j * kLanes) : _mm256_setzero_si256();
    each<kP>([&](auto i) { sum[i][j] = first; });
  });
  multiply<kP, kV>(b.p, b.window, b.weights, sum);
  if (!whole) {
    const __m256i mul = _mm256_set1_epi32(b.p.form.mul);
    each<kV>([&](auto j) {
      const __m256i correction = load(b.correction + j * kLanes);
      each<kP>([&](auto i) {
        sum[i][j] = _mm256_add_epi32(_mm256_mullo_epi32(sum[i][j], mul),
                                     _mm256_add_epi32(correction, _mm256_set1_epi32(b.window_sum[i])));
      });
    });
  }
  const __m256i last = _mm256_set1_epi32(static_cast<int32_t>(b.channels - (kV - 1) * kLanes));
  const __m256i mask = _mm256_cmpgt_epi32(last, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  each<kP>([&](auto i) {
    int32_t* to = b.out + i * b.out_pitch;
    each<kV - 1>([&](auto j) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + j * kLanes), sum[i][j]); });
    _mm256_maskstore_epi32(to + (kV - 1) * kLanes, mask, sum[i][kV - 1]);
  });
}

using BlockFn = void (*)(const Block&);
template <int kV>
constexpr BlockFn kBlocks[kPixels] = {convolve<1, kV>, convolve<2, kV>, convolve<3, kV>, convolve<4, kV>,
                                      convolve<5, kV>, convolve<6, kV>, convolve<7, kV>, convolve<8, kV>};
constexpr const BlockFn* kBySet[kVectors] = {kBlocks<1>, kBlocks<2>};

// All `pixels` of a tile, for one set of vectors: as few blocks as can be, of nearly equal size.
void convolve_tile(Block b, int64_t vectors, int64_t pixels) {
  const BlockFn* by_pixels = kBySet[vectors - 1];
  const int64_t most = pixels_of(static_cast<int>(vectors)), blocks = (pixels + most - 1) / most;
  for (int64_t left = blocks; left > 0; --left) {
    const int64_t count = (pixels + left - 1) / left;
    by_pixels[count - 1](b);
    b.window += count, b.window_sum += count, b.out += count * b.out_pitch;
    pixels -= count;
  }
}

template <bool kDirect>
void run(const ConvShape& s, const void* packed, const void* staged, int32_t* out, int64_t row_begin, int64_t row_end) {
  const Packed p = packed_of(s, kDirect);
  const uint8_t* base = static_cast<const uint8_t*>(packed);
  const uint8_t* rows = static_cast<const uint8_t*>(staged);
  const int32_t* correction = reinterpret_cast<const int32_t*>(base);
  const __m256i* weights = reinterpret_cast<const __m256i*>(base + p.weights_at);
  const uint8_t* window[kTile];
  int32_t sums[kTile];
  const int64_t end = row_end * s.out_w;
  int64_t pixels;
  for (int64_t begin = row_begin * s.out_w; begin < end; begin += pixels) {
    pixels = end - begin < kTile ? end - begin : kTile;
    for (int64_t group = 0; group < s.groups; ++group) {
      const uint8_t* of_group = rows + group * p.stage.columns * p.stage.lanes;
      int64_t y = begin / s.out_w, x = begin % s.out_w;
      for (int64_t i = 0; i < pixels; ++i) {
        window[i] = of_group + y * s.stride_h * p.row_bytes + x * s.stride_w * p.stage.lanes;
        if (p.stage.sums) sums[i] = window_sum(s, p, rows, group, y, x);
        if (++x == s.out_w) x = 0, ++y;
      }
      for (int64_t set = 0; set < p.sets; ++set) {
        const int64_t v = p.first_vector(set), vectors = p.first_vector(set + 1) - v, first = group * p.vectors + v;
        const int64_t left = s.group_out() - v * kLanes;
        convolve_tile({p, window, sums, weights + first * p.steps, correction + first * kLanes,
                       left < vectors * kLanes ? left : vectors * kLanes,
                       out + begin * s.out_c + group * s.group_out() + v * kLanes, s.out_c},
                      vectors, pixels);
      }
    }
  }
}

bool direct_fits(const ConvShape& s) { return WeightForm(s).whole && reads_image(s, WeightForm(s)); }

constexpr ConvKernel kStaged = {"avx2vnni", packed_bytes, pack,       staged_row_bytes,
                                stage,      run<false>,   pack_parts, pack_part};
constexpr ConvKernel kDirect = {"avx2vnni-direct", packed_bytes, pack,       no_staged_row_bytes,
                                stage_nothing,     run<true>,    pack_parts, pack_part};

}  // namespace
}  // namespace bitstrata
