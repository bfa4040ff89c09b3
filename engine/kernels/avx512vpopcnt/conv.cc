// Direct convolution by bit-planes with AVX-512 VPOPCNTDQ: sixteen output channels a vector, several vectors and output
// pixels a block.
//
// One step takes 32 inputs' bits of one plane, broadcast to all lanes, and a vector of weights that holds, for each of
// sixteen output channels, the 32 bits of one plane that belong to them: the bits of both are counted and added. Planes
// are paired in order of falling significance, the sums doubled in between.
#include <immintrin.h>

#include "../common/cell_stage.h"
#include "../common/code_planes.h"
#include "../common/limits.h"
#include "../common/unroll.h"
#include "avx512vpopcnt.h"

namespace bitstrata {
namespace {

constexpr int kLanes = 16;   // output channels of a vector
constexpr int kVectors = 4;  // of a set, at most
constexpr int kPixels = 8;   // of a block, at most: their window's addresses fill the general registers
constexpr int kTile = 192;   // pixels convolved with all weights in turn, so that their windows stay in the L1 cache

// Pixels of a block: with the sums of its vectors, the weights and one product in 32 registers.
constexpr int pixels_of(int vectors) { return vectors == kVectors ? 6 : kPixels; }

// Sizes and positions of everything that is packed: int32 correction[groups][vectors * kLanes]; pad codes, a byte each;
// weights [group][set][plane][step][vector of the set][lane] uint32. Sets of a group have nearly equal size.
struct Packed {
  explicit Packed(const ConvShape& s)
      : form(s),
        cells(s, form.input_bits, 32, 4, true),
        vectors((s.group_out() + kLanes - 1) / kLanes),
        sets((vectors + kVectors - 1) / kVectors),
        steps(s.kernel_h * cells.per_row * cells.words),
        pad_at(s.groups * vectors * kLanes * 4),
        weights_at((pad_at + s.in_c + 63) / 64 * 64),
        bytes(weights_at + s.groups * vectors * form.weight_bits * steps * 64) {}
  int64_t first_vector(int64_t set) const { return set * vectors / sets; }
  // Where the weights of a set start, which holds vectors [first, ...) of the group.
  int64_t weights_of(int64_t group, int64_t first) const {
    return weights_at + (group * vectors + first) * form.weight_bits * steps * 64;
  }

  CodePlanes form;
  Cells cells;
  int64_t vectors, sets;  // of output channels, in each group
  int64_t steps;          // of a window and plane
  int64_t pad_at, weights_at, bytes;
};

int64_t packed_bytes(const ConvShape& s) { return Packed(s).bytes; }
int64_t staged_row_bytes(const ConvShape& s) { return Packed(s).cells.row_bytes; }

// Packs the codes (channel, tap) of one output channel; weights: its lane of the first step in the first plane. Returns
// the sum of the codes moved by code_lo.
int64_t pack_channel(const ConvShape& s, const Packed& p, const int8_t* codes, int64_t set_vectors, uint32_t* weights) {
  const int64_t pitch = set_vectors * kLanes;
  return visit_weights<32>(s, p.cells, codes, [&](int64_t word, const uint8_t* moved) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(moved));
    for (int plane = 0; plane < p.form.weight_bits; ++plane)
      weights[(plane * p.steps + word) * pitch] =
          _mm256_test_epi8_mask(v, _mm256_set1_epi8(static_cast<char>(1 << plane)));
  });
}

void pack(const ConvShape& s, const int8_t* codes, const int32_t* pad, void* packed) {
  const Packed p(s);
  uint8_t* base = static_cast<uint8_t*>(packed);
  std::memset(packed, 0, static_cast<size_t>(s.group_out() % kLanes == 0 ? p.weights_at : p.bytes));
  for (int64_t c = 0; c < s.in_c; ++c) base[p.pad_at + c] = static_cast<uint8_t>(pad[c]);
  int32_t* correction = reinterpret_cast<int32_t*>(base);
  const int64_t row = s.group_in() * s.kernel_h * s.kernel_w;
  for (int64_t group = 0; group < s.groups; ++group)
    for (int64_t set = 0; set < p.sets; ++set) {
      const int64_t first = p.first_vector(set), vectors = p.first_vector(set + 1) - first;
      uint32_t* weights = reinterpret_cast<uint32_t*>(base + p.weights_of(group, first));
      const int64_t end = least(s.group_out(), (first + vectors) * kLanes);
      for (int64_t o = first * kLanes; o < end; ++o)
        correction[group * p.vectors * kLanes + o] = p.form.correction(
            s, pack_channel(s, p, codes + (group * s.group_out() + o) * row, vectors, weights + (o - first * kLanes)));
    }
}

