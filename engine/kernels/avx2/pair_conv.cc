// Direct convolution by tables on AVX2 where inputs have one bit: 32 output channels a vector, neighbouring output
// pixels in pairs.
//
// As in table_conv.cc a step looks up what four inputs give with each way to choose among them. Here that is at most 4,
// so that one table serves two pixels: a byte holds the first one's sum in its lower four bits and the second one's in
// its upper four. Three steps fill them. Written A and B, with e and o for the even and the odd bytes of 16 bits, the
// sums of three steps are added up, modulo 256 in each byte, as they are and moved down by four bits:
//   low:  A_e + 16 B_e    A_o + 16 B_o
//   high: B_e + 16 A_o    B_o
// B_o is there, A_o follows from it, B_e from A_o and A_e from B_e, each below 256. That takes no mask, and 8
// instructions for what takes 12 without pairs.
#include "../common/store_lanes.h"
#include "avx2.h"
#include "requant_eight.h"
#include "table_form.h"

namespace bitstrata {
namespace {

constexpr int kVectors = 4;          // of a set, at most
constexpr int64_t kFew = 3;          // steps whose sums fit four bits
constexpr int64_t kChunkSteps = 63;  // steps whose sums fit a byte
constexpr int64_t kTile = 28;  // pairs whose sums in 16 bits stay in the L1 cache, with the weights of a chunk of steps

// Pairs of a block: with their sums, a table and what it gives in 16 registers.
constexpr int pairs_of(int vectors) { return vectors > 2 ? 1 : kVectors / vectors; }

// [four inputs of the first pixel, the first lowest, then four of the second][which of each][sums].
struct PairTables {
  constexpr PairTables() : sums() {
    for (int inputs = 0; inputs < 256; ++inputs)
      for (int chosen = 0; chosen < 16; ++chosen)
        for (int i = 0; i < 4; ++i) {
          const int one = chosen >> i & inputs >> i & 1, other = chosen >> i & inputs >> (4 + i) & 1;
          sums[inputs][chosen] = static_cast<uint8_t>(sums[inputs][chosen] + one + 16 * other);
        }
  }
  alignas(64) uint8_t sums[256][kTableBytes];
};
constexpr PairTables kTables;

// Adds to each cell's words those of the cell that the next output pixel has in its place.
void join_pairs(const ConvShape& s, const Cells& cells, uint8_t* staged_row) {
  const int64_t words = cells.digit_bytes / kWordBytes, ahead = cells.first(s, 1) * cells.words;
  for (int64_t group = 0; group < s.groups; ++group) {
    uint16_t* to = reinterpret_cast<uint16_t*>(staged_row + cells.offset(group, 0));
    const uint16_t* other = to + ahead;
    int64_t i = 0;
    for (; i + 16 <= words - ahead; i += 16) {
      const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(to + i));
      const __m256i y = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(other + i));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm256_or_si256(x, _mm256_slli_epi16(y, 4)));
    }
    for (; i < words - ahead; ++i) to[i] = static_cast<uint16_t>(to[i] | other[i] << 4);
  }
}

void stage(const ConvShape& s, const void* packed, const void* image, void* staged, int64_t row_begin,
           int64_t row_end) {
  const Packed p(s, kVectors);
  const PackDigits<1, 1> pack_words(s, p);
  const uint8_t* pad = static_cast<const uint8_t*>(packed) + p.pad_at;
  uint8_t* to = static_cast<uint8_t*>(staged);
  stage_cells(s, p.cells, pack_words, pad, static_cast<const uint8_t*>(image), to, row_begin, row_end);
  for (int64_t r = row_begin; r < row_end; ++r)
    if (!Cells::unread(s, r)) join_pairs(s, p.cells, to + r * p.cells.row_bytes);
}

inline __m256i settled(__m256i x) {  // so that compilers do not add in another order, which takes more registers
  __asm__("" : "+x"(x));
  return x;
}

// In bytes, as above.
template <int kQ, int kV>
struct PairSums {
  __m256i low[kQ][kV], high[kQ][kV];
};
// Of a vector: sums of each pixel's even and odd bytes' channels in 16 bits.
using Wide = __m256i[2][2];

