// Depthwise convolution with AVX-512 VNNI: 64 channels a block, products of four rows' taps at a time.
//
// For each output row, the bytes of four input rows are interleaved, so that the four that belong to a channel and a
// column are neighbours; one step (vpdpbusd) multiplies them with four weights of a kernel column. An interleaved
// column serves all outputs whose window holds it. Signed activations are staged with an offset that makes them
// unsigned, and which is taken off where the sums begin.
#include <immintrin.h>

#include "../common/conv_stage.h"
#include "../common/unroll.h"
#include "../common/weight_form.h"
#include "avx512vnni.h"
#include "results.h"
#include "stage.h"

namespace bitstrata {
namespace {

constexpr int64_t kBlock = 64;     // channels of a block, in four quarters
constexpr int kLanes = 16;         // channels of a quarter
constexpr int64_t kRows = 4;       // of a step
constexpr int64_t kMostSteps = 2;  // of a kernel's column
constexpr int64_t kColumns = 40;   // interleaved at once
constexpr int kPixels = 4;

int64_t min64(int64_t a, int64_t b) { return b < a ? b : a; }

// To the staging, the channels are one group, filled up to whole blocks.
ConvShape merged(ConvShape s) {
  s.groups = 1;
  return s;
}

int64_t span(const ConvShape& s) { return (s.kernel_w - 1) * s.dilation_w + 1; }

// int32 correction[lanes]; padding[lanes]; s8 weights[block][kernel_w][step][quarter][kLanes][kRows].
struct Packed {
  explicit Packed(const ConvShape& s)
      : form(s),
        stage(merged(s), round_up(s.in_c, kBlock), form.offset, false),
        steps((s.kernel_h + kRows - 1) / kRows),
        padding_at(stage.lanes * 4),
        weights_at(round_up(padding_at + stage.lanes, 64)),
        block_vectors(s.kernel_w * steps * 4),
        bytes(weights_at + stage.lanes / kBlock * block_vectors * 64) {}
  WeightForm form;
  Staging<uint8_t> stage;
  int64_t steps;
  int64_t padding_at, weights_at;
  int64_t block_vectors;  // of weights
  int64_t bytes;
};

int64_t packed_bytes(const ConvShape& s) { return Packed(s).bytes; }
int64_t staged_row_bytes(const ConvShape& s) { return Packed(s).stage.row_bytes; }

// Transposes a block's 4 x 4 groups of four channels, so that the interleaving, which works within 128 bits, leaves the
// channels in order.
inline __m512i transposed(__m512i block) {
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), block);
}

void pack(const ConvShape& s, const int8_t* codes, const int32_t* pad, void* packed) {
  const Packed p(s);
  uint8_t* base = static_cast<uint8_t*>(packed);
  std::memset(packed, 0, static_cast<size_t>(p.bytes));
  uint8_t* padding = base + p.padding_at;
  stage_padding(merged(s), p.stage, pad, padding);
  for (int64_t c = 0; c < p.stage.lanes; c += kBlock)
    _mm512_storeu_si512(padding + c, transposed(_mm512_loadu_si512(padding + c)));
  int32_t* correction = reinterpret_cast<int32_t*>(base);
  int8_t* weights = reinterpret_cast<int8_t*>(base + p.weights_at);
  for (int64_t c = 0; c < s.in_c; ++c) {
    int32_t sum = 0;
    for (int64_t ky = 0; ky < s.kernel_h; ++ky)
      for (int64_t kx = 0; kx < s.kernel_w; ++kx) {
        const int32_t weight = weight_at(s, codes, c, 0, ky, kx);
        const int64_t vector = (c / kBlock * s.kernel_w + kx) * p.steps + ky / kRows;
        weights[(vector * kBlock + c % kBlock) * kRows + ky % kRows] =
            static_cast<int8_t>(p.form.pack_mul * codes[(c * s.kernel_h + ky) * s.kernel_w + kx] + p.form.pack_add);
        sum += weight;
      }
    correction[c] = -sum * p.stage.offset;
  }
}

