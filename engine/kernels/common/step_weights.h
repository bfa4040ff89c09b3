// Packed weights of kernels that multiply a few bytes of a window, a step, by the weights that belong to them in each
// of kLanes output channels. Staged bytes are unsigned, or signed where T is. See pointwise.h for the unnamed
// namespace.
#pragma once

#include <cstdint>
#include <cstring>

#include "conv_stage.h"
#include "weight_form.h"
#include "windows.h"

namespace bitstrata {
namespace {

// Sizes and positions of everything that is packed: int32 correction[groups][vectors * kLanes]; padding; weights.
// Vectors of a group come in sets of nearly equal size, at most kVectors; weights are
// [group][set][step][vector of the set][lane][kStepBytes].
template <int kLanesOfVector, int kVectorsOfSet, typename T = uint8_t, int kStepBytes = 4>
struct StepWeights {
  using Staged = T;
  static constexpr int64_t kLanes = kLanesOfVector, kVectors = kVectorsOfSet;
  static constexpr int64_t kStep = kStepBytes, kVectorBytes = kLanes * kStep;

  // direct: windows are read from the image itself. most: steps of a chunk, at most. A run of a window is cut into
  // chunks of equal size, of which the last begins early where they do not divide it; there its first weights are 0.
  StepWeights(const ConvShape& s, const WeightForm& form, bool direct, int64_t most)
      : form(form),
        stage(s, round_up(s.group_in(), kStep), form.offset, !form.whole),
        runs(s, stage),
        vectors(round_up(s.group_out(), kLanes) / kLanes),
        sets((vectors + kVectors - 1) / kVectors),
        tap_steps(stage.lanes / kStep),
        run_steps(runs.elements / kStep),
        chunks((run_steps + most - 1) / most),
        chunk(round_up(run_steps, chunks) / chunks),
        steps(runs.count * chunks * chunk),
        row_bytes(direct ? s.in_w * s.in_c : stage.row_bytes),
        padding_at(s.groups * vectors * kLanes * 4),
        weights_at(round_up(padding_at + s.groups * stage.lanes, 64)),
        bytes(weights_at + s.groups * vectors * steps * kVectorBytes) {}

  int64_t first_vector(int64_t set) const { return set * vectors / sets; }
  // Of a run, the step at which chunk c begins.
  int64_t chunk_at(int64_t c) const { return c + 1 < chunks ? c * chunk : run_steps - chunk; }
  // Where step `first` of a tap's channels is: a step of the packed weights.
  int64_t step_of(int64_t ky, int64_t kx, int64_t first) const {
    const bool apart = runs.per_row > 1;
    const int64_t run = apart ? ky * runs.per_row + kx : ky, step = (apart ? 0 : kx * tap_steps) + first;
    const int64_t skipped = step >= (chunks - 1) * chunk ? chunks * chunk - run_steps : 0;
    return run * chunks * chunk + step + skipped;
  }