// Adds the sums in bytes to those in 16 bits.
inline void widen(__m256i low, __m256i high, Wide& wide) {
  const __m256i byte = _mm256_set1_epi16(0xff);
  const __m256i b_odd = _mm256_srli_epi16(high, 8);
  const __m256i a_odd = _mm256_srli_epi16(_mm256_sub_epi16(low, _mm256_slli_epi16(b_odd, 12)), 8);
  const __m256i b_even = _mm256_and_si256(_mm256_sub_epi16(high, _mm256_slli_epi16(a_odd, 4)), byte);
  const __m256i a_even = _mm256_and_si256(_mm256_sub_epi16(low, _mm256_slli_epi16(b_even, 4)), byte);
  wide[0][0] = _mm256_add_epi16(wide[0][0], a_even);
  wide[0][1] = _mm256_add_epi16(wide[0][1], a_odd);
  wide[1][0] = _mm256_add_epi16(wide[1][0], b_even);
  wide[1][1] = _mm256_add_epi16(wide[1][1], b_odd);
}

// kSteps steps, at most kFew.
template <int kSteps, int kQ, int kV>
BITSTRATA_INLINE void add_steps(const uint8_t* const* at, const __m256i* w, PairSums<kQ, kV>& sums) {
  const uint8_t* tables = kTables.sums[0];
  each<kQ>([&](auto i) {
    __m256i few[kV];
    each<kSteps>([&](auto s) {
      uint16_t place;
      std::memcpy(&place, at[i] + kWordBytes * s, kWordBytes);
      const __m256i table =
          _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(tables + place)));
      each<kV>([&](auto j) {
        const __m256i x = _mm256_shuffle_epi8(table, _mm256_load_si256(w + s * kV + j));
        few[j] = s == 0 ? x : settled(_mm256_add_epi8(few[j], x));
      });
    });
    each<kV>([&](auto j) {
      sums.low[i][j] = settled(_mm256_add_epi8(sums.low[i][j], few[j]));
      sums.high[i][j] = settled(_mm256_add_epi8(sums.high[i][j], _mm256_srli_epi16(few[j], 4)));
    });
  });
}

// Neighbouring steps of every window: where the first one is, and how many.
struct Stretch {
  int64_t offset, steps;
};

// Steps that follow one another in all windows, cut into stretches.
class Steps {
 public:
  explicit Steps(const CellRuns& runs) : runs_(runs), run_steps_(runs.bytes / kWordBytes) {}

  // The next `steps` steps; returns where their stretches end.
  Stretch* take(int64_t steps, Stretch* to) {
    for (; steps > 0; ++to) {
      *to = {row_ * runs_.row_step + column_ * runs_.column_step + kWordBytes * step_,
             least(steps, run_steps_ - step_)};
      steps -= to->steps;
      step_ += to->steps;
      if (step_ < run_steps_) continue;
      step_ = 0;
      if (++column_ == runs_.per_row) column_ = 0, ++row_;
    }
    return to;
  }

 private:
  CellRuns runs_;
  int64_t run_steps_, row_ = 0, column_ = 0, step_ = 0;
};

// Steps whose sums fit a byte.
struct Chunk {
  const Stretch *begin, *end;
};

// What kV vectors of weights and `blocks` times kQ pairs' windows give in a chunk.
template <int kQ, int kV>
void add_chunk(const Chunk& chunk, int64_t blocks, const uint8_t* const* window, const __m256i* weights, Wide* wide) {
  const Stretch *begin = chunk.begin, *end = chunk.end;
  for (; blocks > 0; --blocks, window += 2 * kQ, wide += kQ * kV) {
    PairSums<kQ, kV> sums;
    each<kQ>([&](auto i) { each<kV>([&](auto j) { sums.low[i][j] = sums.high[i][j] = _mm256_setzero_si256(); }); });
    const __m256i* w = weights;
    for (const Stretch* stretch = begin; stretch != end; ++stretch) {
      const uint8_t* at[kQ];
      each<kQ>([&](auto i) { at[i] = window[2 * i] + stretch->offset; });
      const auto pass = [&](auto steps) {
        add_steps<steps, kQ, kV>(at, w, sums);
        each<kQ>([&](auto i) { at[i] += kWordBytes * steps; });
        w += steps * kV;
      };
      int64_t left = stretch->steps;
      for (; left >= 2 * kFew; left -= 2 * kFew) each<2>([&](auto) { pass(std::integral_constant<int, kFew>{}); });
      if (left >= kFew) left -= kFew, pass(std::integral_constant<int, kFew>{});
      if (left == 2) pass(std::integral_constant<int, 2>{});
      if (left == 1) pass(std::integral_constant<int, 1>{});
    }
    each<kQ>([&](auto i) { each<kV>([&](auto j) { widen(sums.low[i][j], sums.high[i][j], wide[i * kV + j]); }); });
  }
}

