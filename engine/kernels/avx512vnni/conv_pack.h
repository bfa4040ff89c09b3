// Packed weights of the AVX-512 VNNI convolution. See pointwise.h for the unnamed namespace.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "../common/conv_stage.h"
#include "../common/unroll.h"
#include "../common/weight_form.h"
#include "conv_narrow.h"

namespace bitstrata {
namespace {

constexpr int kLanes = 16;   // output channels of a vector
constexpr int kVectors = 4;  // of a set, at most
constexpr int kStep = 4;     // activations of a step

int64_t min64(int64_t a, int64_t b) { return b < a ? b : a; }

Staging<uint8_t> staging_of(const ConvShape& s, const WeightForm& form) {
  if (dense_rows(s, kStep) && !narrow_fits(s)) return dense_staging<uint8_t>(s, kStep, form.offset, !form.whole);
  return {s, round_up(s.group_in(), kStep), form.offset, !form.whole};
}

// Sizes and positions of everything that is packed: int32 correction[groups][vectors * kLanes]; padding; weights.
// Vectors of a group come in sets of nearly equal size; weights are [group][set][step][vector of the set][lane][kStep].
struct Packed {
  Packed(const ConvShape& s, bool direct)
      : form(s),
        stage(staging_of(s, form)),
        runs(dense_runs(s, stage, kStep)),
        vectors(round_up(s.group_out(), kLanes) / kLanes),
        sets((vectors + kVectors - 1) / kVectors),
        steps(runs.count * runs.elements / kStep),
        row_bytes(direct ? s.in_w * s.in_c : stage.row_bytes),
        padding_at(s.groups * vectors * kLanes * 4),
        weights_at(round_up(padding_at + s.groups * stage.lanes, 64)),
        bytes(weights_at + s.groups * vectors * steps * 64) {}
  int64_t first_vector(int64_t set) const { return set * vectors / sets; }

  WeightForm form;
  Staging<uint8_t> stage;
  Runs<uint8_t> runs;
  int64_t vectors, sets;  // of output channels, in each group
  int64_t steps;          // of a window
  int64_t row_bytes;      // of what `run` reads
  int64_t padding_at, weights_at, bytes;
};

// Packs weights that are taken as they are, a set at a time, sixteen output channels by four channels of some taps at
// once.
class SetPacker {
 public:
  SetPacker(const ConvShape& s, const Packed& p, const WeightCodes& w, const uint8_t* factor, uint8_t* packed,
            int64_t part)
      : s_(s),
        p_(p),
        w_(w),
        group_(part / p.sets),
        first_(p.first_vector(part % p.sets)),
        vectors_(p.first_vector(part % p.sets + 1) - first_),
        factor_(factor != nullptr ? factor + group_ * s.group_in() : nullptr),
        fours_(p.stage.lanes / kStep),
        weights_(reinterpret_cast<__m512i*>(packed + p.weights_at) + (group_ * p.vectors + first_) * p.steps),
        correction_(reinterpret_cast<int32_t*>(packed) + (group_ * p.vectors + first_) * kLanes) {
    each<kVectors>([&](auto j) { sum_[j] = _mm512_setzero_si512(); });
  }

  void pack() {
    const bool rows = w_.taps == 1 && w_.in_step == 1, columns = w_.taps == 1 && w_.out_step == 1 && !rows;
    // Neighbours in memory come one after the other, as far as the vectors of the set allow it.
    const int64_t together = rows || w_.in_step < w_.out_step ? 16 : 1;
    for (int64_t tap = 0; tap < w_.taps; tap += kTogether) {
      if (!place_taps(tap)) continue;
      for (int64_t four = 0; four < fours_; four += together)
        for (int64_t v = 0; v < vectors_; ++v) {
          const int64_t end = min64(four + together, fours_);
          if (rows)
            for (int64_t f = four; f < end; f += kStep) pack_rows(v, f);
          else if (columns)
            for (int64_t f = four; f < end; ++f) pack_columns(v, f);
          else
            for (int64_t f = four; f < end; ++f) pack_taps(v, f, tap);
        }
    }
    const __m512i factor = _mm512_set1_epi32(-p_.form.offset);
    for (int64_t v = 0; v < vectors_; ++v)
      _mm512_storeu_si512(correction_ + v * kLanes, _mm512_mullo_epi32(sum_[v], factor));
  }

