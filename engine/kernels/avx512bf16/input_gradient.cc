// The gradient of a convolution's input, as the convolution of its phases by tiles of pixels: nothing is copied per
// tap. Sums run over taps, blocks of channels and pairs in this order, whatever the tile.
#include "avx512bf16.h"
#include "gradient_plan.h"
#include "gradient_tile.h"
#include "gradient_weights.h"

namespace bitstrata {
namespace {

constexpr int64_t kMostTaps = 128;  // which the caller checks
constexpr int64_t kPhases = 4;      // of columns, which take turns within a row

constexpr int kWidths[] = {1, 2, 3, 4, 7, 8, 11, 14, 16};

using RunTile = void (*)(const Tile&);
template <int kLanes, int kCount, int kPairs>
RunTile tile_of(int width) {
  switch (width) {
    case 1:
      return run_tile<kLanes, 1, kCount, kPairs>;
    case 2:
      return run_tile<kLanes, 2, kCount, kPairs>;
    case 3:
      return run_tile<kLanes, 3, kCount, kPairs>;
    case 4:
      return run_tile<kLanes, 4, kCount, kPairs>;
    case 7:
      return run_tile<kLanes, 7, kCount, kPairs>;
    case 8:
      return run_tile<kLanes, 8, kCount, kPairs>;
    case 11:
      return run_tile<kLanes, 11, kCount, kPairs>;
    case 14:
      return run_tile<kLanes, 14, kCount, kPairs>;
    default:
      return run_tile < kLanes, kCount == 1 ? 16 : 14, kCount, kPairs > ;
  }
}

template <int kPairs>
RunTile tile_of(int64_t lanes, int64_t count, int width) {
  if (lanes == 4) return tile_of<4, 1, kPairs>(width);
  if (lanes == 8) return tile_of<8, 1, kPairs>(width);
  return count == 1 ? tile_of<16, 1, kPairs>(width) : tile_of<16, 2, kPairs>(width);
}

int64_t packed_bytes(const ConvShape& s) {
  const GradientPlan p(s);
  return p.vectors * p.vector_bytes();
}

int64_t pack_parts(const ConvShape& s) { return (GradientPlan(s).vectors + kVectors - 1) / kVectors; }

// Packed: for each part [tap][block][step][vector][lane][pair of the step][2], with as many pairs in a step as fill the
// vector.
void pack(const ConvShape& s, const int8_t* high, const int8_t* low, void* packed, int64_t part) {
  const GradientPlan p(s);
  const int64_t first = part * kVectors, count = smaller(kVectors, p.vectors - first);
  const int64_t taps = s.kernel_h * s.kernel_w, channels = smaller(count * p.lanes, s.in_c - first * p.lanes);
  const int64_t together = 16 / p.lanes, row = count * p.lanes * together, pitch = p.weight_tap(count) / 4;
  uint32_t* to = reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(packed) + first * p.vector_bytes());
  uint32_t words[kVectors * 16 * kMostTaps];
  for (int64_t pair = 0; pair < p.blocks * p.pairs; ++pair) {
    const int64_t even = (2 * pair * s.in_c + first * p.lanes) * taps, odd = even + s.in_c * taps;
    const int64_t used = 2 * pair < s.out_c ? channels : 0;
    pair_words(high, low, even, 2 * pair + 1 < s.out_c ? odd : -1, used * taps, words);
    uint32_t* at = to + pair / together * row + pair % together;
    for (int64_t tap = 0; tap < taps; ++tap, at += pitch) {
      for (int64_t c = 0; c < used; ++c) at[c * together] = words[c * taps + tap];
      for (int64_t c = used; c < count * p.lanes; ++c) at[c * together] = 0;
    }
  }
}

int64_t scratch_bytes(const ConvShape& s, int64_t rows) {
  const GradientPlan p(s);
  return (p.row_count(0, rows) + 1) * p.row_bytes();
}

// Pixels of g, each cut into the blocks' channels.
void stage_pixels(const GradientPlan& p, const uint16_t* g, int64_t first, int64_t count, uint8_t* to) {
  const int64_t bytes = p.pixel_bytes(), whole = p.s.out_c * 2 / bytes, rest = p.s.out_c * 2 - whole * bytes;
  for (int64_t block = 0; block < p.blocks; ++block) {
    const uint8_t* from = reinterpret_cast<const uint8_t*>(g + first * p.s.out_c) + block * bytes;
    uint8_t* at = to + block * p.block_bytes();
    if (block == whole)
      for (int64_t i = 0; i < count; ++i, from += p.s.out_c * 2, at += bytes) {
        std::memcpy(at, from, static_cast<size_t>(rest));
        std::memset(at + rest, 0, static_cast<size_t>(bytes - rest));
      }
    else if (bytes == 32)
      for (int64_t i = 0; i < count; ++i, from += p.s.out_c * 2, at += 32) std::memcpy(at, from, 32);
    else
      for (int64_t i = 0; i < count; ++i, from += p.s.out_c * 2, at += 16) std::memcpy(at, from, 16);
  }
}

// Rows [first, first + count) of g, zeros outside of it.
void stage(const GradientPlan& p, const uint16_t* g, int64_t first, int64_t count, uint8_t* to) {
  const int64_t inside = smaller(p.s.out_w, p.width - p.left);
  for (int64_t row = first; row < first + count; ++row, to += p.row_bytes()) {
    if (row < 0 || row >= p.s.out_h || inside <= 0) {
      std::memset(to, 0, static_cast<size_t>(p.row_bytes()));
      continue;
    }
    const int64_t left = p.left * p.pixel_bytes(), right = (p.width - p.left - inside) * p.pixel_bytes();
    for (int64_t block = 0; block < p.blocks; ++block) {
      uint8_t* at = to + block * p.block_bytes();
      std::memset(at, 0, static_cast<size_t>(left));
      std::memset(at + p.block_bytes() - right, 0, static_cast<size_t>(right));
    }
    stage_pixels(p, g, row * p.s.out_w, inside, to + left);
  }
}

// What tiles of some vectors of input channels read: g from row first_row on, and the weights.
struct Part {
  const uint8_t* staged;
  int64_t first_row;
  const uint8_t* weights;
  int64_t first, count;  // vectors
};

// The taps of a phase of the rows, at its row j, and of one of the columns; returns how many.
int64_t taps_of(const GradientPlan& p, const AxisPhase& y, int64_t j, const AxisPhase& x, const Part& part, Tap* taps) {
  Tap* to = taps;
  for (int64_t a = 0; a < y.taps; ++a) {
    const uint8_t* row = part.staged + (j + y.offset - a * y.step - part.first_row) * p.row_bytes();
    for (int64_t b = 0; b < x.taps; ++b) {
      const int64_t tap = (y.first_tap + a * y.tap_step) * p.s.kernel_w + x.first_tap + b * x.tap_step;
      *to++ = {row + (p.left + x.offset - b * x.step) * p.pixel_bytes(), part.weights + tap * p.weight_tap(part.count)};
    }
  }
  return to - taps;
}

// A phase of the columns: tiles of `width` of its pixels.
struct Columns {
  Tile tile;
  RunTile run;
  int64_t width, pixels;

