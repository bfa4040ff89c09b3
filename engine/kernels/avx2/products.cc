// The integer products of the AVX2 row: weight gradients by products of int16 in pairs.
#include <immintrin.h>

#include "../common/product_loops.h"
#include "../common/weight_grad_lanes.h"
#include "../common/weight_grad_plain.h"

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
  static void pack_codes(const uint8_t* from, int64_t pitch, bool is_signed, uint8_t* to) {
    const __m128i a = widened(from, is_signed), b = widened(from + pitch, is_signed);
    _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi16(a, b));
    _mm_store_si128(reinterpret_cast<__m128i*>(to) + 1, _mm_unpackhi_epi16(a, b));
  }
  static __m128i four(const uint8_t* p) {
    int32_t bytes;
    std::memcpy(&bytes, p, 4);
    return _mm_cvtepi8_epi16(_mm_cvtsi32_si128(bytes));
  }
  static void pack_gradient(const uint8_t* from, int64_t pitch, uint8_t* to) {
    _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi16(four(from), four(from + pitch)));
  }
  static void add_outs(const uint8_t*, int64_t, int32_t*) {}
};

constexpr WeightGradKernel kWeightGrad = LanesWeightGrad<Avx2>::kernel("avx2");
constexpr WeightGradKernel kDepthwise = PlainWeightGrad::kernel("avx2-depthwise");

const WeightGradKernel* pick_weight_grad(const ConvShape& s) {
  return PlainWeightGrad::depthwise(s) && s.groups > 1 ? &kDepthwise : &kWeightGrad;
}

}  // namespace

extern const ProductKernels kAvx2Products;
const ProductKernels kAvx2Products = product_kernels(pick_weight_grad);

}  // namespace bitstrata
