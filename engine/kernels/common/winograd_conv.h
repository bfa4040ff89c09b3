// Convolution by Winograd's minimal filtering, whatever the vectors that multiply; see winograd.h for what is computed,
// and pointwise.h for the unnamed namespace.
//
// Tiles of neighbouring output pixels are convolved a group at a time with all weights in turn, so that their windows
// stay in the cache; each set of vectors takes a group's tiles in blocks, whose sums stay in registers, position after
// position.
//
// `Isa` has: Form, one of winograd.h; kLanes, the output channels of a vector; kVectors, of a set, at most; Registers,
// whose Vector weights are loaded in; tiles_of(vectors): of a block, at most; block<Results>(vectors, tiles):
// what computes one, of WinogradBlock<Registers, Results>; pack_set(shape, packed, codes, factor, set,
// weights, correction, pitch), which may be pack_winograd_set; chunk(shape, packed, weights): steps whose sums fit the
// kernel's 16 bits, in any block, for kernels that sum so, else anything. Results has `from(pixel, channel)`.
#pragma once

#include "winograd.h"

namespace bitstrata {
namespace {

// Sizes and positions of everything that is packed: int64 chunk; int32 correction[output][vectors * kLanes]; pad
// codes;
// weights [set][position][row of the kernel][step][vector of the set][lane][4]. Sets have nearly equal size.
template <typename Isa>
struct WinogradPacked {
  using Form = typename Isa::Form;
  static constexpr int64_t kLanes = Isa::kLanes, kVectors = Isa::kVectors, kVectorBytes = kLanes * kWinogradStep;

  explicit WinogradPacked(const ConvShape& s)
      : rows(s),
        vectors(round_up(s.out_c, kLanes) / kLanes),
        sets((vectors + kVectors - 1) / kVectors),
        row_steps(rows.lanes / kWinogradStep),
        steps(s.kernel_h * row_steps),
        padding_at(correction_at + Form::kOutputs * vectors * kLanes * 4),
        weights_at(round_up(padding_at + rows.lanes, 64)),
        bytes(weights_at + vectors * of_vector()) {}
  int64_t first_vector(int64_t set) const { return set * vectors / sets; }
  int64_t of_vector() const { return Form::kPositions * steps * kVectorBytes; }  // bytes of weights

