// The integer products of the AVX2 row: weight gradients by products of int16 in pairs.
#include <immintrin.h>

#include "../common/product_loops.h"
#include "../common/weight_grad_lanes.h"
#include "../common/weight_grad_plain.h"
#include "../common/weight_grad_winograd.h"

namespace bitstrata {
namespace {

struct Avx2 {
  using Vector = __m256i;
  static constexpr int kLanes = 8, kStep = 2, kOuts = 4, kVectors = 2, kOffset = 0;
  static constexpr DType kOffsetOf = DType::s8;

  static Vector zero() { return _mm256_setzero_si256(); }
  static Vector load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store(int32_t* p, Vector v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static Vector load_packed(const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); }
  static Vector broadcast(const void* p) {
    int32_t two;
    std::memcpy(&two, p, 4);
    return _mm256_set1_epi32(two);
  }
  static Vector multiply(Vector sum, Vector codes, Vector gradient) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(codes, gradient));
  }

  static __m128i widened(const uint8_t* p, bool is_signed) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return is_signed ? _mm_cvtepi8_epi16(bytes) : _mm_cvtepu8_epi16(bytes);
  }
  static void store_pairs(__m128i a, __m128i b, uint8_t* to) {
    _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi16(a, b));
    _mm_store_si128(reinterpret_cast<__m128i*>(to) + 1, _mm_unpackhi_epi16(a, b));
  }
  static void pack_codes(const uint8_t* from, int64_t pitch, bool is_signed, uint8_t* to) {
    store_pairs(widened(from, is_signed), widened(from + pitch, is_signed), to);
  }
  static void pack_winograd(const uint8_t* from, int64_t pitch, bool is_signed, uint8_t* to, int64_t apart) {
    __m128i d[6];  // columns of two pairs of outputs
    each<6>([&](auto i) { d[i] = widened(from + i * pitch, is_signed); });
    store_pairs(_mm_sub_epi16(d[0], d[2]), _mm_sub_epi16(d[2], d[4]), to);
    store_pairs(_mm_add_epi16(d[1], d[2]), _mm_add_epi16(d[3], d[4]), to + apart);
    store_pairs(_mm_sub_epi16(d[2], d[1]), _mm_sub_epi16(d[4], d[3]), to + 2 * apart);
    store_pairs(_mm_sub_epi16(d[3], d[1]), _mm_sub_epi16(d[5], d[3]), to + 3 * apart);
  }
  static __m128i four(const uint8_t* p) {
    int32_t bytes;
    std::memcpy(&bytes, p, 4);
    return _mm_cvtepi8_epi16(_mm_cvtsi32_si128(bytes));
  }
  static void store_gradient(__m128i a, __m128i b, uint8_t* to) {
    _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi16(a, b));
  }
  static void pack_gradient(const uint8_t* from, int64_t pitch, uint8_t* to) {
    store_gradient(four(from), four(from + pitch), to);
  }
  static void pack_gradient_winograd(const uint8_t* from, int64_t pitch, uint8_t* to, int64_t apart) {
    __m128i g[4];
    each<4>([&](auto i) { g[i] = four(from + i * pitch); });
    store_gradient(g[0], g[2], to);
    store_gradient(_mm_add_epi16(g[0], g[1]), _mm_add_epi16(g[2], g[3]), to + apart);
    store_gradient(_mm_sub_epi16(g[0], g[1]), _mm_sub_epi16(g[2], g[3]), to + 2 * apart);
    store_gradient(g[1], g[3], to + 3 * apart);
  }
  static void add_outs(const uint8_t*, int64_t, int32_t*) {}
};

constexpr WeightGradKernel kWeightGrad = LanesWeightGrad<Avx2>::kernel("avx2");
constexpr WeightGradKernel kWinograd = LanesWeightGrad<Avx2, int8_t, int32_t, true>::kernel("avx2-winograd");
constexpr WeightGradKernel kDepthwise = PlainWeightGrad::kernel("avx2-depthwise");

const WeightGradKernel* pick_weight_grad(const ConvShape& s) {
  if (PlainWeightGrad::depthwise(s) && s.groups > 1) return &kDepthwise;
  return weight_grad_winograd_pays<Avx2>(s, INT8_MAX) ? &kWinograd : &kWeightGrad;
}

}  // namespace

extern const ProductKernels kAvx2Products;
const ProductKernels kAvx2Products = product_kernels(pick_weight_grad);

}  // namespace bitstrata
