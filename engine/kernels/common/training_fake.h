// Fake quantization; see bitstrata/fake_kernels.h.
//
// Like everything in this folder this is compiled once for each instruction set, in an unnamed namespace.
#pragma once

#include <cmath>

#include "bitstrata/fake_kernels.h"
#include "training_loops.h"

namespace bitstrata {
namespace {

// The sign of zero is kept, as rounding instructions do. |x| < 2^22, or NaN.
inline float nearest(float x) {
#if defined(__AVX2__) || defined(__AVX512F__) || defined(__aarch64__)
  return __builtin_rintf(x);
#else
  return __builtin_copysignf(round_even(x), x);
#endif
}

inline float floored(float x) {
#if defined(__AVX2__) || defined(__AVX512F__) || defined(__aarch64__)
  return __builtin_floorf(x);
#else
  const float r = round_even(x);
  return r > x ? r - 1.0f : r;
#endif
}

// NaN stays.
inline float limited(float x, float lo, float hi) {
  const float above = x < lo ? lo : x;
  return above > hi ? hi : above;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
// The upper half is x as bfloat16, rounded to nearest even. A NaN stays one if its lower half is 0, as in those that
// come of bfloat16 or of an operation; steps are made so.
inline uint32_t bfloat_up(float x) {
  const uint32_t bits = bits_of(x);
  return bits + 0x7FFFu + (bits >> 16 & 1u);
}
inline void put(float x, float* to) { *to = x; }
inline void put(float x, uint16_t* to) { *to = static_cast<uint16_t>(bfloat_up(x) >> 16); }

template <FakeGrid kGrid>
inline float fake_code(float u, const FakeArgs& a) {
  if constexpr (kGrid == FakeGrid::kUniform || kGrid == FakeGrid::kAffine) {
    return nearest(limited(u, a.lo, a.hi));
  } else if constexpr (kGrid == FakeGrid::kSymmetric) {
    const float inside = limited(u, a.lo, a.hi), whole = floored(inside), half = (whole - a.lo) * 0.5f;
    const float odd = (half - floored(half)) * 2.0f, code = whole - (inside == whole ? odd : 0.0f);
    return limited(code, a.lo, a.hi - 1.0f);
  } else if constexpr (kGrid == FakeGrid::kNested) {
    return floored(floored(limited(u, a.lo, a.hi)) / a.power);  // lo and hi are whole
  } else if constexpr (kGrid == FakeGrid::kVertical) {
    return floored(nearest(limited(u, a.lo, a.hi)) / a.power);
  } else if constexpr (kGrid == FakeGrid::kUnit || kGrid == FakeGrid::kSigmoids) {
    return nearest(limited(u, 0.0f, 1.0f) * a.hi);
  } else if constexpr (kGrid == FakeGrid::kTanhFloor) {
    return limited(floored(u * -a.lo), a.lo, a.hi);
  } else if constexpr (kGrid == FakeGrid::kScaled) {
    return limited(nearest(limited(u * a.unit, a.lo, a.hi)) * a.power, a.lo, a.hi);
  } else {
    return nearest((limited(u, -1.0f, 1.0f) + 1.0f) / 2.0f * (a.hi - a.lo)) + a.lo;
  }
}

template <FakeGrid kGrid>
inline float fake_value(float code, const FakeArgs& a) {
  constexpr bool kPlain = kGrid == FakeGrid::kUniform || kGrid == FakeGrid::kUnit;
  return (kPlain ? code : code + a.add) * a.scale;
}

template <FakeGrid kGrid>
inline float fake_level(float code, const FakeArgs& a) {
  if constexpr (kGrid == FakeGrid::kSymmetric) return code + 0.5f;
  if constexpr (kGrid == FakeGrid::kNested) return (code + 0.5f) * a.power;
  if constexpr (kGrid == FakeGrid::kVertical) return (code + a.slope_add) * a.power;
  if constexpr (kGrid == FakeGrid::kUnit) return code * a.unit;
  if constexpr (kGrid == FakeGrid::kCentred) return (code + 0.5f) * a.unit;
  return code;
}

template <FakeGrid kGrid>
inline bool fake_inside(float x, float u, const FakeArgs& a) {
  if constexpr (kGrid == FakeGrid::kUnit || kGrid == FakeGrid::kCentred) return (x >= a.first) & (x <= a.last);
  if constexpr (kGrid == FakeGrid::kSymmetric || kGrid == FakeGrid::kNested || kGrid == FakeGrid::kScaled)
    return (u >= a.first) & (u <= a.last);
  return !((u < a.first) | (u > a.last));  // with NaN
}

// u of x. Division takes no longer than a product and its corrections would.
template <FakeGrid kGrid, bool kNarrow>
inline float fake_position(float x, const FakeArgs& a) {
  if constexpr (kGrid == FakeGrid::kScaled) return x * a.divisor;
  const float u = (kGrid == FakeGrid::kAffine ? x - a.origin : x) / a.divisor;
  return kNarrow ? from_bits(static_cast<int32_t>(bfloat_up(u) & 0xFFFF0000u)) : u;
}

template <FakeGrid kGrid, bool kNarrow, typename T>
void fake_forward_with(const FakeArgs& args, const T* x, int64_t count, T* out) {
  const FakeArgs a = args;  // a copy: a store of 16-bit elements might change what a reference refers to
  BITSTRATA_INDEPENDENT
  for (int64_t i = 0; i < count; ++i)
    put(fake_value<kGrid>(fake_code<kGrid>(fake_position<kGrid, kNarrow>(to_float(x[i]), a), a), a), out + i);
}

template <FakeGrid kGrid, typename T>
void fake_forward(const FakeArgs& a, const T* x, int64_t count, T* out) {
  if constexpr (sizeof(T) == 2)
    if (a.narrow) return fake_forward_with<kGrid, true>(a, x, count, out);
  fake_forward_with<kGrid, false>(a, x, count, out);
}

constexpr int64_t kFakeLanes = 64;    // sums kept side by side, in float32 over a piece
constexpr int64_t kFakePiece = 4096;  // elements; 64 summands a lane

constexpr bool fake_tanh(FakeGrid grid) { return grid == FakeGrid::kTanh || grid == FakeGrid::kTanhFloor; }

// e^-s for |s| < 80, to one unit in the last place or two; NaN stays.
inline float falling_exp(float s) {
  const float turns = s * -1.44269504f + 12582912.0f, whole = turns - 12582912.0f;  // the lower bits: a power of 2
  const float r = (-s - whole * 0.693359375f) - whole * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 0.5f;
  p = p * (r * r) + r + 1.0f;
  return p * from_bits(static_cast<int32_t>((bits_of(turns) + 127u) << 23));
}

template <typename T>
void fake_backward_sigmoids(const FakeArgs& a, const T* g, const T* x, int64_t count, T* out) {
  for (int64_t begin = 0; begin < count; begin += kFakeLanes) {
    const int64_t here = least(kFakeLanes, count - begin);
    float falling[kFakeLanes] = {}, total[kFakeLanes] = {};
    BITSTRATA_INDEPENDENT
    for (int64_t j = 0; j < here; ++j)
      falling[j] = falling_exp(limited((to_float(x[begin + j]) - 0.5f) / a.alpha, -a.reach, a.reach));
    for (int64_t m = 0; m < a.count; ++m) {
      const float ratio = a.ratios[m];
      BITSTRATA_INDEPENDENT
      for (int64_t j = 0; j < kFakeLanes; ++j) {
        const float e = falling[j] * ratio, rest = 1.0f + e;
        total[j] += e / (rest * rest);
      }
    }
    BITSTRATA_INDEPENDENT
    for (int64_t j = 0; j < here; ++j) put(to_float(g[begin + j]) * (total[j] * a.gain), out + begin + j);
  }
}

template <FakeGrid kGrid, bool kNarrow, bool kSums, typename T>
inline void fake_backward_lanes(const FakeArgs& a, const T* g, const T* x, int64_t count, T* out, float* slopes,
                                float* second) {
  BITSTRATA_INDEPENDENT
  for (int64_t j = 0; j < count; ++j) {
    const float value = to_float(x[j]), gradient = to_float(g[j]), u = fake_position<kGrid, kNarrow>(value, a);
    if constexpr (fake_tanh(kGrid)) {
      put(gradient / a.divisor * (1.0f - value * value), out + j);
      if constexpr (kSums) slopes[j] += u * gradient;
      continue;
    }
    const bool inside = fake_inside<kGrid>(value, u, a);
    if constexpr (kGrid == FakeGrid::kNested || kGrid == FakeGrid::kScaled) {
      put(inside ? gradient * a.gain : 0.0f, out + j);
    } else {
      out[j] = inside ? g[j] : T{0};
    }
    if constexpr (kSums && kGrid != FakeGrid::kScaled) {
      const float level = fake_level<kGrid>(fake_code<kGrid>(u, a), a);
      float slope = level - (inside ? u : 0.0f);
      if constexpr (kGrid == FakeGrid::kUnit || kGrid == FakeGrid::kCentred) slope = inside & !a.inside ? 0.0f : slope;
      slopes[j] += slope * gradient;
      if constexpr (kGrid == FakeGrid::kNested) second[j] += level * gradient;
      if constexpr (kGrid == FakeGrid::kAffine) {
        const float outside = from_bits(inside ? 0 : static_cast<int32_t>(bits_of(gradient)));
        second[j] += outside;
      }
    }
  }
}

template <FakeGrid kGrid, bool kNarrow, bool kSums, typename T>
void fake_backward_with(const FakeArgs& args, const T* g, const T* x, int64_t count, T* out, FakeSums* sums) {
  constexpr bool kSecond = kGrid == FakeGrid::kNested || kGrid == FakeGrid::kAffine;
  const FakeArgs a = args;
  T unwanted[kFakeLanes];
  for (int64_t begin = 0; begin < count; begin += kFakePiece) {
    const int64_t end = least(count, begin + kFakePiece);
    float slopes[kFakeLanes] = {}, second[kSecond ? kFakeLanes : 1] = {};
    int64_t i = begin;
    for (; i + kFakeLanes <= end; i += kFakeLanes)
      fake_backward_lanes<kGrid, kNarrow, kSums>(a, g + i, x + i, kFakeLanes, out == nullptr ? unwanted : out + i,
                                                 slopes, second);
    fake_backward_lanes<kGrid, kNarrow, kSums>(a, g + i, x + i, end - i, out == nullptr ? unwanted : out + i, slopes,
                                               second);
    if constexpr (kSums) {
      for (float s : slopes) sums->slopes += s;
      for (float s : second) sums->second += s;
    }
  }
}

template <FakeGrid kGrid, typename T>
void fake_backward(const FakeArgs& a, const T* g, const T* x, int64_t count, T* out, FakeSums* sums) {
  if constexpr (kGrid == FakeGrid::kSigmoids) {
    if (out != nullptr) fake_backward_sigmoids(a, g, x, count, out);
    return;
  }
  if constexpr (sizeof(T) == 2) {
    if (a.narrow)
      return sums == nullptr ? fake_backward_with<kGrid, true, false>(a, g, x, count, out, sums)
                             : fake_backward_with<kGrid, true, true>(a, g, x, count, out, sums);
  }
  sums == nullptr ? fake_backward_with<kGrid, false, false>(a, g, x, count, out, sums)
                  : fake_backward_with<kGrid, false, true>(a, g, x, count, out, sums);
}

#define BITSTRATA_FAKE_GRIDS(kernel, type)                                                                  \
  {kernel<FakeGrid::kUniform, type>, kernel<FakeGrid::kAffine, type>,   kernel<FakeGrid::kSymmetric, type>, \
   kernel<FakeGrid::kNested, type>,  kernel<FakeGrid::kVertical, type>, kernel<FakeGrid::kUnit, type>,      \
   kernel<FakeGrid::kCentred, type>, kernel<FakeGrid::kTanh, type>,     kernel<FakeGrid::kTanhFloor, type>, \
   kernel<FakeGrid::kScaled, type>,  kernel<FakeGrid::kSigmoids, type>}

constexpr FakeKernels kFakeKernels = {
    BITSTRATA_FAKE_GRIDS(fake_forward, float),
    BITSTRATA_FAKE_GRIDS(fake_forward, uint16_t),
    BITSTRATA_FAKE_GRIDS(fake_backward, float),
    BITSTRATA_FAKE_GRIDS(fake_backward, uint16_t),
};
#undef BITSTRATA_FAKE_GRIDS

}  // namespace
}  // namespace bitstrata
