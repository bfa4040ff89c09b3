// Quantization-aware training, backward; see bitstrata/qat_kernels.h.
//
// Like everything in this folder this is compiled once for each instruction set, in an unnamed namespace.
#pragma once

#include <type_traits>

#include "qat_forward.h"

namespace bitstrata {
namespace {

constexpr int64_t kQatRows = 64;  // whose sums are kept in single precision

inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// What passes of the gradient at one element, and what the step gets of it.
struct QatPassed {
  float gradient, step;
};

template <bool kQuantized, bool kAdds>
inline QatPassed qat_passed(float x, float scale, float offset, float g, float add, const QatPass& p) {
  const float raw = x * scale + offset, u = greater(raw, p.line.floor);
  QatPassed out{g, 0};
  if (kQuantized) {
    const bool inside = (u >= p.first) & (u <= p.last);
    const float code = greater(lesser(round_even(u), p.levels.hi), p.levels.lo);
    const float all = g * code, rest = g * (code - u) * p.inner;
    out.gradient = inside ? g : 0.0f;
    out.step = inside ? rest : all;
  }
  if (kAdds) out.gradient = out.gradient + add;
  out.gradient = raw >= p.keep ? out.gradient : 0.0f;
  return out;
}

// Calls take(element, channel, x, what passed) for values of x; no two calls depend on one another.
template <bool kQuantized, bool kAdds, typename Real, typename Take>
inline void qat_chunk(const float* x, int64_t at, int64_t c, int64_t n, const QatPass& pass, const QatGradient& g,
                      const Take& take) {
  const Real* gradient = static_cast<const Real*>(g.g) + at;
  const Real* other = static_cast<const Real*>(g.add) + (kAdds ? at : 0);
  const float *scale = pass.line.scale + c, *offset = pass.line.offset + c;
  const QatPass p = pass;
  BITSTRATA_INDEPENDENT
  for (int64_t j = 0; j < n; ++j) {
    const float value = x[j];
    take(at + j, c + j, value,
         qat_passed<kQuantized, kAdds>(value, scale[j], offset[j], to_float(gradient[j]),
                                       kAdds ? to_float(other[j]) : 0.0f, p));
  }
}

template <bool kQuantized, bool kAdds, typename Real>
void qat_gradient_sums_with(const QatElements& x, int64_t count, int64_t period, const QatPass& p, const QatGradient& g,
                            const QatSums& s) {
  constexpr int64_t kColumns = kQatChunk;
  float sum[kColumns], moment[kColumns], step[kColumns], buffer[kColumns];
  for (int64_t c = 0; c < period; c += kColumns) {
    const int64_t n = least(kColumns, period - c);
    const float* center = s.center + c;
    for (int64_t first = 0; first < count; first += kQatRows * period) {
      const int64_t last = least(count, first + kQatRows * period);
      for (int64_t j = 0; j < n; ++j) sum[j] = moment[j] = step[j] = 0;
      for (int64_t at = first; at < last; at += period) {
        const int64_t inside = least(n, last - at - c);
        const float* values = x.read(x.x, at + c, inside, buffer);
        qat_chunk<kQuantized, kAdds, Real>(values, at + c, c, inside, p, g,
                                           [&](int64_t, int64_t channel, float value, QatPassed passed) {
                                             const int64_t j = channel - c;
                                             sum[j] += passed.gradient;
                                             moment[j] += passed.gradient * (value - center[j]);
                                             if (kQuantized) step[j] += passed.step;
                                           });
      }
      for (int64_t j = 0; j < n; ++j) {
        s.sum[c + j] += sum[j];
        s.moment[c + j] += moment[j];
        s.step[c + j] += step[j];
      }
    }
  }
}

template <bool kQuantized, bool kAdds, typename Real>
void qat_gradient_with(const QatElements& x, int64_t count, int64_t period, const QatPass& p, const QatGradient& g,
                       const QatBackward& b, Real* out) {
  const QatBackward by = b;
  qat_each_chunk(x, count, period, [&](int64_t at, int64_t c, int64_t n, const float* values) {
    qat_chunk<kQuantized, kAdds, Real>(
        values, at, c, n, p, g, [=](int64_t i, int64_t channel, float value, QatPassed passed) {
          const float linear = (value - by.center[channel]) * by.slope[channel] + by.constant[channel];
          store_float(passed.gradient * by.factor[channel] + linear, out + i);
        });
  });
}

template <bool kQuantized, bool kAdds, typename Real>
void qat_pass_with(const QatElements& x, int64_t count, int64_t period, const QatPass& p, const QatGradient& g,
                   double* total, Real* out) {
  constexpr int64_t kColumns = kQatChunk;
  float step[kColumns], buffer[kColumns];
  for (int64_t c = 0; c < period; c += kColumns) {
    const int64_t n = least(kColumns, period - c);
    for (int64_t first = 0; first < count; first += kQatRows * period) {
      const int64_t last = least(count, first + kQatRows * period);
      for (int64_t j = 0; j < n; ++j) step[j] = 0;
      for (int64_t at = first; at < last; at += period) {
        const int64_t inside = least(n, last - at - c);
        qat_chunk<kQuantized, kAdds, Real>(x.read(x.x, at + c, inside, buffer), at + c, c, inside, p, g,
                                           [&](int64_t i, int64_t channel, float, QatPassed passed) {
                                             if (kQuantized) step[channel - c] += passed.step;
                                             store_float(passed.gradient, out + i);
                                           });
      }
      for (int64_t j = 0; j < n; ++j) total[c + j] += step[j];
    }
  }
}

// Calls run(quantized, adds) with both as constants.
template <typename Run>
inline void qat_choose(const QatPass& p, const QatGradient& g, const Run& run) {
  constexpr std::true_type yes{};
  constexpr std::false_type no{};
  if (p.quantized)
    g.add != nullptr ? run(yes, yes) : run(yes, no);
  else
    g.add != nullptr ? run(no, yes) : run(no, no);
}

template <typename In, typename Real>
void qat_gradient_sums(const void* x, int64_t count, int64_t period, const QatPass& p, const QatGradient& g,
                       const QatSums& s) {
  const QatElements elements = qat_elements<In>(x);
  qat_choose(p, g, [&](auto quantized, auto adds) {
    qat_gradient_sums_with<quantized.value, adds.value, Real>(elements, count, period, p, g, s);
  });
}

template <typename In, typename Real>
void qat_gradient(const void* x, int64_t count, int64_t period, const QatPass& p, const QatGradient& g,
                  const QatBackward& b, void* out) {
  const QatElements elements = qat_elements<In>(x);
  qat_choose(p, g, [&](auto quantized, auto adds) {
    qat_gradient_with<quantized.value, adds.value>(elements, count, period, p, g, b, static_cast<Real*>(out));
  });
}

template <typename In, typename Real>
void qat_pass(const void* x, int64_t count, int64_t period, const QatPass& p, const QatGradient& g, double* step,
              void* out) {
  const QatElements elements = qat_elements<In>(x);
  qat_choose(p, g, [&](auto quantized, auto adds) {
    qat_pass_with<quantized.value, adds.value>(elements, count, period, p, g, step, static_cast<Real*>(out));
  });
}

template <typename Real>
void qat_max_pool_gradient(const void* g, const uint8_t* places, const PoolMap& s, void* out) {
  const Real* from = static_cast<const Real*>(g);
  Real* to = static_cast<Real*>(out);
  for (int64_t c = 0; c < s.channels; c += kPoolChannels) {
    const int64_t n = least(kPoolChannels, s.channels - c);
    for (int64_t pixel = 0; pixel < s.in_h * s.in_w; ++pixel) {
      const int64_t row = pixel / s.in_w + s.pad_h, column = pixel % s.in_w + s.pad_w;
      const int64_t top = most(0, row - s.kernel_h + s.stride_h) / s.stride_h, bottom = row / s.stride_h;
      const int64_t left = most(0, column - s.kernel_w + s.stride_w) / s.stride_w, right = column / s.stride_w;
      float sum[kPoolChannels] = {};
      for (int64_t y = top; y <= bottom && y < s.out_h; ++y)
        for (int64_t i = left; i <= right && i < s.out_w; ++i) {
          const int64_t at = (y * s.out_w + i) * s.channels + c;
          const int32_t position = static_cast<int32_t>((row - y * s.stride_h) * s.kernel_w + column - i * s.stride_w);
          BITSTRATA_INDEPENDENT
          for (int64_t j = 0; j < n; ++j) sum[j] += places[at + j] == position ? to_float(from[at + j]) : 0.0f;
        }
      BITSTRATA_INDEPENDENT
      for (int64_t j = 0; j < n; ++j) store_float(sum[j], to + pixel * s.channels + c + j);
    }
  }
}

#define BITSTRATA_QAT_REALS(kernel, In) {kernel<In, float>, kernel<In, bfloat>}
#define BITSTRATA_QAT_TYPES(kernel)                                                                                \
  {BITSTRATA_QAT_REALS(kernel, int16_t), BITSTRATA_QAT_REALS(kernel, int32_t), BITSTRATA_QAT_REALS(kernel, float), \
   BITSTRATA_QAT_REALS(kernel, bfloat)}

constexpr QatKernels kQatKernels = {
    qat_sums,
    {qat_codes<int16_t>, qat_codes<int32_t>, qat_codes<float>, qat_codes<bfloat>},
    BITSTRATA_QAT_TYPES(qat_code_values),
    BITSTRATA_QAT_TYPES(qat_values),
    BITSTRATA_QAT_TYPES(qat_gradient_sums),
    BITSTRATA_QAT_TYPES(qat_gradient),
    BITSTRATA_QAT_TYPES(qat_pass),
    BITSTRATA_QAT_TYPES(qat_max_pool),
    {qat_max_pool_gradient<float>, qat_max_pool_gradient<bfloat>},
};

#undef BITSTRATA_QAT_TYPES
#undef BITSTRATA_QAT_REALS

}  // namespace
}  // namespace bitstrata