// Stages rows.
void stage(const ConvShape& s, const void* packed, const void* image, void* staged, int64_t row_begin,
           int64_t row_end) {
  const Packed p(s);
  const __m512i offset = _mm512_set1_epi8(static_cast<char>(p.stage.offset));
  const auto copy = [&](const uint8_t* from, int64_t pixels, uint8_t* to) {
    for (int64_t i = 0; i < pixels; ++i, from += s.in_c, to += p.stage.lanes)
      for (int64_t c = 0; c < s.in_c; c += kBlock) {
        const __mmask64 mask = ~uint64_t{0} >> (kBlock - min64(kBlock, s.in_c - c));
        const __m512i x = _mm512_add_epi8(_mm512_maskz_loadu_epi8(mask, from + c), offset);
        _mm512_storeu_si512(to + c, transposed(x));
      }
  };
  stage_rows_by(s, p.stage, static_cast<const uint8_t*>(packed) + p.padding_at, image, staged, row_begin, row_end,
                copy);
}

// Interleaves kCount rows, `pitch` bytes apart, of a column of a block: four vectors, a quarter each.
template <int kCount>
BITSTRATA_INLINE void interleave_column(const uint8_t* x, int64_t pitch, __m512i* to) {
  __m512i row[kRows];
  each<kRows>([&](auto r) { row[r] = r < kCount ? _mm512_loadu_si512(x + r * pitch) : _mm512_setzero_si512(); });
  const __m512i low = _mm512_unpacklo_epi8(row[0], row[1]), high = _mm512_unpackhi_epi8(row[0], row[1]);
  const __m512i low2 = _mm512_unpacklo_epi8(row[2], row[3]), high2 = _mm512_unpackhi_epi8(row[2], row[3]);
  to[0] = _mm512_unpacklo_epi16(low, low2);
  to[1] = _mm512_unpackhi_epi16(low, low2);
  to[2] = _mm512_unpacklo_epi16(high, high2);
  to[3] = _mm512_unpackhi_epi16(high, high2);
}

// `columns` columns; each is followed at `distance` vectors by the next.
template <int kCount>
void interleave(const uint8_t* x, int64_t pitch, int64_t column_bytes, int64_t columns, int64_t distance, __m512i* to) {
  for (int64_t i = 0; i < columns; ++i) interleave_column<kCount>(x + i * column_bytes, pitch, to + i * distance);
}
using InterleaveFn = void (*)(const uint8_t*, int64_t, int64_t, int64_t, int64_t, __m512i*);
constexpr InterleaveFn kInterleave[kRows] = {interleave<1>, interleave<2>, interleave<3>, interleave<4>};

struct Line {
  const __m512i* columns;  // interleaved: [column][step][quarter], from the first pixel's window on
  const __m512i* weights;  // [kernel_w][step][quarter]
  const int32_t* correction;
  int64_t kernel_w, steps, stride, dilation;
  int64_t channels;  // that are real
  int32_t mul, add;  // where weights are not packed as they are: mul * their products + add * the activations
  int32_t* out;
  int64_t out_pitch;
};

// A pixel's sums in the first kQ quarters of a block: of products and, unless weights are packed as they are (kWhole),
// of activations.
template <int kQ, bool kWhole>
struct Sums {
  BITSTRATA_INLINE void begin(const Line& l) {
    each<kQ>([&](auto q) {
      products[q] = kWhole ? _mm512_loadu_si512(l.correction + q * kLanes) : _mm512_setzero_si512();
      if constexpr (!kWhole) activations[q] = _mm512_setzero_si512();
    });
  }
  BITSTRATA_INLINE void multiply(int q, __m512i x, __m512i w) {
    products[q] = _mm512_dpbusd_epi32(products[q], x, w);
    if constexpr (!kWhole) activations[q] = _mm512_dpbusd_epi32(activations[q], x, _mm512_set1_epi8(1));
  }
  BITSTRATA_INLINE __m512i total(const Line& l, int q) const {
    if constexpr (kWhole) return products[q];
    const __m512i both = _mm512_add_epi32(_mm512_mullo_epi32(products[q], _mm512_set1_epi32(l.mul)),
                                          _mm512_mullo_epi32(activations[q], _mm512_set1_epi32(l.add)));
    return _mm512_add_epi32(both, _mm512_loadu_si512(l.correction + q * kLanes));
  }
  BITSTRATA_INLINE void store(const Line& l, int64_t pixel) const {
    const __mmask16 mask = static_cast<__mmask16>((1u << (l.channels - (kQ - 1) * kLanes)) - 1);
    int32_t* to = l.out + pixel * l.out_pitch;
    each<kQ - 1>([&](auto q) { _mm512_storeu_si512(to + q * kLanes, total(l, q)); });
    _mm512_mask_storeu_epi32(to + (kQ - 1) * kLanes, mask, total(l, kQ - 1));
  }
  __m512i products[kQ], activations[kWhole ? 1 : kQ];
};