  WinogradRows<Form> rows;
  int64_t vectors, sets;     // of output channels
  int64_t row_steps, steps;  // of a row of a position's window, and of all
  static constexpr int64_t correction_at = 64;
  int64_t padding_at, weights_at, bytes;
};

// A set's weights and corrections, an output channel after the other.
template <typename Isa>
void pack_winograd_set(const ConvShape& s, const WinogradPacked<Isa>& p, const WeightCodes& codes,
                       const uint8_t* factor, int64_t set, uint8_t* weights, int32_t* correction, int64_t pitch) {
  const int64_t first = p.first_vector(set), vectors = p.first_vector(set + 1) - first;
  const int64_t begin = first * Isa::kLanes, left = s.out_c - begin, count = vectors * Isa::kLanes;
  if (left < count) std::memset(weights, 0, static_cast<size_t>(vectors * p.of_vector()));
  const WinogradWeights<typename Isa::Form> from{s, codes, factor};
  for (int64_t o = 0; o < count; ++o, ++correction) {
    for (int y = 0; y < Isa::Form::kOutputs; ++y) correction[y * pitch] = 0;
    if (o >= left) continue;
    uint8_t* lane = weights + o * kWinogradStep;
    from.channel(begin + o, correction, pitch, [&](int position, int64_t ky, int64_t i, const int8_t* four) {
      const int64_t step = position * p.steps + ky * p.row_steps + i / kWinogradStep;
      std::memcpy(lane + step * vectors * p.kVectorBytes, four, kWinogradStep);
    });
  }
}

// What the products of the blocks of a group of tiles need, and what their outputs need too.
template <typename Registers>
struct WinogradProducts {
  using Vector = typename Registers::Vector;
  int64_t kernel_h;
  int64_t row_step;              // from row to row of the kernel, in bytes
  int64_t lanes, steps;          // of a staged position; of its window
  int64_t chunk;                 // steps whose sums fit
  const uint8_t* const* window;  // where each tile's window starts
  const Vector* weights;
  const Vector* ahead;  // weights that are used next
};
template <typename Registers, typename Results>
struct WinogradBlock : WinogradProducts<Registers> {
  const int64_t* pixel;       // each tile's first output
  const int64_t* outputs;     // how many it has
  const int32_t* correction;  // of first outputs
  int64_t pitch;              // from there to those of the next
  int64_t channels;           // that are real
  Results out;                // of pixel 0
};

// A tile's outputs from the sums of its positions and the corrections. Ops has Vector and, on its int32, add, sub, mul,
// and left and right, which shift.
template <typename Ops, typename V = typename Ops::Vector>
BITSTRATA_INLINE void winograd_outputs(const Ops& o, const V (&m)[TwoOutputs::kPositions],
                                       const V (&correction)[TwoOutputs::kOutputs], V (&y)[TwoOutputs::kOutputs]) {
  y[0] = o.right(o.add(o.add(correction[0], m[0]), o.add(m[1], m[2])), 1);
  y[1] = o.right(o.add(o.sub(correction[1], m[2]), o.add(m[1], m[3])), 1);
}
template <typename Ops, typename V = typename Ops::Vector>
BITSTRATA_INLINE void winograd_outputs(const Ops& o, const V (&m)[FourOutputs::kPositions],
                                       const V (&correction)[FourOutputs::kOutputs], V (&y)[FourOutputs::kOutputs]) {
  const V ones = o.add(m[1], m[2]), one = o.sub(m[2], m[1]), twos = o.add(m[3], m[4]), two = o.sub(m[3], m[4]);
  y[0] = o.add(twos, o.left(o.add(m[0], o.left(o.sub(m[0], ones), 1)), 1));
  y[1] = o.add(two, o.left(one, 1));
  y[2] = o.sub(twos, ones);
  y[3] = o.add(one, o.left(o.add(two, o.add(m[5], o.left(m[5], 1))), 1));
  each<FourOutputs::kOutputs>([&](auto k) {
    y[k] = o.right(o.mul(o.add(y[k], correction[k]), FourOutputs::kInverse), FourOutputs::kShift[k]);
  });
}

template <typename Isa>
struct WinogradConv {
  using Form = typename Isa::Form;
  using Packed = WinogradPacked<Isa>;
  using Registers = typename Isa::Registers;
  using Vector = typename Registers::Vector;
  static constexpr int64_t kLanes = Isa::kLanes;
  static constexpr int64_t kGroup = 192 / Form::kOutputs;  // tiles

  static int64_t packed_bytes(const ConvShape& s) { return Packed(s).bytes; }
  static int64_t staged_row_bytes(const ConvShape& s) { return WinogradRows<Form>(s).bytes; }

  // Sets are parts.
  static int64_t pack_parts(const ConvShape& s) { return Packed(s).sets; }

  static void pack_part(const ConvShape& s, const WeightCodes& codes, const uint8_t* factor, const int32_t* pad,
                        void* packed, int64_t part) {
    const Packed p(s);
    uint8_t* base = static_cast<uint8_t*>(packed);
    if (part == 0) {
      std::memset(base + p.padding_at, 0, static_cast<size_t>(p.rows.lanes));
      for (int64_t c = 0; c < s.in_c; ++c) base[p.padding_at + c] = static_cast<uint8_t>(pad[c]);
    }
    const int64_t first = p.first_vector(part);
    Isa::pack_set(s, p, codes, factor, part, base + p.weights_at + first * p.of_vector(),
                  reinterpret_cast<int32_t*>(base + Packed::correction_at) + first * kLanes, p.vectors * kLanes);
  }

