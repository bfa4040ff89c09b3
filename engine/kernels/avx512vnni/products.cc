// The integer products of the AVX-512 VNNI row: weight gradients by products of u8 and s8 in fours (vpdpbusd, which
// does not saturate). Signed codes get an offset of 128 that makes them unsigned; so do all codes of Winograd's
// forms.
#include <immintrin.h>

#include "../common/product_loops.h"
#include "../common/weight_grad_lanes.h"
#include "../common/weight_grad_plain.h"
#include "../common/weight_grad_winograd.h"

namespace bitstrata {
namespace {

struct Vnni {
  using Vector = __m512i;
  static constexpr int kLanes = 16, kStep = 4, kOuts = 8, kVectors = 3, kOffset = 128;
  static constexpr DType kOffsetOf = DType::s8;

  static Vector zero() { return _mm512_setzero_si512(); }
  static Vector load(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void store(int32_t* p, Vector v) { _mm512_storeu_si512(p, v); }
  static Vector load_packed(const void* p) { return _mm512_load_si512(p); }
  static Vector broadcast(const void* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
  }
  static Vector multiply(Vector sum, Vector codes, Vector gradient) {
    return _mm512_dpbusd_epi32(sum, codes, gradient);
  }

  static __m128i load8(const uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }

  static __m128i load16(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  // Sixteen channels at four positions, `pitch` bytes apart.
  static __m512i four(const uint8_t* from, int64_t pitch) {
    __m512i x = _mm512_zextsi128_si512(load16(from));
    x = _mm512_inserti32x4(x, load16(from + pitch), 1);
    x = _mm512_inserti32x4(x, load16(from + 2 * pitch), 2);
    return _mm512_inserti32x4(x, load16(from + 3 * pitch), 3);
  }
  // Of these each channel's four positions, with `offset` added to all.
  static void store_fours(__m512i x, int8_t offset, uint8_t* to) {
    // A transpose of quarters, then one of the bytes in each.
    const __m512i quarters = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    x = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(quarters, x), bytes);
    _mm512_store_si512(to, _mm512_xor_si512(x, _mm512_set1_epi8(offset)));
  }
  static void pack_codes(const uint8_t* from, int64_t pitch, bool is_signed, uint8_t* to) {
    store_fours(four(from, pitch), is_signed ? -128 : 0, to);
  }
  static void pack_winograd(const uint8_t* from, int64_t pitch, bool, uint8_t* to, int64_t apart) {
    const __m512i d0 = four(from, 2 * pitch), d1 = four(from + pitch, 2 * pitch);  // two columns to a tile
    const __m512i d2 = _mm512_alignr_epi64(_mm512_zextsi128_si512(load16(from + 8 * pitch)), d0, 2),
                  d3 = _mm512_alignr_epi64(_mm512_zextsi128_si512(load16(from + 9 * pitch)), d1, 2);
    store_fours(_mm512_sub_epi8(d0, d2), -128, to);
    store_fours(_mm512_add_epi8(d1, d2), -128, to + apart);
    store_fours(_mm512_sub_epi8(d2, d1), -128, to + 2 * apart);
    store_fours(_mm512_sub_epi8(d3, d1), -128, to + 3 * apart);
  }
  // Eight outputs at four positions.
  static void store_gradient(__m128i a, __m128i b, __m128i c, __m128i d, uint8_t* to) {
    const __m128i ab = _mm_unpacklo_epi8(a, b), cd = _mm_unpacklo_epi8(c, d);
    __m128i* out = reinterpret_cast<__m128i*>(to);
    _mm_store_si128(out, _mm_unpacklo_epi16(ab, cd));
    _mm_store_si128(out + 1, _mm_unpackhi_epi16(ab, cd));
  }
  static void pack_gradient(const uint8_t* from, int64_t pitch, uint8_t* to) {
    store_gradient(load8(from), load8(from + pitch), load8(from + 2 * pitch), load8(from + 3 * pitch), to);
  }
  static void pack_gradient_winograd(const uint8_t* from, int64_t pitch, uint8_t* to, int64_t apart) {
    pack_winograd_bytes(load8, store_gradient, from, pitch, to, apart);
  }
  static void add_outs(const uint8_t* packed, int64_t count, int32_t* sums) {
    const __m256i one = _mm256_set1_epi8(1);
    const __m256i* from = reinterpret_cast<const __m256i*>(packed);
    __m256i sum[4];  // so that additions need not wait for each other
    each<4>([&](auto j) { sum[j] = _mm256_setzero_si256(); });
    int64_t i = 0;
    for (; i + 4 <= count; i += 4)
      each<4>([&](auto j) { sum[j] = _mm256_dpbusd_epi32(sum[j], one, _mm256_load_si256(from + i + j)); });
    for (; i < count; ++i) sum[0] = _mm256_dpbusd_epi32(sum[0], one, _mm256_load_si256(from + i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums),
                        _mm256_add_epi32(_mm256_add_epi32(sum[0], sum[1]), _mm256_add_epi32(sum[2], sum[3])));
  }
};

constexpr WeightGradKernel kWeightGrad = LanesWeightGrad<Vnni>::kernel("avx512vnni");
constexpr WeightGradKernel kWinograd = LanesWeightGrad<Vnni, int8_t, int32_t, true>::kernel("avx512vnni-winograd");
constexpr WeightGradKernel kDepthwise = PlainWeightGrad::kernel("avx512vnni-depthwise");

const WeightGradKernel* pick_weight_grad(const ConvShape& s) {
  if (PlainWeightGrad::depthwise(s) && s.groups > 1) return &kDepthwise;
  return weight_grad_winograd_pays<Vnni>(s, 63) ? &kWinograd : &kWeightGrad;
}

}  // namespace

extern const ProductKernels kAvx512VnniProducts;
const ProductKernels kAvx512VnniProducts = product_kernels(pick_weight_grad);

}  // namespace bitstrata