  // `later`: bytes from the taps' row to this one's.
  void run_row(const GradientPlan& p, int64_t later, uint16_t* out) {
    for (int64_t done = 0; done < pixels; done += width) {
      const int64_t at = smaller(done, pixels - width);
      tile.skip = later + at * p.pixel_bytes();
      tile.out = out + at * tile.out_pitch;
      run(tile);
    }
  }
};

// Rows y, y + stride, ... below row_end, of columns of the phases [x_begin, x_end), at most kPhases.
void run_phases(const GradientPlan& p, const Part& part, int64_t y, int64_t row_end, int64_t x_begin, int64_t x_end,
                uint16_t* out) {
  const ConvShape& s = p.s;
  const AxisPhase rows = p.rows(y % s.stride_h);
  const int64_t lanes = smaller(p.lanes, s.in_c - (part.first + part.count - 1) * p.lanes);
  Tap taps[kMostTaps];  // each belongs to one phase
  Tap* next = taps;
  Columns phases[kPhases];
  for (int64_t x = x_begin; x < x_end; ++x) {
    const AxisPhase columns = p.columns(x);
    const int64_t n = taps_of(p, rows, y / s.stride_h, columns, part, next);
    const int width = width_of(kWidths, columns.count, part.count);
    phases[x - x_begin] = {
        {next, n, p.blocks, p.block_bytes(), 0, nullptr, s.stride_w * s.in_c, (1u << lanes) - 1},
        p.pairs == 8 ? tile_of<8>(p.lanes, part.count, width) : tile_of<4>(p.lanes, part.count, width),
        width,
        columns.count};
    next += n;
  }
  for (int64_t later = 0; y < row_end; y += s.stride_h, later += p.row_bytes())
    for (int64_t x = x_begin; x < x_end; ++x)
      phases[x - x_begin].run_row(p, later, out + (y * s.in_w + x) * s.in_c + part.first * p.lanes);
}

void run(const ConvShape& s, const void* packed, const uint16_t* g, void* scratch, uint16_t* out, int64_t row_begin,
         int64_t row_end) {
  const GradientPlan p(s);
  uint8_t* staged = static_cast<uint8_t*>(scratch);
  const int64_t first_row = p.first_row(row_begin), columns = smaller(s.stride_w, s.in_w);
  stage(p, g, first_row, p.row_count(row_begin, row_end), staged);
  for (int64_t first = 0; first < p.vectors; first += kVectors) {
    const Part part{staged, first_row, static_cast<const uint8_t*>(packed) + first * p.vector_bytes(), first,
                    smaller(kVectors, p.vectors - first)};
    for (int64_t y = row_begin; y < smaller(row_begin + s.stride_h, row_end); ++y)
      for (int64_t x = 0; x < columns; x += kPhases)
        run_phases(p, part, y, row_end, x, smaller(x + kPhases, columns), out);
  }
}

}  // namespace

const InputGradientKernel kAvx512Bf16InputGradient = {"avx512bf16", packed_bytes, pack_parts, pack, scratch_bytes, run};

}  // namespace bitstrata