  static void pack(const ConvShape& s, const int8_t* codes, const int32_t* pad, void* packed) {
    const int64_t taps = s.kernel_h * s.kernel_w, row = s.in_c * taps;
    const WeightCodes in_order{codes, s.out_c * row, row, taps, 0, s.kernel_w, 1, taps};
    const Packed p(s);
    for (int64_t part = 0; part < p.sets; ++part) pack_part(s, in_order, nullptr, pad, packed, part);
    *static_cast<int64_t*>(packed) =
        Isa::chunk(s, p, reinterpret_cast<const int8_t*>(static_cast<uint8_t*>(packed) + p.weights_at));
  }

  static void stage(const ConvShape& s, const void* packed, const void* image, void* staged, int64_t row_begin,
                    int64_t row_end) {
    winograd_stage<Form>(s, static_cast<const uint8_t*>(packed) + Packed(s).padding_at, image, staged, row_begin,
                         row_end);
  }

  // All tiles of a group, for one set of vectors: as few blocks as can be, of nearly equal size. The first blocks have
  // the weights after the set's own fetched, `after` vectors: they would else be waited for, where a set has many.
  template <typename Results>
  static void convolve_group(WinogradBlock<Registers, Results> b, int64_t vectors, int64_t after, int64_t tiles) {
    const Vector* own = b.weights;
    const int64_t most = Isa::tiles_of(vectors), blocks = (tiles + most - 1) / most;
    for (int64_t left = blocks; left > 0; --left) {
      const int64_t count = (tiles + left - 1) / left;
      Isa::template block<Results>(vectors, count)(b);
      b.ahead = --after > 0 ? b.ahead + Form::kPositions * b.steps : own;
      b.window += count, b.pixel += count, b.outputs += count;
      tiles -= count;
    }
  }

  template <typename Results>
  static void run_to(const ConvShape& s, const void* packed, const void* staged, const Results& out, int64_t row_begin,
                     int64_t row_end) {
    const Packed p(s);
    const uint8_t* base = static_cast<const uint8_t*>(packed);
    const uint8_t* rows = static_cast<const uint8_t*>(staged);
    const int64_t chunk = *static_cast<const int64_t*>(packed);
    const int32_t* correction = reinterpret_cast<const int32_t*>(base + Packed::correction_at);
    const Vector* weights = reinterpret_cast<const Vector*>(base + p.weights_at);
    const uint8_t* window[kGroup];
    int64_t pixel[kGroup], outputs[kGroup];
    const int64_t end = row_end * p.rows.tiles;
    int64_t tiles;
    for (int64_t begin = row_begin * p.rows.tiles; begin < end; begin += tiles) {
      tiles = least_of(kGroup, end - begin);
      int64_t y = begin / p.rows.tiles, t = begin % p.rows.tiles;
      for (int64_t i = 0; i < tiles; ++i) {
        window[i] = rows + y * s.stride_h * p.rows.bytes + t * Form::kPositions * p.rows.lanes;
        pixel[i] = y * s.out_w + Form::kOutputs * t;
        outputs[i] = least_of(Form::kOutputs, s.out_w - Form::kOutputs * t);
        if (++t == p.rows.tiles) t = 0, ++y;
      }
      for (int64_t set = 0; set < p.sets; ++set) {
        const int64_t v = p.first_vector(set), vectors = p.first_vector(set + 1) - v, next = (set + 1) % p.sets;
        const int64_t of_vector = Form::kPositions * p.steps, left = s.out_c - v * kLanes;
        convolve_group<Results>({{s.kernel_h, s.dilation_h * p.rows.bytes, p.rows.lanes, p.steps, chunk, window,
                                  weights + v * of_vector, weights + p.first_vector(next) * of_vector},
                                 pixel,
                                 outputs,
                                 correction + v * kLanes,
                                 p.vectors * kLanes,
                                 least_of(vectors * kLanes, left),
                                 out.from(0, v * kLanes)},
                                vectors, p.first_vector(next + 1) - p.first_vector(next), tiles);
      }
    }
  }

 private:
  static int64_t least_of(int64_t a, int64_t b) { return b < a ? b : a; }
};

}  // namespace
}  // namespace bitstrata