// kP pixels, the first kQ quarters of a block.
template <int kP, int kQ, bool kWhole>
BITSTRATA_INLINE void convolve(const Line& l, int64_t pixel) {
  Sums<kQ, kWhole> sums[kP];
  each<kP>([&](auto i) { sums[i].begin(l); });
  const __m512i* w = l.weights;
  for (int64_t kx = 0; kx < l.kernel_w; ++kx)
    for (int64_t step = 0; step < l.steps; ++step, w += 4) {
      const __m512i* x = l.columns + ((pixel * l.stride + kx * l.dilation) * l.steps + step) * 4;
      each<kP>(
          [&](auto i) { each<kQ>([&](auto q) { sums[i].multiply(q, x[i * l.stride * l.steps * 4 + q], w[q]); }); });
    }
  each<kP>([&](auto i) { sums[i].store(l, pixel + i); });
}

template <int kQ, bool kWhole>
void convolve_line(const Line& l, int64_t pixels) {
  constexpr int kTogether = kWhole ? kPixels : kPixels / 2;
  int64_t i = 0;
  for (; i + kTogether <= pixels; i += kTogether) convolve<kTogether, kQ, kWhole>(l, i);
  for (; i < pixels; ++i) convolve<1, kQ, kWhole>(l, i);
}
using LineFn = void (*)(const Line&, int64_t);
template <bool kWhole>
constexpr LineFn kLine[4] = {convolve_line<1, kWhole>, convolve_line<2, kWhole>, convolve_line<3, kWhole>,
                             convolve_line<4, kWhole>};

// A line of a kernel three wide, without stride, dilation or a second step: each column is interleaved in registers and
// added to the three pixels whose windows hold it. x: the first column, of kCount rows.
template <int kQ, int kCount, bool kWhole>
void slide(const Line& l, const uint8_t* x, int64_t pitch, int64_t column_bytes, int64_t pixels) {
  Sums<kQ, kWhole> sums[3];
  each<3>([&](auto i) { sums[i].begin(l); });
  // A column starts its own pixel's sums, and completes those of the pixel two before it.
  const auto add = [&](int64_t column, auto first, auto second, auto third) {
    __m512i quarter[4];
    interleave_column<kCount>(x + column * column_bytes, pitch, quarter);
    sums[first].begin(l);
    each<kQ>([&](auto q) {
      sums[first].multiply(q, quarter[q], l.weights[q]);
      sums[second].multiply(q, quarter[q], l.weights[4 + q]);
      sums[third].multiply(q, quarter[q], l.weights[8 + q]);
    });
    if (column >= 2) sums[third].store(l, column - 2);
  };
  constexpr std::integral_constant<int, 0> zero;
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 2> two;
  for (int64_t column = 0; column < pixels + 2; column += 3) {
    add(column, zero, two, one);
    if (column + 1 < pixels + 2) add(column + 1, one, zero, two);
    if (column + 2 < pixels + 2) add(column + 2, two, one, zero);
  }
}
using SlideFn = void (*)(const Line&, const uint8_t*, int64_t, int64_t, int64_t);
template <int kQ, bool kWhole>
constexpr SlideFn kSlides[kRows] = {slide<kQ, 1, kWhole>, slide<kQ, 2, kWhole>, slide<kQ, 3, kWhole>,
                                    slide<kQ, 4, kWhole>};
template <bool kWhole>
constexpr const SlideFn* kSlide[4] = {kSlides<1, kWhole>, kSlides<2, kWhole>, kSlides<3, kWhole>, kSlides<4, kWhole>};

bool slides(const ConvShape& s) {
  return s.kernel_w == 3 && s.stride_w == 1 && s.dilation_w == 1 && s.kernel_h <= kRows;
}

// A line's sums where they are wanted, or on their way to codes.
struct ToSums {
  static constexpr int64_t kMost = INT64_MAX;  // pixels of a line
  void begin(int64_t pixel, int64_t channel, Line* line) {
    line->out = out + pixel * pitch + channel, line->out_pitch = pitch;
  }
  void end(int64_t, int64_t, const Line&, int64_t) {}
  int32_t* out;
  int64_t pitch;
};

