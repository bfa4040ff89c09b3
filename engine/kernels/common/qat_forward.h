// Quantization-aware training, forward; see bitstrata/qat_kernels.h.
//
// Like everything in this folder this is compiled once for each instruction set, in an unnamed namespace.
#pragma once

#include <limits>

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

// Calls store(element, code as a float).
template <typename In, typename Store>
inline void qat_each_code(const void* x, int64_t count, int64_t period, const QatLine& l, QatLevels levels,
                          const Store& store) {
  each_stretch(0, count, period, [&](int64_t at, int64_t c, int64_t n) {
    const In* from = static_cast<const In*>(x) + at;
    const float *scale = l.scale + c, *offset = l.offset + c;
    const float lo = greater(levels.lo, l.floor), hi = levels.hi;
    BITSTRATA_INDEPENDENT
    for (int64_t j = 0; j < n; ++j)
      store(at + j, greater(lesser(round_even(to_float(from[j]) * scale[j] + offset[j]), hi), lo));
  });
}

template <typename In>
void qat_codes(const void* x, int64_t count, int64_t period, const QatLine& l, QatLevels levels, uint8_t* out) {
  qat_each_code<In>(x, count, period, l, levels,
                    [=](int64_t i, float code) { out[i] = static_cast<uint8_t>(static_cast<int32_t>(code)); });
}

template <typename In, typename Out>
void qat_code_values(const void* x, int64_t count, int64_t period, const QatLine& l, QatLevels levels, void* out) {
  Out* to = static_cast<Out*>(out);
  qat_each_code<In>(x, count, period, l, levels, [=](int64_t i, float code) { store_float(code, to + i); });
}

template <bool kAdds, typename In, typename Out>
void qat_values_with(const void* x, int64_t count, int64_t period, const QatLine& l, const void* add, void* out) {
  each_stretch(0, count, period, [&](int64_t at, int64_t c, int64_t n) {
    const In* from = static_cast<const In*>(x) + at;
    const Out* other = static_cast<const Out*>(add) + (kAdds ? at : 0);
    Out* to = static_cast<Out*>(out) + at;
    const float *scale = l.scale + c, *offset = l.offset + c, floor = l.floor;
    BITSTRATA_INDEPENDENT
    for (int64_t j = 0; j < n; ++j) {
      float y = to_float(from[j]) * scale[j] + offset[j];
      if (kAdds) y = y + to_float(other[j]);
      store_float(y < floor ? floor : y, to + j);  // NaN stays
    }
  });
}

template <typename In, typename Out>
void qat_values(const void* x, int64_t count, int64_t period, const QatLine& l, const void* add, void* out) {
  add == nullptr ? qat_values_with<false, In, Out>(x, count, period, l, add, out)
                 : qat_values_with<true, In, Out>(x, count, period, l, add, out);
}

template <typename In, typename Out>
void qat_max_pool(const void* x, const PoolMap& s, const QatLine& l, void* out, uint8_t* places) {
  Out* to = static_cast<Out*>(out);
  for (int64_t y = 0; y < s.out_h; ++y)
    for (int64_t i = 0; i < s.out_w; ++i, to += s.channels, places += s.channels)
      for (int64_t c = 0; c < s.channels; c += kPoolChannels) {
        const int64_t n = least(kPoolChannels, s.channels - c);
        const float *scale = l.scale + c, *offset = l.offset + c, floor = l.floor;
        float best[kPoolChannels];
        int32_t place[kPoolChannels] = {};
        for (float& b : best) b = -std::numeric_limits<float>::infinity();
        each_position(s, y, i, [&](int64_t pixel, int32_t position) {
          const In* from = static_cast<const In*>(x) + pixel * s.channels + c;
          BITSTRATA_INDEPENDENT
          for (int64_t j = 0; j < n; ++j) {
            const float value = greater(to_float(from[j]) * scale[j] + offset[j], floor);
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

}  // namespace
}  // namespace bitstrata
