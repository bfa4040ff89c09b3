// Direct convolution with AVX-512 VNNI: sixteen output channels a vector, several vectors and output pixels a block.
//
// One step multiplies four bytes of each pixel's window, broadcast to all lanes, with a vector of weights that holds,
// for each of sixteen output channels, the four bytes that belong to them, and adds the four products to an int32
// (vpdpbusd, which does not saturate). Signed activations are staged with an offset that makes them unsigned; what the
// offset adds is constant in each channel, and taken off where the sums begin. Weights mul*c + add that leave s8 are
// applied as mul * sum(c*a) + add * sum(a).
#include <immintrin.h>

#include "../common/unroll.h"
#include "../common/windows.h"
#include "avx512vnni.h"
#include "conv_narrow.h"
#include "conv_pack.h"
#include "results.h"
#include "stage.h"
#include "steps.h"

namespace bitstrata {
namespace {

constexpr int kPixels = 8;  // of a block, at most: their window's addresses fill the general registers
constexpr int kTile = 192;  // pixels convolved with all weights in turn, so that their windows stay in the L1 cache

// Pixels of a block: with the sums of its vectors, the weights and one broadcast in 32 registers.
constexpr int kMostSums = 24;
constexpr int pixels_of(int vectors) { return vectors == kVectors ? kMostSums / kVectors : kPixels; }

int64_t packed_bytes(const ConvShape& s) { return Packed(s, false).bytes; }
int64_t staged_row_bytes(const ConvShape& s) { return Packed(s, false).stage.row_bytes; }
int64_t no_staged_row_bytes(const ConvShape&) { return 0; }

// Pixels of three channels to pixels of four, the last of them 0.
void widen(const uint8_t* from, int64_t pixels, int32_t offset, uint8_t* to) {
  const __m512i quarters = _mm512_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11);
  const __m512i places = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1));
  const __m512i added = _mm512_set1_epi32(offset * 0x010101);
  for (int64_t i = 0; i < pixels; i += 16, from += 48, to += 64) {
    const int64_t count = min64(16, pixels - i);
    const __mmask64 in = ~uint64_t{0} >> (64 - 3 * count), out = ~uint64_t{0} >> (64 - 4 * count);
    const __m512i x = _mm512_permutexvar_epi32(quarters, _mm512_maskz_loadu_epi8(in, from));
    _mm512_mask_storeu_epi8(to, out, _mm512_add_epi8(_mm512_shuffle_epi8(x, places), added));
  }
}

void stage(const ConvShape& s, const void* packed, const void* image, void* staged, int64_t row_begin,
           int64_t row_end) {
  const Packed p(s, false);
  const uint8_t* padding = static_cast<const uint8_t*>(packed) + p.padding_at;
  if (s.in_c == 3 && s.groups == 1 && !p.stage.sums && p.stage.lanes == kStep)
    stage_rows_by(s, p.stage, padding, image, staged, row_begin, row_end,
                  [&](const uint8_t* from, int64_t pixels, uint8_t* to) { widen(from, pixels, p.form.offset, to); });
  else
    stage_rows(s, p.stage, padding, image, staged, row_begin, row_end);
}

void stage_nothing(const ConvShape&, const void*, const void*, void*, int64_t, int64_t) {}

// Adds the products of kP pixels' windows, which start at x[i], and kV vectors of weights to the sums.
template <int kP, int kV>
BITSTRATA_INLINE void multiply(const Packed& p, const uint8_t* const* x, const __m512i* w, const __m512i* ahead,
                               __m512i (&sum)[kP][kV]) {
  const int64_t rows = p.runs.count / p.runs.per_row;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < p.runs.per_row; ++column)
      multiply_run<kP, kV>(x, row * p.runs.row_step + column * p.runs.column_step, p.runs.elements, w, ahead, sum);
}

// add * the sum of the activations of each pixel of an image.
void pixel_sums(const uint8_t* x, int64_t channels, int32_t add, int64_t pixels, int32_t* out) {
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t i = 0; i < pixels; ++i, x += channels) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t c = 0; c < channels; c += 64) {
      const __mmask64 mask = ~uint64_t{0} >> (64 - min64(64, channels - c));
      sum = _mm512_dpbusd_epi32(sum, _mm512_maskz_loadu_epi8(mask, x + c), ones);
    }
    out[i] = static_cast<int32_t>(static_cast<uint32_t>(_mm512_reduce_add_epi32(sum)) * static_cast<uint32_t>(add));
  }
}

// What the blocks of a tile need. A block's first pixel is at window[0], window_sum[0], out.
template <typename Out>
struct Block {
  const Packed& p;
  const uint8_t* const* window;  // where each pixel's window starts
  const int32_t* window_sum;     // add * the sum of its activations
  const __m512i* weights;
  const __m512i* ahead;  // weights that are used next, at least as many as there are steps
  const int32_t* correction;
  int64_t channels;  // that are real
  Results<Out> out;
};

