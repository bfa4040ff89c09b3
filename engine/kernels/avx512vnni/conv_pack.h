// Packed weights of the AVX-512 VNNI convolution. See pointwise.h for the unnamed namespace.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "../common/conv_stage.h"
#include "../common/weight_form.h"
#include "conv_narrow.h"
#include "set_packer.h"

namespace bitstrata {
namespace {

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
  const int64_t group = part / p.sets, first = p.first_vector(part % p.sets);
  const int64_t vectors = p.first_vector(part % p.sets + 1) - first, at = group * p.vectors + first;
  SetPacker packer(s, codes, factor, {group, first, vectors, p.stage.lanes / kStep, s.kernel_w, 1},
                   reinterpret_cast<__m512i*>(base + p.weights_at) + at * p.steps);
  packer.pack();
  const __m512i offset = _mm512_set1_epi32(-p.form.offset);
  for (int64_t v = 0; v < vectors; ++v)
    _mm512_storeu_si512(reinterpret_cast<int32_t*>(base) + (at + v) * kLanes,
                        _mm512_mullo_epi32(packer.sum(v), offset));
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
