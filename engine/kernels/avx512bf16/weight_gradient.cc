// The weight gradient with AVX-512 BF16: products of bfloat16 in pairs (vdpbf16ps), of the codes of two neighbouring
// positions and their gradients.
#include <immintrin.h>

#include "../common/weight_grad_lanes.h"
#include "avx512bf16.h"

namespace bitstrata {
namespace {

struct Bf16 {
  using Vector = __m512;
  static constexpr int kLanes = 16, kStep = 2, kOuts = 8, kVectors = 3, kOffset = 0;

  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static Vector load_packed(const void* p) { return _mm512_load_ps(p); }
  static Vector broadcast(const void* p) {
    float two;
    std::memcpy(&two, p, 4);
    return _mm512_set1_ps(two);
  }
  static Vector multiply(Vector sum, Vector codes, Vector gradient) {
    return _mm512_dpbf16_ps(sum, (__m512bh)codes, (__m512bh)gradient);
  }

  // Of these floats' bits the lower 16 are 0.
  static __m512i floats(const uint8_t* from, bool is_signed) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m512i wide = is_signed ? _mm512_cvtepi8_epi32(codes) : _mm512_cvtepu8_epi32(codes);
    return _mm512_castps_si512(_mm512_cvtepi32_ps(wide));
  }
  static void pack_codes(const uint8_t* from, int64_t pitch, bool is_signed, uint8_t* to) {
    const __m512i first = floats(from, is_signed), second = floats(from + pitch, is_signed);
    _mm512_store_si512(to, _mm512_or_si512(_mm512_srli_epi32(first, 16), second));
  }
  static void pack_gradient(const uint8_t* from, int64_t pitch, uint8_t* to) {
    const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)),
                  second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 2 * pitch));
    __m128i* out = reinterpret_cast<__m128i*>(to);
    _mm_store_si128(out, _mm_unpacklo_epi16(first, second));
    _mm_store_si128(out + 1, _mm_unpackhi_epi16(first, second));
  }
};

}  // namespace

const FloatWeightGradKernel kAvx512Bf16WeightGrad = LanesWeightGrad<Bf16, uint16_t, float>::kernel("avx512bf16");

}  // namespace bitstrata