struct ToCodes {
  static constexpr int64_t kMost = kColumns;
  void begin(int64_t, int64_t, Line* line) { line->out = sums, line->out_pitch = kBlock; }
  void end(int64_t pixel, int64_t channel, const Line& line, int64_t pixels) {
    const Results<uint8_t> codes = out.from(pixel, channel);
    for (int64_t q = 0; q * kLanes < line.channels; ++q) {
      const int64_t left = min64(kLanes, line.channels - q * kLanes);
      codes.vector<true>(q, static_cast<__mmask16>((1u << left) - 1), [&](const auto& store) {
        for (int64_t i = 0; i < pixels; ++i) store(i, _mm512_load_si512(sums + i * kBlock + q * kLanes));
      });
    }
  }
  Results<uint8_t> out;
  alignas(64) int32_t sums[kColumns * kBlock];
};

template <bool kWhole, typename To>
void run_to(const ConvShape& s, const void* packed, const void* staged, int64_t row_begin, int64_t row_end, To* to) {
  const Packed p(s);
  const uint8_t* base = static_cast<const uint8_t*>(packed);
  const __m512i* weights = reinterpret_cast<const __m512i*>(base + p.weights_at);
  const bool slide = slides(s);
  const int64_t most = slide ? min64(To::kMost, s.out_w) : (kColumns - span(s)) / s.stride_w + 1;  // pixels of a line
  __m512i columns[kColumns * kMostSteps * 4];
  for (int64_t y = row_begin; y < row_end; ++y)
    for (int64_t c = 0; c < s.out_c; c += kBlock)
      for (int64_t x = 0, pixels; x < s.out_w; x += pixels) {
        pixels = min64(most, s.out_w - x);
        const int64_t count = (pixels - 1) * s.stride_w + span(s), pitch = s.dilation_h * p.stage.row_bytes;
        const uint8_t* from = static_cast<const uint8_t*>(staged) + y * s.stride_h * p.stage.row_bytes +
                              x * s.stride_w * p.stage.lanes + c;
        const int64_t channels = min64(kBlock, s.out_c - c);
        Line line{columns,
                  weights + c / kBlock * p.block_vectors,
                  reinterpret_cast<const int32_t*>(base) + c,
                  s.kernel_w,
                  p.steps,
                  s.stride_w,
                  s.dilation_w,
                  channels,
                  p.form.mul,
                  p.form.add,
                  nullptr,
                  0};
        to->begin(y * s.out_w + x, c, &line);
        if (slide) {
          kSlide<kWhole>[(channels - 1) / kLanes][s.kernel_h - 1](line, from, pitch, p.stage.lanes, pixels);
        } else {
          for (int64_t step = 0; step < p.steps; ++step)
            kInterleave[min64(kRows, s.kernel_h - step * kRows) - 1](from + step * kRows * pitch, pitch, p.stage.lanes,
                                                                     count, p.steps * 4, columns + step * 4);
          kLine<kWhole>[(channels - 1) / kLanes](line, pixels);
        }
        to->end(y * s.out_w + x, c, line, pixels);
      }
}

template <typename To>
void run_form(const ConvShape& s, const void* packed, const void* staged, int64_t row_begin, int64_t row_end, To* to) {
  if (WeightForm(s).whole)
    run_to<true>(s, packed, staged, row_begin, row_end, to);
  else
    run_to<false>(s, packed, staged, row_begin, row_end, to);
}

void run(const ConvShape& s, const void* packed, const void* staged, int32_t* out, int64_t row_begin, int64_t row_end) {
  ToSums to{out, s.out_c};
  run_form(s, packed, staged, row_begin, row_end, &to);
}

void run_codes(const ConvShape& s, const void* packed, const void* staged, const RequantArgs& requant, uint8_t* out,
               int64_t row_begin, int64_t row_end) {
  ToCodes to;
  to.out = {out, s.out_c, &requant, 0};
  run_form(s, packed, staged, row_begin, row_end, &to);
}

}  // namespace

bool avx512vnni_depthwise_fits(const ConvShape& s) { return s.kernel_h <= kRows * kMostSteps && span(s) <= kColumns; }

extern const ConvKernel kAvx512VnniDepthwise = {
    "avx512vnni-depthwise", packed_bytes, pack, staged_row_bytes, stage, run, nullptr, nullptr, nullptr, run_codes};

}  // namespace bitstrata
