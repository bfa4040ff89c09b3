// Depthwise convolution on AVX2: sixteen channels a block, products of two taps at a time (madd).
#include <immintrin.h>

#include "../common/conv_stage.h"
#include "avx2.h"

namespace bitstrata {
namespace {

constexpr int64_t kLanes = 16;  // channels of a block
constexpr int kPixels = 4;

// To the staging, the channels are one group, filled up to whole blocks.
ConvShape merged(ConvShape s) {
  s.groups = 1;
  return s;
}

struct Packed {
  explicit Packed(const ConvShape& s)
      : stage(merged(s), round_up(s.in_c, kLanes), 0, false),
        taps(s.kernel_h * s.kernel_w),
        pairs((taps + 1) / 2),
        offsets_at(0),
        padding_at(round_up(pairs * 16, 64)),
        weights_at(round_up(padding_at + stage.lanes * 2, 64)),
        bytes(weights_at + stage.lanes * pairs * 4) {}
  Staging<int16_t> stage;
  int64_t taps, pairs;
  // int64 offsets[pairs][2] of the taps in bytes; int16 padding[lanes]; int16 weights[block][pair][2][8][2]:
  // channels 0-3 and 8-11, then 4-7 and 12-15, as unpacklo and unpackhi interleave two taps' channels.
  int64_t offsets_at, padding_at, weights_at, bytes;
};

int64_t packed_bytes(const ConvShape& s) { return Packed(s).bytes; }
int64_t staged_row_bytes(const ConvShape& s) { return Packed(s).stage.row_bytes; }

void pack(const ConvShape& s, const int8_t* codes, const int32_t* pad, void* packed) {
  const Packed p(s);
  uint8_t* base = static_cast<uint8_t*>(packed);
  std::memset(packed, 0, static_cast<size_t>(p.bytes));
  stage_padding(merged(s), p.stage, pad, reinterpret_cast<int16_t*>(base + p.padding_at));
  int64_t* offsets = reinterpret_cast<int64_t*>(base + p.offsets_at);
  int16_t* weights = reinterpret_cast<int16_t*>(base + p.weights_at);
  for (int64_t t = 0; t < p.taps; ++t) {
    const int64_t ky = t / s.kernel_w, kx = t % s.kernel_w;
    offsets[t] = ky * s.dilation_h * p.stage.row_bytes + kx * s.dilation_w * p.stage.lanes * 2;
    for (int64_t c = 0; c < s.in_c; ++c) {
      const int64_t lane = c % kLanes, half = lane / 4 % 2, place = lane / 8 * 4 + lane % 4;
      int16_t* block = weights + (c / kLanes * p.pairs + t / 2) * 2 * kLanes;
      block[(half * 8 + place) * 2 + t % 2] = static_cast<int16_t>(weight_at(s, codes, c, 0, ky, kx));
    }
  }
  if (p.taps % 2 == 1) offsets[p.taps] = offsets[p.taps - 1];  // its weights are 0
}

void stage(const ConvShape& s, const void* packed, const void* image, void* staged, int64_t row_begin,
           int64_t row_end) {
  const Packed p(s);
  const auto* padding = reinterpret_cast<const int16_t*>(static_cast<const uint8_t*>(packed) + p.padding_at);
  stage_rows(merged(s), p.stage, padding, image, staged, row_begin, row_end);
}

inline __m256i load(const uint8_t* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }

// Sixteen channels of kPixels pixels whose windows start `pitch` bytes apart; results in channel order.
inline void block(const Packed& p, const int64_t* offsets, const uint8_t* x, int64_t pitch, const __m256i* w,
                  __m256i (&out)[kPixels][2]) {
  __m256i low[kPixels], high[kPixels];
  for (int i = 0; i < kPixels; ++i) low[i] = high[i] = _mm256_setzero_si256();
  for (int64_t pair = 0; pair < p.pairs; ++pair, w += 2) {
    const __m256i w_low = _mm256_load_si256(w), w_high = _mm256_load_si256(w + 1);
    for (int i = 0; i < kPixels; ++i) {
      const __m256i a = load(x + i * pitch + offsets[2 * pair]), b = load(x + i * pitch + offsets[2 * pair + 1]);
      low[i] = _mm256_add_epi32(low[i], _mm256_madd_epi16(_mm256_unpacklo_epi16(a, b), w_low));
      high[i] = _mm256_add_epi32(high[i], _mm256_madd_epi16(_mm256_unpackhi_epi16(a, b), w_high));
    }
  }
  for (int i = 0; i < kPixels; ++i) {
    out[i][0] = _mm256_permute2x128_si256(low[i], high[i], 0x20);
    out[i][1] = _mm256_permute2x128_si256(low[i], high[i], 0x31);
  }
}

void run(const ConvShape& s, const void* packed, const void* staged, int32_t* out, int64_t row_begin, int64_t row_end) {
  const Packed p(s);
  const uint8_t* base = static_cast<const uint8_t*>(packed);
  const int64_t* offsets = reinterpret_cast<const int64_t*>(base + p.offsets_at);
  const int64_t pixel_bytes = p.stage.lanes * 2;
  for (int64_t y = row_begin; y < row_end; ++y)
    for (int64_t c = 0; c < s.out_c; c += kLanes) {
      const __m256i* w = reinterpret_cast<const __m256i*>(base + p.weights_at) + c / kLanes * p.pairs * 2;
      const uint8_t* row = static_cast<const uint8_t*>(staged) + y * s.stride_h * p.stage.row_bytes + c * 2;
      const int64_t channels = s.out_c - c < kLanes ? s.out_c - c : kLanes;
      for (int64_t x = 0; x < s.out_w; x += kPixels) {
        const int64_t pixels = s.out_w - x < kPixels ? s.out_w - x : kPixels;
        __m256i sums[kPixels][2];
        const uint8_t* window = row + x * s.stride_w * pixel_bytes;
        if (pixels == kPixels) {
          block(p, offsets, window, s.stride_w * pixel_bytes, w, sums);
        } else {
          for (int64_t i = 0; i < pixels; ++i) {
            __m256i one[kPixels][2];
            block(p, offsets, window + i * s.stride_w * pixel_bytes, 0, w, one);
            sums[i][0] = one[0][0], sums[i][1] = one[0][1];
          }
        }
        for (int64_t i = 0; i < pixels; ++i) {
          alignas(32) int32_t all[kLanes];
          int32_t* to = out + (y * s.out_w + x + i) * s.out_c + c;
          __m256i* at = reinterpret_cast<__m256i*>(channels == kLanes ? to : all);
          _mm256_storeu_si256(at, sums[i][0]);
          _mm256_storeu_si256(at + 1, sums[i][1]);
          if (channels < kLanes) std::memcpy(to, all, static_cast<size_t>(channels) * 4);
        }
      }
    }
}

}  // namespace

extern const ConvKernel kAvx2Depthwise = {"avx2-depthwise", packed_bytes, pack,          staged_row_bytes, stage, run,
                                          nullptr,          nullptr,      &kAvx2WidePeak};

}  // namespace bitstrata