using ChunkFn = void (*)(const Chunk&, int64_t, const uint8_t* const*, const __m256i*, Wide*);
// By vectors, one less than there are: for blocks of as many pairs as can be, and for single ones.
constexpr ChunkFn kBlocks[kVectors] = {add_chunk<pairs_of(1), 1>, add_chunk<pairs_of(2), 2>, add_chunk<1, 3>,
                                       add_chunk<1, 4>};
constexpr ChunkFn kPairs[kVectors] = {add_chunk<1, 1>, add_chunk<1, 2>, add_chunk<1, 3>, add_chunk<1, 4>};

// Some pairs. Arrays: two of a pair.
struct Tile {
  int64_t pairs;
  const uint8_t* window[2 * kTile];  // where each pixel's window starts, of a pair the first one's
  uint32_t window_sum[2 * kTile];    // base * the sum of its moved codes
  int64_t pixel[2 * kTile];          // of the outputs; -1 where a row ends after the first of a pair
};

// The pairs [begin, begin + tile.pairs), `row_pairs` of them a row.
void find_pairs(const ConvShape& s, const Packed& p, const void* staged, int64_t group, int64_t begin,
                int64_t row_pairs, Tile& tile) {
  for (int64_t i = 0; i < tile.pairs;) {
    const int64_t y = (begin + i) / row_pairs, x = (begin + i) % row_pairs * 2;
    const int64_t pairs = least(row_pairs - x / 2, tile.pairs - i), pixels = least(2 * pairs, s.out_w - x);
    find_windows(s, p.cells, static_cast<const uint8_t*>(staged), group, y * s.out_w + x, pixels,
                 static_cast<uint32_t>(p.form.base), tile.window + 2 * i, tile.window_sum + 2 * i);
    for (int64_t j = 0; j < 2 * pairs; ++j) tile.pixel[2 * i + j] = j < pixels ? y * s.out_w + x + j : -1;
    i += pairs;
  }
}

// What a set of output channels needs.
struct Set {
  int64_t vectors;
  const __m256i* weights;
  const int32_t* correction;
  int64_t first, channels;  // of the channels, how many of them are real
};

// Where sums go. for_eight calls body(put), and put(pixel, sums) stores those of eight channels, from `channel` on and
// at least `left` of them real.
struct ToSums {
  template <typename Body>
  void for_eight(int64_t channel, int64_t left, const Body& body) const {
    int32_t* const to = out + channel;
    const int64_t apart = pitch;
    body([=](int64_t pixel, __m256i x) { store_lanes(to + pixel * apart, left, x); });
  }
  int32_t* out;
  int64_t pitch;
};

// Codes in place of the sums, whatever their sign: only their lowest byte is left of them.
template <typename Form>
struct ToCodes {
  template <typename Body>
  void for_eight(int64_t channel, int64_t left, const Body& body) const {
    uint8_t* const to = out + channel;
    const RequantArgs* const requant = args;
    const int64_t apart = pitch;
    if (left >= 8) {
      const Form constants(*requant, channel);
      const __m256i byte = _mm256_set1_epi32(255);
      return body(
          [=](int64_t pixel, __m256i x) { store_eight(to + pixel * apart, _mm256_and_si256(constants(x), byte)); });
    }
    body([=](int64_t pixel, __m256i x) {
      alignas(32) int32_t sums[8];
      _mm256_store_si256(reinterpret_cast<__m256i*>(sums), x);
      for (int64_t i = 0; i < left; ++i)
        to[pixel * apart + i] = static_cast<uint8_t>(requant_one(*requant, channel + i, sums[i]));
    });
  }
  const RequantArgs* args;
  uint8_t* out;
  int64_t pitch;
};

// A tile's results from its sums: of each eight channels, so that what is theirs stays in registers.
template <typename Results>
void finish(const ConvShape& s, const Tile& tile, const Set& set, const Wide* wide, const Results& results) {
  const __m256i mul = _mm256_set1_epi32(s.mul);
  for (int64_t c = 0; c < set.channels; c += 8) {
    const __m256i correction = load(set.correction + c);
    // A vector's channels are in the order of its sums: those of even bytes, then those of odd ones.
    const uint16_t* from = reinterpret_cast<const uint16_t*>(wide + c / kLanes) + c % kLanes;
    results.for_eight(set.first + c, set.channels - c, [&](const auto& put) {
      const uint16_t* at = from;
      for (int64_t pair = 0; pair < tile.pairs; ++pair, at += set.vectors * 2 * kLanes)
        for (int64_t k = 0; k < 2; ++k) {
          const int64_t pixel = tile.pixel[2 * pair + k];
          if (pixel < 0) continue;
          const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + k * kLanes));
          const __m256i sums = _mm256_mullo_epi32(_mm256_cvtepu16_epi32(eight), mul);
          const __m256i added = _mm256_set1_epi32(static_cast<int32_t>(tile.window_sum[2 * pair + k]));
          put(pixel, _mm256_add_epi32(sums, _mm256_add_epi32(added, correction)));
        }
    });
  }
}