template <int kP, int kV, typename Out>
void convolve(const Block<Out>& b) {
  __m512i sum[kP][kV];
  const bool whole = b.p.form.whole;
  // Else the sums would wait for the memory they are written to.
  each<kP>([&](auto i) { each<kV>([&](auto j) { __builtin_prefetch(b.out.at(i, j), 1); }); });
  each<kV>([&](auto j) {
    const __m512i first = whole ? _mm512_loadu_si512(b.correction + j * kLanes) : _mm512_setzero_si512();
    each<kP>([&](auto i) { sum[i][j] = first; });
  });
  multiply<kP, kV>(b.p, b.window, b.weights, b.ahead, sum);
  if (!whole) {
    const __m512i mul = _mm512_set1_epi32(b.p.form.mul);
    each<kV>([&](auto j) {
      const __m512i correction = _mm512_loadu_si512(b.correction + j * kLanes);
      each<kP>([&](auto i) {
        sum[i][j] = _mm512_add_epi32(_mm512_mullo_epi32(sum[i][j], mul),
                                     _mm512_add_epi32(correction, _mm512_set1_epi32(b.window_sum[i])));
      });
    });
  }
  const int64_t last = b.channels - (kV - 1) * kLanes;
  const __mmask16 mask = static_cast<__mmask16>((1u << last) - 1);
  each<kV>([&](auto j) {
    b.out.template vector<j == kV - 1>(j, mask,
                                       [&](const auto& store) { each<kP>([&](auto i) { store(i, sum[i][j]); }); });
  });
}

template <typename Out>
using BlockFn = void (*)(const Block<Out>&);
template <int kV>
constexpr BlockFn<int32_t> kOfSums[kPixels] = {
    convolve<1, kV, int32_t>, convolve<2, kV, int32_t>, convolve<3, kV, int32_t>, convolve<4, kV, int32_t>,
    convolve<5, kV, int32_t>, convolve<6, kV, int32_t>, convolve<7, kV, int32_t>, convolve<8, kV, int32_t>};
constexpr const BlockFn<int32_t>* kSumsBySet[kVectors] = {kOfSums<1>, kOfSums<2>, kOfSums<3>, kOfSums<4>};

// Codes are made of sums in registers in blocks of the two largest sizes, of which there are most.
template <int kV>
constexpr BlockFn<uint8_t> kOfCodes[2] = {convolve<pixels_of(kV), kV, uint8_t>,
                                          convolve<pixels_of(kV) - 1, kV, uint8_t>};
constexpr const BlockFn<uint8_t>* kCodesBySet[kVectors] = {kOfCodes<1>, kOfCodes<2>, kOfCodes<3>, kOfCodes<4>};

void convolve_block(const Block<int32_t>& b, int64_t vectors, int64_t pixels) {
  kSumsBySet[vectors - 1][pixels - 1](b);
}

// In others of sums in memory, which takes longer, but the code for all sizes would be as large again as that for sums.
void convolve_block(const Block<uint8_t>& b, int64_t vectors, int64_t pixels) {
  const int64_t fewer = pixels_of(static_cast<int>(vectors)) - pixels;
  if (fewer < 2) return kCodesBySet[vectors - 1][fewer](b);
  alignas(64) int32_t sums[kMostSums * kLanes];
  const int64_t pitch = vectors * kLanes;
  kSumsBySet[vectors - 1][pixels - 1](
      {b.p, b.window, b.window_sum, b.weights, b.ahead, b.correction, pitch, {sums, pitch}});
  const auto of = [&](int64_t j) {
    return [&, j](const auto& store) {
      for (int64_t i = 0; i < pixels; ++i) store(i, _mm512_load_si512(sums + i * pitch + j * kLanes));
    };
  };
  for (int64_t j = 0; j + 1 < vectors; ++j) b.out.vector<false>(j, 0xFFFF, of(j));
  const int64_t j = vectors - 1;
  b.out.vector<true>(j, static_cast<__mmask16>((1u << (b.channels - j * kLanes)) - 1), of(j));
}

// All `pixels` of a tile, for one set of vectors: as few blocks as can be, of nearly equal size. The first blocks have
// the weights after the set's own fetched, `after` vectors: they would else be waited for, where a set has many.
template <typename Out>
void convolve_tile(Block<Out> b, int64_t vectors, int64_t after, int64_t pixels) {
  const int64_t most = pixels_of(static_cast<int>(vectors)), blocks = (pixels + most - 1) / most;
  for (int64_t left = blocks; left > 0; --left) {
    const int64_t count = (pixels + left - 1) / left;
    convolve_block(b, vectors, count);
    b.ahead = --after > 0 ? b.ahead + b.p.steps : b.weights;
    b.window += count, b.window_sum += count, b.out = b.out.from(count, 0);
    pixels -= count;
  }
}

