// Weights packed by sets of vectors of sixteen output channels, four input channels of each together. See
// ../common/pointwise.h for the unnamed namespace.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "../common/unroll.h"
#include "bitstrata/kernels.h"

namespace bitstrata {
namespace {

constexpr int kLanes = 16;   // output channels of a vector
constexpr int kVectors = 4;  // of a set, at most
constexpr int kStep = 4;     // activations of a step

int64_t min64(int64_t a, int64_t b) { return b < a ? b : a; }

// Where a set's weights go: the vector of tap (ky, kx), input channels 4 f to 4 f + 3 and vector v of the set is number
// ((ky * tap_y + kx * tap_x) * fours + f) * vectors + v.
struct SetPlace {
  int64_t group, first, vectors;  // the set: vectors from `first` on, of a group
  int64_t fours;                  // of a tap's channels
  int64_t tap_y, tap_x;
};

// Packs codes as they are, a set at a time, sixteen output channels by four channels of some taps at once.
class SetPacker {
 public:
  // factor: as of ConvKernel::pack_part. weights: of the set.
  SetPacker(const ConvShape& s, const WeightCodes& w, const uint8_t* factor, const SetPlace& to, __m512i* weights)
      : s_(s),
        w_(w),
        to_(to),
        factor_(factor != nullptr ? factor + to.group * s.group_in() : nullptr),
        weights_(weights) {
    each<kVectors>([&](auto j) { sum_[j] = _mm512_setzero_si512(); });
  }

  void pack() {
    const bool rows = w_.taps == 1 && w_.in_step == 1, columns = w_.taps == 1 && w_.out_step == 1 && !rows;
    // Neighbours in memory come one after the other, as far as the vectors of the set allow it.
    const int64_t together = rows || w_.in_step < w_.out_step ? 16 : 1;
    for (int64_t tap = 0; tap < w_.taps; tap += kTogether) {
      if (!place_taps(tap)) continue;
      for (int64_t four = 0; four < to_.fours; four += together)
        for (int64_t v = 0; v < to_.vectors; ++v) {
          const int64_t end = min64(four + together, to_.fours);
          if (rows)
            for (int64_t f = four; f < end; f += kStep) pack_rows(v, f);
          else if (columns)
            for (int64_t f = four; f < end; ++f) pack_columns(v, f);
          else
            for (int64_t f = four; f < end; ++f) pack_taps(v, f, tap);
        }
    }
  }

  // Of the codes of a vector's output channels.
  __m512i sum(int64_t v) const { return sum_[v]; }

 private:
  static constexpr int kTogether = 16;  // taps, neighbours in memory

  static __mmask16 first_of(int64_t count) {
    return static_cast<__mmask16>(count >= kLanes ? 0xffff : count <= 0 ? 0 : (1 << count) - 1);
  }

  // place_[t]: where tap + t of the weight goes; -1: nowhere.
  bool place_taps(int64_t tap) {
    bool any = false;
    each<kTogether>([&](auto t) { place_[t] = -1; });
    for (int64_t ky = 0; ky < s_.kernel_h; ++ky)
      for (int64_t kx = 0; kx < s_.kernel_w; ++kx) {
        const int64_t at = w_.first_tap + ky * w_.tap_y + kx * w_.tap_x - tap;
        if (at < 0 || at >= kTogether) continue;
        place_[at] = ky * to_.tap_y + kx * to_.tap_x;
        any = true;
      }
    return any;
  }

  const int8_t* at(int64_t v, int64_t lane, int64_t in) const {
    return w_.data + to_.group * w_.group_step + ((to_.first + v) * kLanes + lane) * w_.out_step + in * w_.in_step;
  }
  int64_t outs(int64_t v) const { return s_.group_out() - (to_.first + v) * kLanes; }  // that are left

  void store(int64_t v, int64_t tap, int64_t four, __m512i x) {
    if (factor_ != nullptr) x = multiplied(x, four);
    _mm512_store_si512(weights_ + (tap * to_.fours + four) * to_.vectors + v, x);
    sum_[v] = _mm512_dpbusd_epi32(sum_[v], _mm512_set1_epi8(1), x);
  }

  // Each lane's four bytes times the factors of their channels: even bytes and odd ones as halves of 16 bits.
  __m512i multiplied(__m512i x, int64_t four) const {
    uint32_t factors = 0;
    std::memcpy(&factors, factor_ + four * kStep, static_cast<size_t>(min64(kStep, s_.group_in() - four * kStep)));
    const __m512i f = _mm512_set1_epi32(static_cast<int32_t>(factors));
    const __m512i even = _mm512_mullo_epi16(x, f),
                  odd = _mm512_mullo_epi16(_mm512_srli_epi16(x, 8), _mm512_srli_epi16(f, 8));
    return _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaa, even, _mm512_slli_epi16(odd, 8));
  }