// Up to 64 codes as two words of each plane.
struct PackPlanes {
  explicit PackPlanes(const ConvShape& s, const Packed& p)
      : planes(p.form.input_bits), lo(_mm512_set1_epi8(static_cast<char>(s.input_lo))) {}
  int64_t operator()(const uint8_t* from, int64_t count, uint8_t* to, int64_t plane_bytes) const {
    const __mmask64 mask = ~uint64_t{0} >> (64 - count);
    __m512i codes = _mm512_maskz_sub_epi8(mask, _mm512_maskz_loadu_epi8(mask, from), lo);
    int64_t sum = 0;
    for (int plane = 0; plane < planes; ++plane, to += plane_bytes) {
      const uint64_t bits = _mm512_test_epi8_mask(codes, _mm512_set1_epi8(1));
      codes = _mm512_srli_epi16(codes, 1);
      sum += _mm_popcnt_u64(bits) << plane;
      if (count > 32) {
        std::memcpy(to, &bits, 8);
      } else {
        const uint32_t low = static_cast<uint32_t>(bits);
        std::memcpy(to, &low, 4);
      }
    }
    return sum;
  }
  int planes;
  __m512i lo;
};

void stage(const ConvShape& s, const void* packed, const void* image, void* staged, int64_t row_begin,
           int64_t row_end) {
  const Packed p(s);
  stage_cells(s, p.cells, PackPlanes(s, p), static_cast<const uint8_t*>(packed) + p.pad_at,
              static_cast<const uint8_t*>(image), static_cast<uint8_t*>(staged), row_begin, row_end);
}

inline __m512i broadcast(const uint8_t* x) {
  int32_t word;
  std::memcpy(&word, x, 4);
  return _mm512_set1_epi32(word);
}

// sum + the number of ones of a & b in each lane. Written out, since compilers would compute many products ahead, for
// which there are no registers.
inline __m512i add_ones(__m512i sum, __m512i a, __m512i b) {
  __m512i ones;
  __asm__("vpandd %2, %3, %1\n\tvpopcntd %1, %1\n\tvpaddd %1, %0, %0" : "+v"(sum), "=&v"(ones) : "v"(a), "v"(b));
  return sum;
}

// Hides from the compiler where an address comes from: see ../avx512vnni/conv.cc.
inline const uint8_t* in_register(const uint8_t* address) {
  __asm__("" : "+r"(address));
  return address;
}

// What the blocks of a tile need. A block's first pixel is at window[0], window_sum[0], out.
struct Block {
  const Packed& p;
  CellRuns runs;
  int64_t input_plane;           // bytes from plane to plane of the staged rows
  int64_t weight_plane;          // vectors from plane to plane of the weights
  const uint8_t* const* window;  // where each pixel's window starts in the first plane
  const uint32_t* window_sum;    // base * the sum of its moved codes
  const __m512i* weights;
  const int32_t* correction;
  int32_t mul;
  int64_t channels;  // that are real
  int32_t* out;
  int64_t out_pitch;
};

// Adds the counts of one plane of kP pixels' windows and one plane of kV vectors of weights.
template <int kP, int kV>
inline void count(const CellRuns& runs, const uint8_t* const* x, int64_t plane, const __m512i* w,
                  __m512i (&sum)[kP][kV]) {
  for (int64_t row = 0; row < runs.rows; ++row)
    for (int64_t column = 0; column < runs.per_row; ++column) {
      const int64_t offset = plane + row * runs.row_step + column * runs.column_step;
      const uint8_t* at[kP];
      each<kP>([&](auto i) { at[i] = in_register(x[i] + offset); });
      for (int64_t b = 0; b < runs.bytes; b += 4, w += kV) {
        __m512i weights[kV];
        each<kV>([&](auto j) { weights[j] = _mm512_load_si512(w + j); });
        each<kP>([&](auto i) {
          const __m512i a = broadcast(at[i] + b);
          each<kV>([&](auto j) { sum[i][j] = add_ones(sum[i][j], a, weights[j]); });
        });
      }
    }
}