// Output rows [row_begin, row_end), where NarrowConv fits.
template <typename Out>
void run_narrow(const ConvShape& s, const Packed& p, const uint8_t* base, const uint8_t* rows, const Results<Out>& out,
                int64_t row_begin, int64_t row_end) {
  const int32_t* correction = reinterpret_cast<const int32_t*>(base);
  const __m512i* weights = reinterpret_cast<const __m512i*>(base + p.weights_at);
  const int64_t lanes = p.stage.lanes;
  const __mmask16 channels = static_cast<__mmask16>((1u << s.group_out()) - 1);
  int32_t sums[kTile];
  for (int64_t y = row_begin; y < row_end; ++y)
    for (int64_t group = 0; group < s.groups; ++group)
      for (int64_t x = 0; x < s.out_w; x += kTile) {
        const int64_t pixels = min64(kTile, s.out_w - x);
        if (p.stage.sums) window_sums(s, p, rows, group, y, x, pixels, sums);
        NarrowConv<Out>::convolve(
            {rows + y * s.stride_h * p.row_bytes + (group * p.stage.columns + x) * lanes, lanes, p.runs.row_step,
             s.kernel_h, weights + group * p.steps, _mm512_loadu_si512(correction + group * kLanes), channels,
             p.form.mul, p.stage.sums ? sums : nullptr, out.from(y * s.out_w + x, group * s.group_out())},
            pixels);
      }
}

template <bool kDirect, typename Out>
void run_to(const ConvShape& s, const void* packed, const void* staged, const Results<Out>& out, int64_t row_begin,
            int64_t row_end) {
  const Packed p(s, kDirect);
  const uint8_t* base = static_cast<const uint8_t*>(packed);
  const uint8_t* rows = static_cast<const uint8_t*>(staged);
  if (!kDirect && narrow_fits(s)) return run_narrow(s, p, base, rows, out, row_begin, row_end);
  const int32_t* correction = reinterpret_cast<const int32_t*>(base);
  const __m512i* weights = reinterpret_cast<const __m512i*>(base + p.weights_at);
  const uint8_t* window[kTile];
  int32_t sums[kTile];
  const int64_t end = row_end * s.out_w;
  int64_t pixels;
  for (int64_t begin = row_begin * s.out_w; begin < end; begin += pixels) {
    pixels = min64(kTile, end - begin);
    for (int64_t group = 0; group < s.groups; ++group) {
      for (int64_t i = 0; i < pixels;) {
        const int64_t y = (begin + i) / s.out_w, x = (begin + i) % s.out_w, count = min64(s.out_w - x, pixels - i);
        const int64_t step = s.stride_w * p.stage.lanes;
        const uint8_t* first = rows + y * s.stride_h * p.row_bytes + group * p.stage.columns * p.stage.lanes + x * step;
        for (int64_t j = 0; j < count; ++j) window[i + j] = first + j * step;
        if (p.stage.sums && !kDirect) window_sums(s, p, rows, group, y, x, count, sums + i);
        if (p.stage.sums && kDirect)
          for (int64_t j = 0; j < count; ++j) pixel_sums(first + j * step, s.in_c, p.form.add, 1, sums + i + j);
        i += count;
      }
      for (int64_t set = 0; set < p.sets; ++set) {
        const int64_t v = p.first_vector(set), vectors = p.first_vector(set + 1) - v, first = group * p.vectors + v;
        const int64_t next = (first + vectors) % (s.groups * p.vectors), set_after = (set + 1) % p.sets;
        const int64_t after = p.first_vector(set_after + 1) - p.first_vector(set_after);
        convolve_tile<Out>(
            {p, window, sums, weights + first * p.steps, weights + next * p.steps, correction + first * kLanes,
             min64(vectors * kLanes, s.group_out() - v * kLanes), out.from(begin, group * s.group_out() + v * kLanes)},
            vectors, after, pixels);
      }
    }
  }
}

template <bool kDirect>
void run(const ConvShape& s, const void* packed, const void* staged, int32_t* out, int64_t row_begin, int64_t row_end) {
  run_to<kDirect, int32_t>(s, packed, staged, {out, s.out_c}, row_begin, row_end);
}

template <bool kDirect>
void run_codes(const ConvShape& s, const void* packed, const void* staged, const RequantArgs& requant, uint8_t* out,
               int64_t row_begin, int64_t row_end) {
  run_to<kDirect, uint8_t>(s, packed, staged, {out, s.out_c, &requant, 0}, row_begin, row_end);
}

}  // namespace

bool avx512vnni_direct_fits(const ConvShape& s) { return reads_image(s, WeightForm(s)); }

extern const ConvKernel kAvx512VnniConv = {"avx512vnni", packed_bytes, pack,      staged_row_bytes, stage,
                                           run<false>,   pack_parts,   pack_part, nullptr,          run_codes<false>};
extern const ConvKernel kAvx512VnniDirect = {
    "avx512vnni-direct", packed_bytes, pack,    no_staged_row_bytes, stage_nothing, run<true>,
    pack_parts,          pack_part,    nullptr, run_codes<true>};

}  // namespace bitstrata