 private:
  static constexpr int kTogether = 16;  // taps, neighbours in memory

  static __mmask16 first_of(int64_t count) {
    return static_cast<__mmask16>(count >= kLanes ? 0xffff : count <= 0 ? 0 : (1 << count) - 1);
  }

  // place_[t]: which tap of the kernel tap + t of the weight is; -1: none.
  bool place_taps(int64_t tap) {
    bool any = false;
    each<kTogether>([&](auto t) { place_[t] = -1; });
    for (int64_t ky = 0; ky < s_.kernel_h; ++ky)
      for (int64_t kx = 0; kx < s_.kernel_w; ++kx) {
        const int64_t at = w_.first_tap + ky * w_.tap_y + kx * w_.tap_x - tap;
        if (at < 0 || at >= kTogether) continue;
        place_[at] = ky * s_.kernel_w + kx;
        any = true;
      }
    return any;
  }

  const int8_t* at(int64_t v, int64_t lane, int64_t in) const {
    return w_.data + group_ * w_.group_step + ((first_ + v) * kLanes + lane) * w_.out_step + in * w_.in_step;
  }
  int64_t outs(int64_t v) const { return s_.group_out() - (first_ + v) * kLanes; }  // that are left

  void store(int64_t v, int64_t tap, int64_t four, __m512i x) {
    if (factor_ != nullptr) x = multiplied(x, four);
    _mm512_store_si512(weights_ + (tap * fours_ + four) * vectors_ + v, x);
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
    const int64_t count = min64(4, fours_ - four);
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
  const Packed& p_;
  const WeightCodes& w_;
  int64_t group_, first_, vectors_;
  const uint8_t* factor_;  // of the group's input channels, or null
  int64_t fours_;
  __m512i* weights_;
  int32_t* correction_;
  __m512i sum_[kVectors];
  int64_t place_[kTogether];
};

bool as_they_are(const Packed& p) {
  return p.form.pack_mul == 1 && p.form.pack_add == 0 && p.form.whole && p.stage.lanes % kStep == 0;
}

// Sets of a group are parts.
int64_t pack_parts(const ConvShape& s) {
  const Packed p(s, false);
  return as_they_are(p) ? s.groups * p.sets : 0;
}

void pack_part(const ConvShape& s, const WeightCodes& codes, const uint8_t* factor, const int32_t* pad, void* packed,
               int64_t part) {
  const Packed p(s, false);
  uint8_t* base = static_cast<uint8_t*>(packed);
  if (part == 0) stage_padding(s, p.stage, pad, base + p.padding_at);
  SetPacker(s, p, codes, factor, base, part).pack();
}

// Channels [begin, end) of one output channel's weights (channel, tap), kStep of a tap at a time: step k of tap t goes
// to weights + (t * tap_steps + k) * pitch.
void pack_channels(const Packed& p, const int8_t* codes, int64_t taps, int64_t begin, int64_t end, int64_t tap_steps,
                   int64_t pitch, int8_t* weights) {
  const auto weight = [&](int8_t c) { return static_cast<int8_t>(p.form.pack_mul * c + p.form.pack_add); };
  for (int64_t i = begin; i < end; i += kStep) {
    const int64_t count = min64(kStep, end - i);
    const int8_t* from = codes + i * taps;
    int8_t* to = weights + i / kStep * pitch;
    if (count < kStep) {
      for (int64_t t = 0; t < taps; ++t)
        for (int64_t k = 0; k < count; ++k) to[t * tap_steps * pitch + k] = weight(from[k * taps + t]);
    } else {
      for (int64_t t = 0; t < taps; ++t) {
        const int8_t four[kStep] = {weight(from[t]), weight(from[taps + t]), weight(from[2 * taps + t]),
                                    weight(from[3 * taps + t])};
        std::memcpy(to + t * tap_steps * pitch, four, kStep);
      }
    }
  }
}

// The sum of an output channel's codes.
int32_t sum_codes(const int8_t* codes, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += codes[i];
  return sum;
}

// What the offset of the staged activations adds to an output channel's sums, to be taken off.
int32_t correction_of(const ConvShape& s, const Packed& p, const int8_t* codes, int64_t count) {
  const uint32_t sum = static_cast<uint32_t>(sum_codes(codes, count)) * static_cast<uint32_t>(s.mul) +
                       static_cast<uint32_t>(count) * static_cast<uint32_t>(s.add);  // of the full weights
  return static_cast<int32_t>(sum * static_cast<uint32_t>(-p.form.offset));
}

// Where pixels are dense: a kernel row's weights, (column, channel), are neighbours as its activations are.
void pack_dense(const ConvShape& s, const Packed& p, const int8_t* codes, uint8_t* base) {
  const int64_t row_steps = p.runs.elements / kStep, taps = s.kernel_h * s.kernel_w, row = s.in_c * taps;
  for (int64_t set = 0; set < p.sets; ++set) {
    const int64_t first = p.first_vector(set), together = p.first_vector(set + 1) - first;
    int8_t* weights = reinterpret_cast<int8_t*>(base + p.weights_at) + first * p.steps * kLanes * kStep;
    for (int64_t o = first * kLanes; o < min64(s.out_c, (first + together) * kLanes); ++o) {
      reinterpret_cast<int32_t*>(base)[o] = correction_of(s, p, codes + o * row, row);
      for (int64_t ky = 0; ky < s.kernel_h; ++ky)
        for (int64_t b = 0; b < s.kernel_w * s.in_c; ++b) {
          const int8_t code = codes[o * row + b % s.in_c * taps + ky * s.kernel_w + b / s.in_c];
          const int64_t at = (ky * row_steps + b / kStep) * together * kLanes + o - first * kLanes;
          weights[at * kStep + b % kStep] = static_cast<int8_t>(p.form.pack_mul * code + p.form.pack_add);
        }
    }
  }
}

void pack(const ConvShape& s, const int8_t* codes, const int32_t* pad, void* packed) {
  constexpr int64_t kTogether = 32;  // channels whose packed weights for a set stay in the L1 cache
  const Packed p(s, false);
  if (as_they_are(p)) {
    const int64_t taps = s.kernel_h * s.kernel_w, row = s.group_in() * taps;
    const WeightCodes in_order{codes, s.group_out() * row, row, taps, 0, s.kernel_w, 1, taps};
    for (int64_t part = 0; part < s.groups * p.sets; ++part) pack_part(s, in_order, nullptr, pad, packed, part);
    return;
  }
  uint8_t* base = static_cast<uint8_t*>(packed);
  if (p.stage.lanes % kStep != 0) {
    std::memset(packed, 0, static_cast<size_t>(p.bytes));
    stage_padding(s, p.stage, pad, base + p.padding_at);
    return pack_dense(s, p, codes, base);
  }
  const bool filled = s.group_in() % kStep == 0 && s.group_out() % kLanes == 0;  // no weight is left out
  std::memset(packed, 0, static_cast<size_t>(filled ? p.weights_at : p.bytes));
  stage_padding(s, p.stage, pad, base + p.padding_at);
  int32_t* correction = reinterpret_cast<int32_t*>(base);
  const int64_t taps = s.kernel_h * s.kernel_w, row = s.group_in() * taps;
  for (int64_t group = 0; group < s.groups; ++group)
    for (int64_t set = 0; set < p.sets; ++set) {
      const int64_t first = p.first_vector(set), together = p.first_vector(set + 1) - first;
      int8_t* weights = reinterpret_cast<int8_t*>(base + p.weights_at + (group * p.vectors + first) * p.steps * 64);
      const int64_t end = min64(s.group_out(), (first + together) * kLanes);
      const int8_t* of_group = codes + group * s.group_out() * row;
      for (int64_t i = 0; i < s.group_in(); i += kTogether)
        for (int64_t within = first * kLanes; within < end; ++within) {
          int8_t* to = weights + (within - first * kLanes) * kStep;
          pack_channels(p, of_group + within * row, taps, i, min64(i + kTogether, s.group_in()), p.stage.lanes / kStep,
                        together * kLanes * kStep, to);
        }
      for (int64_t within = first * kLanes; within < end; ++within) {
        correction[group * p.vectors * kLanes + within] = correction_of(s, p, of_group + within * row, row);
      }
    }
}

}  // namespace
}  // namespace bitstrata
