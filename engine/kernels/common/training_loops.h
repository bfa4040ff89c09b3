// What the kernels of a training step share, and quantization: loops that compilers turn into vector code for the
// instruction set at hand. Translation units that include it are compiled without contraction of floating-point
// expressions.
//
// Like everything in this folder this is compiled once for each instruction set, in an unnamed namespace.
#pragma once

#include <cstring>
#include <type_traits>

#include "bitstrata/training.h"
#include "noise.h"
#include "pack.h"
#include "unroll.h"

namespace bitstrata {
namespace {

inline int64_t least(int64_t a, int64_t b) { return b < a ? b : a; }

// To nearest, ties to even: exact for |x| < 2^22, and beyond that far from every bound that codes are clamped to.
inline float round_even(float x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  return (x + kMagic) - kMagic;
}

// Comparisons written so that they become single vector instructions.
inline float greater(float a, float b) { return a > b ? a : b; }
inline float lesser(float a, float b) { return a < b ? a : b; }
inline int32_t greater(int32_t a, int32_t b) { return a > b ? a : b; }
inline int32_t lesser(int32_t a, int32_t b) { return a < b ? a : b; }

inline int32_t magnitude_bits(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits & 0x7FFFFFFF;
}
inline float from_bits(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float magnitude(float x) { return __builtin_fabsf(x); }

inline float to_float(float x) { return x; }
inline float to_float(int32_t x) { return static_cast<float>(x); }
inline float to_float(uint16_t bfloat) { return from_bits(static_cast<int32_t>(static_cast<uint32_t>(bfloat) << 16)); }

inline int32_t round_noisy(float z, int32_t bits) {
  return ((static_cast<int32_t>((z + 128.0f) * 65536.0f) + bits) >> 16) - 128;
}

// Asks for `count` elements of x from x[at] on, which may be beyond its end. Large tensors arrive while elements before
// these are worked on; the processor alone does not look far enough ahead, least of all where noise is made in between.
template <typename T>
inline void ask_for(const T* x, int64_t at, int64_t count) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(x) + static_cast<uintptr_t>(at) * sizeof(T);
  for (uintptr_t i = 0; i < static_cast<uintptr_t>(count) * sizeof(T); i += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(first + i));
}
constexpr int64_t kAhead = 2048;  // elements

// Calls body(at, channel, n): elements [at, at + n) whose first has index `channel` in arrays of `period` elements.
template <typename Body>
inline void each_stretch(int64_t begin, int64_t end, int64_t period, const Body& body) {
  int64_t channel = begin % period;
  for (int64_t at = begin; at < end;) {
    const int64_t n = least(period - channel, end - at);
    body(at, channel, n);
    at += n;
    channel = 0;
  }
}

// The same with random bits of element `at`, null without noise.
template <bool kNoisy, typename Body>
inline void each_noisy_stretch(int64_t count, int64_t period, const Noise* noise, const Body& body) {
  if constexpr (kNoisy) {
    uint16_t buffer[kNoiseBuffer];
    const int64_t chunk = period < kNoiseChunk ? kNoiseChunk / period * period : kNoiseChunk;
    for (int64_t begin = 0; begin < count; begin += chunk) {
      const int64_t end = least(count, begin + chunk);
      const uint16_t* bits = noise_bits(*noise, noise->start + begin, end - begin, buffer);
      each_stretch(begin, end, period,
                   [&](int64_t at, int64_t channel, int64_t n) { body(at, channel, n, bits + (at - begin)); });
    }
  } else {
    each_stretch(0, count, period, [&](int64_t at, int64_t channel, int64_t n) {
      body(at, channel, n, static_cast<const uint16_t*>(nullptr));
    });
  }
}

inline void unshift(const uint8_t* codes, int64_t count, int64_t period, const uint16_t* factor, int last,
                    uint8_t* out) {
  each_stretch(0, count, period, [&](int64_t at, int64_t c, int64_t n) {
    const uint8_t* from = codes + at;
    const uint16_t* by = factor + c;
    uint8_t* to = out + at;
    const int right = last;
    BITSTRATA_INDEPENDENT
    for (int64_t j = 0; j < n; ++j) to[j] = static_cast<uint8_t>(static_cast<uint16_t>(from[j] * by[j]) >> right);
  });
}

template <typename In>
void range(const In* x, int64_t count, int64_t period, float* most) {
  each_stretch(0, count, period, [&](int64_t at, int64_t channel, int64_t n) {
    const In* from = x + at;
    float* to = most + channel;
    BITSTRATA_INDEPENDENT
    for (int64_t j = 0; j < n; ++j)  // as integers, magnitudes order NaN above infinity above all else
      to[j] = from_bits(greater(magnitude_bits(to_float(from[j])), magnitude_bits(to[j])));
  });
}

template <bool kNoisy>
inline int32_t code_of(float z, float lo, float hi, uint16_t bits) {
  if constexpr (kNoisy) {
    return greater(lesser(round_noisy(z, bits), static_cast<int32_t>(hi)), static_cast<int32_t>(lo));
  } else {
    return static_cast<int32_t>(greater(lesser(round_even(z), hi), lo));
  }
}

// 0 or a power of two with the sign of z, whose magnitude is below 2^30.
template <bool kNoisy>
inline int32_t power_of(float z, float hi, uint16_t bits) {
  const int32_t noise = kNoisy ? bits : 1 << 15, raw = magnitude_bits(z);
  const float size = from_bits(raw);
  const int32_t exponent = ((raw + (noise << 7)) >> 23) - 127;
  const int32_t few = (static_cast<int32_t>(lesser(size, 1.0f) * 65536.0f) + noise) >> 16;
  const int32_t high = static_cast<int32_t>(1u << (exponent & 31));  // of no use below 1
  const int32_t power = lesser(size < 1.0f ? few : high, static_cast<int32_t>(hi));
  return z < 0 ? -power : power;
}

// The code, one or the other, modulo 2^32, to be shifted.
template <bool kNoisy, bool kPowers = false>
inline uint32_t code_of_u(float z, float lo, float hi, uint16_t bits) {
  if constexpr (kPowers) return static_cast<uint32_t>(power_of<kNoisy>(z, hi, bits));
  return static_cast<uint32_t>(code_of<kNoisy>(z, lo, hi, bits));
}

// Calls body(noisy, powers) with std::true_type or std::false_type for each.
template <typename Body>
inline void as_asked(const CodeArgs& a, const Body& body) {
  const std::true_type yes;
  const std::false_type no;
  if (a.powers)
    a.noise == nullptr ? body(no, yes) : body(yes, yes);
  else
    a.noise == nullptr ? body(no, no) : body(yes, no);
}

template <bool kNoisy, bool kPowers, typename In>
void codes_with(const In* x, int64_t count, int64_t period, const CodeArgs& a, uint8_t* out) {
  each_noisy_stretch<kNoisy>(count, period, a.noise, [&](int64_t at, int64_t c, int64_t n, const uint16_t* bits) {
    const In* from = x + at;
    const float* factor = a.factor + c;
    const int32_t* shift = a.shift + c;
    uint8_t* to = out + at;
    const float lo = a.lo, hi = a.hi;
    ask_for(from, kNoisy ? kNoiseChunk : kAhead, n);
    BITSTRATA_INDEPENDENT
    for (int64_t j = 0; j < n; ++j)
      to[j] = static_cast<uint8_t>(
          code_of_u<kNoisy, kPowers>(to_float(from[j]) * factor[j], lo, hi, kNoisy ? bits[j] : 0) << shift[j]);
  });
}

template <typename In>
void codes(const In* x, int64_t count, int64_t period, const CodeArgs& a, uint8_t* out) {
  as_asked(a, [&](auto noisy, auto powers) { codes_with<noisy.value, powers.value>(x, count, period, a, out); });
}

constexpr int64_t kStage = 1 << 12;  // elements that stay in the cache between two passes

// Calls body(at, n) for pieces of a few thousand elements, whole periods and whole bytes of bits.
template <typename Body>
inline void each_stage(int64_t count, int64_t period, const Body& body) {
  const int64_t unit = 8 * period, stage = unit < kStage ? kStage / unit * unit : unit;
  for (int64_t at = 0; at < count; at += stage) body(at, least(stage, count - at));
}

}  // namespace
}  // namespace bitstrata