  // Sixteen bytes of each output channel 4 j + q, in quarter j; those that `mask` leaves out are 0.
  __m512i load(int64_t v, int64_t q, int64_t in, int64_t offset, __mmask16 mask) const {
    const int64_t left = outs(v);
    __m512i x = _mm512_setzero_si512();
    each<4>([&](auto j) {
      constexpr int kQuarter = decltype(j)::value;
      const __mmask16 m = 4 * kQuarter + q < left ? mask : 0;
      x = _mm512_inserti32x4(x, _mm_maskz_loadu_epi8(m, at(v, 4 * kQuarter + q, in) + offset), kQuarter);
    });
    return x;
  }

  // Of x[q], whose quarter j is four elements of channel 4 j + q: the vectors of each element.
  static void transpose(const __m512i* x, __m512i* out) {
    const __m512i low = _mm512_unpacklo_epi32(x[0], x[1]), high = _mm512_unpackhi_epi32(x[0], x[1]),
                  low2 = _mm512_unpacklo_epi32(x[2], x[3]), high2 = _mm512_unpackhi_epi32(x[2], x[3]);
    out[0] = _mm512_unpacklo_epi64(low, low2), out[1] = _mm512_unpackhi_epi64(low, low2);
    out[2] = _mm512_unpacklo_epi64(high, high2), out[3] = _mm512_unpackhi_epi64(high, high2);
  }

  // One tap; a channel's inputs are neighbours in memory: four steps.
  void pack_rows(int64_t v, int64_t four) {
    __m512i x[4], out[4];
    const __mmask16 mask = first_of(s_.group_in() - four * kStep);
    each<4>([&](auto q) { x[q] = load(v, q, four * kStep, 0, mask); });
    transpose(x, out);
    const int64_t count = min64(4, to_.fours - four);
    for (int64_t i = 0; i < count; ++i) store(v, 0, four + i, out[i]);
  }

  // One tap; the output channels are neighbours in memory: one step.
  void pack_columns(int64_t v, int64_t four) {
    const int64_t left = s_.group_in() - four * kStep;
    __m128i x[4];
    each<4>([&](auto k) { x[k] = _mm_maskz_loadu_epi8(k < left ? first_of(outs(v)) : 0, at(v, 0, four * kStep + k)); });
    const __m128i low = _mm_unpacklo_epi8(x[0], x[1]), high = _mm_unpackhi_epi8(x[0], x[1]),
                  low2 = _mm_unpacklo_epi8(x[2], x[3]), high2 = _mm_unpackhi_epi8(x[2], x[3]);
    __m512i all = _mm512_castsi128_si512(_mm_unpacklo_epi16(low, low2));
    all = _mm512_inserti32x4(all, _mm_unpackhi_epi16(low, low2), 1);
    all = _mm512_inserti32x4(all, _mm_unpacklo_epi16(high, high2), 2);
    all = _mm512_inserti32x4(all, _mm_unpackhi_epi16(high, high2), 3);
    store(v, 0, four, all);
  }

  // Up to kTogether taps that are neighbours in memory, the first of them `tap`: one step of each.
  void pack_taps(int64_t v, int64_t four, int64_t tap) {
    const int64_t left = s_.group_in() - four * kStep;
    const __mmask16 mask = first_of(w_.taps - tap);
    __m512i fours[4][4];  // [four taps][q]
    each<4>([&](auto q) {
      __m512i x[4];
      each<4>([&](auto k) { x[k] = load(v, q, four * kStep + k, tap, k < left ? mask : 0); });
      const __m512i low = _mm512_unpacklo_epi8(x[0], x[1]), high = _mm512_unpackhi_epi8(x[0], x[1]),
                    low2 = _mm512_unpacklo_epi8(x[2], x[3]), high2 = _mm512_unpackhi_epi8(x[2], x[3]);
      fours[0][q] = _mm512_unpacklo_epi16(low, low2), fours[1][q] = _mm512_unpackhi_epi16(low, low2);
      fours[2][q] = _mm512_unpacklo_epi16(high, high2), fours[3][q] = _mm512_unpackhi_epi16(high, high2);
    });
    for (int64_t t = 0; t < min64(kTogether, w_.taps - tap); t += 4) {
      __m512i out[4];
      transpose(fours[t / 4], out);
      each<4>([&](auto i) {
        if (place_[t + i] >= 0) store(v, place_[t + i], four, out[i]);
      });
    }
  }

  const ConvShape& s_;
  const WeightCodes& w_;
  SetPlace to_;
  const uint8_t* factor_;  // of the group's input channels, or null
  __m512i* weights_;
  __m512i sum_[kVectors];
  int64_t place_[kTogether];
};

}  // namespace
}  // namespace bitstrata