template <typename Results>
void convolve_tile(const ConvShape& s, const Packed& p, const Tile& tile, const Set& set, const Results& results) {
  Wide wide[kTile * kVectors];
  __m256i* sums = wide[0][0];
  const int64_t count = tile.pairs * set.vectors * 4;
  for (int64_t i = 0; i < count; ++i) sums[i] = _mm256_setzero_si256();
  const int64_t block = pairs_of(static_cast<int>(set.vectors)), blocks = tile.pairs / block, rest = blocks * block;
  const int64_t chunks = (p.steps + kChunkSteps - 1) / kChunkSteps;  // of nearly equal size
  const int64_t chunk_steps = ((p.steps + chunks - 1) / chunks + kFew - 1) / kFew * kFew;
  Stretch stretches[kChunkSteps];
  const __m256i* weights = set.weights + p.form.weight_bits * p.steps * set.vectors;
  for (int plane = p.form.weight_bits - 1; plane >= 0; --plane) {
    weights -= p.steps * set.vectors;
    Steps all(CellRuns(s, p.cells));
    for (int64_t first = 0, steps; first < p.steps; first += steps) {
      steps = least(chunk_steps, p.steps - first);
      const Chunk chunk{stretches, all.take(steps, stretches)};
      const __m256i* w = weights + first * set.vectors;
      kBlocks[set.vectors - 1](chunk, blocks, tile.window, w, wide);
      kPairs[set.vectors - 1](chunk, tile.pairs - rest, tile.window + 2 * rest, w, wide + rest * set.vectors);
    }
    for (int64_t i = 0; plane > 0 && i < count; ++i) sums[i] = _mm256_add_epi16(sums[i], sums[i]);
  }
  finish(s, tile, set, wide, results);
}

template <typename Results>
void run_to(const ConvShape& s, const void* packed, const void* staged, const Results& results, int64_t row_begin,
            int64_t row_end) {
  const Packed p(s, kVectors);
  const uint8_t* base = static_cast<const uint8_t*>(packed);
  const int32_t* correction = reinterpret_cast<const int32_t*>(base);
  const int64_t row_pairs = (s.out_w + 1) / 2, end = row_end * row_pairs;
  Tile tile;
  for (int64_t begin = row_begin * row_pairs; begin < end; begin += tile.pairs) {
    const int64_t tiles = (end - begin + kTile - 1) / kTile;
    tile.pairs = (end - begin + tiles - 1) / tiles;
    for (int64_t group = 0; group < s.groups; ++group) {
      find_pairs(s, p, staged, group, begin, row_pairs, tile);
      for (int64_t set = 0; set < p.sets; ++set) {
        const int64_t v = p.first_vector(set), vectors = p.first_vector(set + 1) - v;
        convolve_tile(s, p, tile,
                      {vectors, reinterpret_cast<const __m256i*>(base + p.weights_of(group, v)),
                       correction + (group * p.vectors + v) * kLanes, group * s.group_out() + v * kLanes,
                       least(vectors * kLanes, s.group_out() - v * kLanes)},
                      results);
      }
    }
  }
}

void run(const ConvShape& s, const void* packed, const void* staged, int32_t* out, int64_t row_begin, int64_t row_end) {
  run_to(s, packed, staged, ToSums{out, s.out_c}, row_begin, row_end);
}

void run_codes(const ConvShape& s, const void* packed, const void* staged, const RequantArgs& requant, uint8_t* out,
               int64_t row_begin, int64_t row_end) {
  if (requant.form[0] == RequantForm::high)
    run_to(s, packed, staged, ToCodes<EightHigh>{&requant, out, s.out_c}, row_begin, row_end);
  else
    run_to(s, packed, staged, ToCodes<EightLow>{&requant, out, s.out_c}, row_begin, row_end);
}

double passes(const ConvShape& s) { return CodePlanes(s).weight_bits; }

constexpr ConvKernel kernel() {
  ConvKernel made{"avx2-table-pairs", packed_bytes<kVectors>, pack<kVectors>, staged_row_bytes<kVectors>, stage, run};
  made.peak = &kAvx2PairPeak;
  made.run_codes = run_codes;
  made.passes = passes;
  return made;
}

}  // namespace

extern const ConvKernel kAvx2Pairs = kernel();

}  // namespace bitstrata