  WeightForm form;
  Staging<T> stage;
  Runs<T> runs;
  int64_t vectors, sets;             // of output channels, in each group
  int64_t tap_steps;                 // of a tap
  int64_t run_steps, chunks, chunk;  // of a run: its steps, its chunks, and the steps of each
  int64_t steps;                     // of a window
  int64_t row_bytes;                 // of what `run` reads
  int64_t padding_at, weights_at, bytes;
};

// Weights of input channels [begin, end) of one output channel, and the sum of their codes, which are multiplied by the
// channels' factors first, modulo 2^8, where there are some. Those of a step follow each other at `to`; steps are
// `pitch` bytes apart.
template <typename Weights>
int32_t pack_channels(const ConvShape& s, const Weights& p, const WeightCodes& w, const int8_t* codes,
                      const uint8_t* factor, int64_t begin, int64_t end, int64_t pitch, uint8_t* to) {
  int32_t sum = 0;
  const auto place = [&](const int8_t* from, int64_t in, int64_t count, uint8_t* there) {
    uint8_t step[Weights::kStep] = {};
    for (int64_t k = 0; k < count; ++k) {
      const int32_t plain = from[k * w.in_step];
      const int32_t code = factor == nullptr ? plain : static_cast<int8_t>(plain * factor[in + k]);
      step[k] = static_cast<uint8_t>(p.form.pack_mul * code + p.form.pack_add);
      sum += code;
    }
    std::memcpy(there, step, sizeof(step));
  };
  for (int64_t ky = 0; ky < s.kernel_h; ++ky)
    for (int64_t kx = 0; kx < s.kernel_w; ++kx) {
      const int8_t* from = codes + w.first_tap + ky * w.tap_y + kx * w.tap_x + begin * w.in_step;
      int64_t in = begin;
      for (; in + Weights::kStep <= end; in += Weights::kStep, from += Weights::kStep * w.in_step)
        place(from, in, Weights::kStep, to + p.step_of(ky, kx, in / Weights::kStep) * pitch);
      if (in < end) place(from, in, end - in, to + p.step_of(ky, kx, in / Weights::kStep) * pitch);
    }
  return sum;
}

// A set of vectors of one group: part group * sets + set.
template <typename Weights>
void pack_set(const ConvShape& s, const Weights& p, const WeightCodes& w, const uint8_t* factor, const int32_t* pad,
              void* packed, int64_t part) {
  constexpr int64_t kLanes = Weights::kLanes;
  constexpr int64_t kTogether = 32;  // input channels whose packed weights for a set stay in the L1 cache
  uint8_t* base = static_cast<uint8_t*>(packed);
  if (part == 0) stage_padding(s, p.stage, pad, reinterpret_cast<typename Weights::Staged*>(base + p.padding_at));
  const int64_t group = part / p.sets, first = p.first_vector(part % p.sets);
  const int64_t vectors = p.first_vector(part % p.sets + 1) - first, pitch = vectors * Weights::kVectorBytes;
  const int64_t left = s.group_out() - first * kLanes, outs = left < vectors * kLanes ? left : vectors * kLanes;
  uint8_t* weights = base + p.weights_at + (group * p.vectors + first) * p.steps * Weights::kVectorBytes;
  std::memset(weights, 0, static_cast<size_t>(p.steps * pitch));
  int32_t sums[Weights::kVectors * kLanes] = {};
  for (int64_t in = 0; in < s.group_in(); in += kTogether) {
    const int64_t end = in + kTogether < s.group_in() ? in + kTogether : s.group_in();
    for (int64_t o = 0; o < outs; ++o)
      sums[o] += pack_channels(s, p, w, w.data + group * w.group_step + (first * kLanes + o) * w.out_step,
                               factor == nullptr ? nullptr : factor + group * s.group_in(), in, end, pitch,
                               weights + o * Weights::kStep);
  }
  int32_t* correction = reinterpret_cast<int32_t*>(base) + (group * p.vectors + first) * kLanes;
  const uint32_t count = static_cast<uint32_t>(s.group_in() * s.kernel_h * s.kernel_w);
  for (int64_t o = 0; o < vectors * kLanes; ++o) {
    const uint32_t sum = static_cast<uint32_t>(sums[o]) * static_cast<uint32_t>(s.mul) +
                         count * static_cast<uint32_t>(s.add);  // of the full weights
    correction[o] = o < outs ? static_cast<int32_t>(sum * static_cast<uint32_t>(-p.form.offset)) : 0;
  }
}

// All of them, from codes (out_c, in_c / groups, kernel_h, kernel_w).
template <typename Weights>
void pack_sets(const ConvShape& s, const Weights& p, const int8_t* codes, const int32_t* pad, void* packed) {
  const int64_t taps = s.kernel_h * s.kernel_w, row = s.group_in() * taps;
  const WeightCodes in_order{codes, s.group_out() * row, row, taps, 0, s.kernel_w, 1, taps};
  for (int64_t part = 0; part < s.groups * p.sets; ++part) pack_set(s, p, in_order, nullptr, pad, packed, part);
}

}  // namespace
}  // namespace bitstrata
