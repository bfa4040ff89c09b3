// Convolutions of at most one vector of output channels, with stride 1 and three neighbouring columns of weights.
//
// With one vector of weights, a broadcast of four activations would feed a single multiplication. Here the sums of a
// row's neighbouring output pixels and the weights of the three columns are in registers together, and each broadcast
// is multiplied for the three pixels whose windows it lies in. See pointwise.h for the unnamed namespace.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "../common/unroll.h"
#include "results.h"

namespace bitstrata {
namespace {

// Rows of fewer than four pixels are better divided into blocks of the general kind, which reach over several rows.
inline bool narrow_fits(const ConvShape& s) {
  return s.kernel_w == 3 && s.stride_w == 1 && s.dilation_w == 1 && s.group_out() <= 16 && s.out_w >= 4;
}

template <typename Out>
struct NarrowConv {
  static constexpr int kTaps = 3;     // columns of the kernel
  static constexpr int kPixels = 14;  // of a block, at most: compilers keep no more sums in registers around a loop
  // The windows of a row's output pixels, as far as they lie in one group.
  struct Row {
    const uint8_t* staged;   // where the first pixel's window starts
    int64_t lanes;           // bytes of a staged pixel, in fours
    int64_t row_step;        // from row to row of the kernel, in bytes
    int64_t rows;            // of the kernel
    const __m512i* weights;  // [row of the kernel][column][four channels]
    __m512i first;           // where every sum begins
    __mmask16 channels;      // that are real
    int32_t mul;             // of the products, where each pixel's `added` is added; null: 1 and nothing
    const int32_t* added;
    Results<Out> out;
  };

  // The address is hidden from the compiler, which would else compute one for each pixel, and keep them in memory.
  static const uint8_t* in_register(const uint8_t* address) {
    __asm__("" : "+r"(address));
    return address;
  }

  static __m512i broadcast(const uint8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return _mm512_set1_epi32(four);
  }

  template <int kP>
  static void block(const Row& r) {
    __m512i sum[kP];
    const bool whole = r.added == nullptr;
    each<kP>([&](auto i) { sum[i] = whole ? r.first : _mm512_setzero_si512(); });
    const int64_t fours = r.lanes / 4;
    const __m512i* w = r.weights;
    for (int64_t row = 0; row < r.rows; ++row, w += kTaps * fours) {
      const uint8_t* x = r.staged + row * r.row_step;
      for (int64_t b = 0; b < fours; ++b, x += 4) {
        const __m512i w0 = _mm512_load_si512(w + b), w1 = _mm512_load_si512(w + fours + b),
                      w2 = _mm512_load_si512(w + 2 * fours + b);
        const uint8_t* at = x;
        each<kP + kTaps - 1>([&](auto i) {
          constexpr int kAt = decltype(i)::value;
          const __m512i a = broadcast(at);
          at = in_register(at + r.lanes);
          if constexpr (kAt < kP) sum[kAt] = _mm512_dpbusd_epi32(sum[kAt], a, w0);
          if constexpr (kAt >= 1 && kAt <= kP) sum[kAt - 1] = _mm512_dpbusd_epi32(sum[kAt - 1], a, w1);
          if constexpr (kAt >= 2) sum[kAt - 2] = _mm512_dpbusd_epi32(sum[kAt - 2], a, w2);
        });
      }
    }
    if (!whole) {
      const __m512i mul = _mm512_set1_epi32(r.mul);
      each<kP>([&](auto i) {
        sum[i] =
            _mm512_add_epi32(_mm512_mullo_epi32(sum[i], mul), _mm512_add_epi32(r.first, _mm512_set1_epi32(r.added[i])));
      });
    }
    r.out.template vector<true>(0, r.channels, [&](const auto& store) { each<kP>([&](auto i) { store(i, sum[i]); }); });
  }

  // `pixels` output pixels of a row: as few blocks as can be, of nearly equal size.
  static void convolve(Row r, int64_t pixels) {
    using BlockFn = void (*)(const Row&);
    static constexpr BlockFn kBlocks[kPixels] = {block<1>,  block<2>,  block<3>,  block<4>, block<5>,
                                                 block<6>,  block<7>,  block<8>,  block<9>, block<10>,
                                                 block<11>, block<12>, block<13>, block<14>};
    for (int64_t left = (pixels + kPixels - 1) / kPixels; left > 0; --left) {
      const int64_t count = (pixels + left - 1) / left;
      kBlocks[count - 1](r);
      r.staged += count * r.lanes, r.out = r.out.from(count, 0);
      if (r.added != nullptr) r.added += count;
      pixels -= count;
    }
  }
};

}  // namespace
}  // namespace bitstrata