template <int kP, int kV>
void convolve(const Block& b) {
  __m512i sum[kP][kV];
  // Else the sums would wait for the memory they are written to.
  each<kP>([&](auto i) { each<kV>([&](auto j) { __builtin_prefetch(b.out + i * b.out_pitch + j * kLanes, 1); }); });
  each<kP>([&](auto i) { each<kV>([&](auto j) { sum[i][j] = _mm512_setzero_si512(); }); });
  const int input_bits = b.p.form.input_bits, weight_bits = b.p.form.weight_bits;
  for (int level = input_bits + weight_bits - 2; level >= 0; --level) {
    each<kP>([&](auto i) { each<kV>([&](auto j) { sum[i][j] = _mm512_add_epi32(sum[i][j], sum[i][j]); }); });
    for (int of_weights = level < input_bits ? 0 : level - input_bits + 1;
         of_weights < weight_bits && of_weights <= level; ++of_weights)
      count<kP, kV>(b.runs, b.window, (level - of_weights) * b.input_plane, b.weights + of_weights * b.weight_plane,
                    sum);
  }
  const int64_t last = b.channels - (kV - 1) * kLanes;
  const __mmask16 mask = static_cast<__mmask16>((1u << last) - 1);
  const __m512i mul = _mm512_set1_epi32(b.mul);
  each<kV>([&](auto j) {
    const __m512i correction = _mm512_loadu_si512(b.correction + j * kLanes);
    each<kP>([&](auto i) {
      const __m512i added = _mm512_add_epi32(correction, _mm512_set1_epi32(static_cast<int32_t>(b.window_sum[i])));
      const __m512i result = _mm512_add_epi32(_mm512_mullo_epi32(sum[i][j], mul), added);
      _mm512_mask_storeu_epi32(b.out + i * b.out_pitch + j * kLanes, j == kV - 1 ? mask : __mmask16{0xffff}, result);
    });
  });
}

using BlockFn = void (*)(const Block&);
template <int kV>
constexpr BlockFn kBlocks[kPixels] = {convolve<1, kV>, convolve<2, kV>, convolve<3, kV>, convolve<4, kV>,
                                      convolve<5, kV>, convolve<6, kV>, convolve<7, kV>, convolve<8, kV>};
constexpr const BlockFn* kBySet[kVectors] = {kBlocks<1>, kBlocks<2>, kBlocks<3>, kBlocks<4>};

// All `pixels` of a tile, for one set of vectors: as few blocks as can be, of nearly equal size.
void convolve_tile(Block b, int64_t vectors, int64_t pixels) {
  const BlockFn* by_pixels = kBySet[vectors - 1];
  const int64_t most = pixels_of(static_cast<int>(vectors)), blocks = (pixels + most - 1) / most;
  for (int64_t left = blocks; left > 0; --left) {
    const int64_t size = (pixels + left - 1) / left;
    by_pixels[size - 1](b);
    b.window += size, b.window_sum += size, b.out += size * b.out_pitch;
    pixels -= size;
  }
}

void run(const ConvShape& s, const void* packed, const void* staged, int32_t* out, int64_t row_begin, int64_t row_end) {
  const Packed p(s);
  const uint8_t* base = static_cast<const uint8_t*>(packed);
  const uint8_t* rows = static_cast<const uint8_t*>(staged);
  const int32_t* correction = reinterpret_cast<const int32_t*>(base);
  const uint8_t* window[kTile];
  uint32_t sums[kTile];
  const int64_t end = row_end * s.out_w;
  int64_t pixels;
  for (int64_t begin = row_begin * s.out_w; begin < end; begin += pixels) {
    const int64_t tiles = (end - begin + kTile - 1) / kTile;
    pixels = (end - begin + tiles - 1) / tiles;
    for (int64_t group = 0; group < s.groups; ++group) {
      find_windows(s, p.cells, rows, group, begin, pixels, static_cast<uint32_t>(p.form.base), window, sums);
      for (int64_t set = 0; set < p.sets; ++set) {
        const int64_t v = p.first_vector(set), vectors = p.first_vector(set + 1) - v;
        convolve_tile(
            {p, CellRuns(s, p.cells), p.cells.digit_bytes, p.steps * vectors, window, sums,
             reinterpret_cast<const __m512i*>(base + p.weights_of(group, v)),
             correction + (group * p.vectors + v) * kLanes, s.mul, least(vectors * kLanes, s.group_out() - v * kLanes),
             out + begin * s.out_c + group * s.group_out() + v * kLanes, s.out_c},
            vectors, pixels);
      }
    }
  }
}

double passes(const ConvShape& s) {
  const CodePlanes form(s);
  return form.weight_bits * form.input_bits;
}

constexpr int kSums = 8;  // of the peak, independent of each other

void count_registers(int64_t rounds) {
  __m512i sum[kSums], a = _mm512_set1_epi32(5), b = _mm512_set1_epi32(3);
  for (auto& s : sum) s = _mm512_setzero_si512();
  for (int64_t round = 0; round < rounds; ++round) each<kSums>([&](auto i) { sum[i] = add_ones(sum[i], a, b); });
  keep(sum);
}

constexpr PeakLoop kPeak = {"vpandd + vpopcntd + vpaddd", kSums * kLanes * 32, count_registers};

constexpr ConvKernel kernel() {
  ConvKernel made{"avx512vpopcnt", packed_bytes, pack, staged_row_bytes, stage, run};
  made.peak = &kPeak;
  made.passes = passes;
  return made;
}

}  // namespace

extern const ConvKernel kAvx512VpopcntConv = kernel();

}  // namespace bitstrata
