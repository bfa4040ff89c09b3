// Quantization-aware training, forward; see bitstrata/qat_kernels.h.
//
// Like everything in this folder this is compiled once for each instruction set, in an unnamed namespace.
#pragma once

#include <limits>
#include <type_traits>

#include "bitstrata/qat_kernels.h"
#include "training_pool.h"

namespace bitstrata {
namespace {

struct bfloat {
  uint16_t bits;
};

inline float to_float(int16_t x) { return static_cast<float>(x); }
inline float to_float(bfloat x) { return to_float(x.bits); }

inline void store_float(float x, float* to) { *to = x; }
inline void store_float(float x, bfloat* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  to->bits = static_cast<uint16_t>(x == x ? rounded : 0x7FC0);
}

inline void qat_sums(const int32_t* x, int64_t count, int64_t channels, int16_t* narrow, int64_t* sum, int64_t* square,
                     int32_t* lo, int32_t* hi) {
  for (int64_t c = 0; c < channels; c += 16) {
    const int64_t n = least(16, channels - c);
#ifdef __AVX512F__
    const __mmask16 mask = static_cast<__mmask16>((1u << n) - 1);
    __m512i total[2], power[2];  // of even and of odd lanes
    for (int i = 0; i < 2; ++i) total[i] = power[i] = _mm512_setzero_si512();
    __m512i low = _mm512_set1_epi32(INT32_MAX), high = _mm512_set1_epi32(INT32_MIN);
    for (int64_t at = c; at < count; at += channels) {
      const __m512i v = _mm512_maskz_loadu_epi32(mask, x + at), odd = _mm512_srai_epi64(v, 32);
      total[0] = _mm512_add_epi64(total[0], _mm512_srai_epi64(_mm512_slli_epi64(v, 32), 32));
      total[1] = _mm512_add_epi64(total[1], odd);
      power[0] = _mm512_add_epi64(power[0], _mm512_mul_epi32(v, v));
      power[1] = _mm512_add_epi64(power[1], _mm512_mul_epi32(odd, odd));
      low = _mm512_min_epi32(low, v);
      high = _mm512_max_epi32(high, v);
      if (narrow != nullptr) _mm512_mask_cvtepi32_storeu_epi16(narrow + at, mask, v);
    }
    int64_t sums[2][8], powers[2][8];
    for (int i = 0; i < 2; ++i) _mm512_storeu_si512(sums[i], total[i]), _mm512_storeu_si512(powers[i], power[i]);
    int32_t lows[16], highs[16];
    _mm512_storeu_si512(lows, low);
    _mm512_storeu_si512(highs, high);
    for (int64_t j = 0; j < n; ++j) {
      sum[c + j] += sums[j % 2][j / 2];
      square[c + j] += powers[j % 2][j / 2];
      lo[c + j] = lesser(lows[j], lo[c + j]);
      hi[c + j] = greater(highs[j], hi[c + j]);
    }
#else
    int64_t total[16] = {}, power[16] = {};
    int32_t low[16], high[16];
    for (int j = 0; j < 16; ++j) low[j] = INT32_MAX, high[j] = INT32_MIN;
    for (int64_t at = c; at < count; at += channels)
      for (int64_t j = 0; j < n; ++j) {
        const int32_t v = x[at + j];
        total[j] += v;
        power[j] += int64_t{v} * v;
        low[j] = lesser(v, low[j]);
        high[j] = greater(v, high[j]);
        if (narrow != nullptr) narrow[at + j] = static_cast<int16_t>(v);
      }
    for (int64_t j = 0; j < n; ++j) {
      sum[c + j] += total[j];
      square[c + j] += power[j];
      lo[c + j] = lesser(low[j], lo[c + j]);
      hi[c + j] = greater(high[j], hi[c + j]);
    }
#endif
  }
}

constexpr int64_t kQatChunk = 256;

// The elements of a tensor as floats, at most kQatChunk at a time, in memory of their own unless they are floats. What
// computes with them is then there once for all types, which is a good deal less code and hardly slower.
struct QatElements {
  const void* x;
  const float* (*read)(const void* x, int64_t at, int64_t n, float* buffer);
};
template <typename In>
const float* qat_read(const void* x, int64_t at, int64_t n, float* buffer) {
  const In* from = static_cast<const In*>(x) + at;
  if constexpr (std::is_same_v<In, float>) {
    return from;
  } else {
    BITSTRATA_INDEPENDENT
    for (int64_t j = 0; j < n; ++j) buffer[j] = to_float(from[j]);
    return buffer;
  }
}
template <typename In>
inline QatElements qat_elements(const void* x) {
  return {x, qat_read<In>};
}

// Calls body(element, channel, how many, their values).
template <typename Body>
inline void qat_each_chunk(const QatElements& x, int64_t count, int64_t period, const Body& body) {
  float buffer[kQatChunk];
  each_stretch(0, count, period, [&](int64_t at, int64_t c, int64_t n) {
    for (int64_t i = 0; i < n; i += kQatChunk) {
      const int64_t some = least(kQatChunk, n - i);
      body(at + i, c + i, some, x.read(x.x, at + i, some, buffer));
    }
  });
}

// Calls store(element, code as a float).
template <typename Store>
inline void qat_each_code(const QatElements& x, int64_t count, int64_t period, const QatLine& l, QatLevels levels,
                          const Store& store) {
  qat_each_chunk(x, count, period, [&](int64_t at, int64_t c, int64_t n, const float* from) {
    const float *scale = l.scale + c, *offset = l.offset + c;
    const float lo = greater(levels.lo, l.floor), hi = levels.hi;
    const Store put = store;  // here, where writing bytes cannot change it
    BITSTRATA_INDEPENDENT
    for (int64_t j = 0; j < n; ++j) put(at + j, greater(lesser(round_even(from[j] * scale[j] + offset[j]), hi), lo));
  });
}

inline void qat_codes_of(const QatElements& x, int64_t count, int64_t period, const QatLine& l, QatLevels levels,
                         uint8_t* out) {
  qat_each_code(x, count, period, l, levels,
                [=](int64_t i, float code) { out[i] = static_cast<uint8_t>(static_cast<int32_t>(code)); });
}
template <typename In>
void qat_codes(const void* x, int64_t count, int64_t period, const QatLine& l, QatLevels levels, uint8_t* out) {
  qat_codes_of(qat_elements<In>(x), count, period, l, levels, out);
}

template <typename Out>
void qat_code_values_of(const QatElements& x, int64_t count, int64_t period, const QatLine& l, QatLevels levels,
                        Out* out) {
  qat_each_code(x, count, period, l, levels, [=](int64_t i, float code) { store_float(code, out + i); });
}
template <typename In, typename Out>
void qat_code_values(const void* x, int64_t count, int64_t period, const QatLine& l, QatLevels levels, void* out) {
  qat_code_values_of(qat_elements<In>(x), count, period, l, levels, static_cast<Out*>(out));
}

template <bool kAdds, typename Out>
void qat_values_with(const QatElements& x, int64_t count, int64_t period, const QatLine& l, const void* add,
                     void* out) {
  qat_each_chunk(x, count, period, [&](int64_t at, int64_t c, int64_t n, const float* from) {
    const Out* other = static_cast<const Out*>(add) + (kAdds ? at : 0);
    Out* to = static_cast<Out*>(out) + at;
    const float *scale = l.scale + c, *offset = l.offset + c, floor = l.floor;
    BITSTRATA_INDEPENDENT
    for (int64_t j = 0; j < n; ++j) {
      float y = from[j] * scale[j] + offset[j];
      if (kAdds) y = y + to_float(other[j]);
      store_float(y < floor ? floor : y, to + j);  // NaN stays
    }
  });
}

template <typename In, typename Out>
void qat_values(const void* x, int64_t count, int64_t period, const QatLine& l, const void* add, void* out) {
  const QatElements elements = qat_elements<In>(x);
  add == nullptr ? qat_values_with<false, Out>(elements, count, period, l, add, out)
                 : qat_values_with<true, Out>(elements, count, period, l, add, out);
}

template <typename Out>
void qat_max_pool_of(const QatElements& x, const PoolMap& s, const QatLine& l, Out* to, uint8_t* places) {
  for (int64_t y = 0; y < s.out_h; ++y)
    for (int64_t i = 0; i < s.out_w; ++i, to += s.channels, places += s.channels)
      for (int64_t c = 0; c < s.channels; c += kPoolChannels) {
        const int64_t n = least(kPoolChannels, s.channels - c);
        const float *scale = l.scale + c, *offset = l.offset + c, floor = l.floor;
        float best[kPoolChannels], buffer[kPoolChannels];
        int32_t place[kPoolChannels] = {};
        for (float& b : best) b = -std::numeric_limits<float>::infinity();
        each_position(s, y, i, [&](int64_t pixel, int32_t position) {
          const float* from = x.read(x.x, pixel * s.channels + c, n, buffer);
          BITSTRATA_INDEPENDENT
          for (int64_t j = 0; j < n; ++j) {
            const float value = greater(from[j] * scale[j] + offset[j], floor);
            place[j] = value > best[j] ? position : place[j];  // the first of equals
            best[j] = greater(value, best[j]);
          }
        });
        BITSTRATA_INDEPENDENT
        for (int64_t j = 0; j < n; ++j) {
          store_float(best[j], to + c + j);
          places[c + j] = static_cast<uint8_t>(place[j]);
        }
      }
}
template <typename In, typename Out>
void qat_max_pool(const void* x, const PoolMap& s, const QatLine& l, void* out, uint8_t* places) {
  qat_max_pool_of(qat_elements<In>(x), s, l, static_cast<Out*>(out), places);
}

}  // namespace
}  // namespace bitstrata
