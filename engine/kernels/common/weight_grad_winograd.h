// Winograd's F(3, 2) along rows of the map, in integers: what two neighbouring outputs add to three taps of a row takes
// four products instead of six.
//
// With inputs d0..d3 and gradients g0, g1 of two outputs, the taps get
//   m0 + (m1 + m2) / 2,   (m1 - m2) / 2,   m3 + (m1 + m2) / 2, where
//   m0 = (d0 - d2) * g0   m1 = (d1 + d2) * (g0 + g1)   m2 = (d2 - d1) * (g0 - g1)   m3 = (d3 - d1) * g1.
// The four forms are summed over all pairs of outputs before taps are taken of them. m1 + m2 is even, so nothing is
// rounded. Magnitudes up to 63 of codes and gradients stay bytes; up to 127, no sum of a form is larger than those of
// bytes' products are for which callers leave room. For x86; see pointwise.h for the unnamed namespace.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "bitstrata/kernels.h"
#include "unroll.h"

namespace bitstrata {
namespace {

// Whether a kernel can do it so and is faster. largest: magnitude of codes and gradients for which it can.
template <typename Isa>
inline bool weight_grad_winograd_pays(const ConvShape& s, int32_t largest) {
  if (s.kernel_w != 3 || s.stride_w != 1 || s.dilation_w != 1 || s.groups != 1) return false;
  if (s.input_lo < -largest || s.input_hi > largest || s.code_lo < -largest || s.code_hi > largest) return false;
  const auto up = [](int64_t n, int64_t of) { return (n + of - 1) / of; };
  const int64_t pairs = 4 * up(up(s.out_w, 2), Isa::kStep) * up(s.in_c, Isa::kLanes);
  const int64_t columns = up(s.out_w, Isa::kStep) * up(3 * s.in_c, Isa::kLanes);
  return 10 * pairs <= 9 * columns;  // forms are dearer to make
}

// The forms of four pairs of outputs' gradients, which `load` reads from successive columns; `store` takes four.
template <typename Load, typename Store>
BITSTRATA_INLINE void pack_winograd_bytes(Load load, Store store, const uint8_t* from, int64_t pitch, uint8_t* to,
                                          int64_t apart) {
  __m128i g0[4], g1[4], plus[4], minus[4];
  each<4>([&](auto i) {
    g0[i] = load(from + 2 * i * pitch);
    g1[i] = load(from + (2 * i + 1) * pitch);
    plus[i] = _mm_add_epi8(g0[i], g1[i]);
    minus[i] = _mm_sub_epi8(g0[i], g1[i]);
  });
  store(g0[0], g0[1], g0[2], g0[3], to);
  store(plus[0], plus[1], plus[2], plus[3], to + apart);
  store(minus[0], minus[1], minus[2], minus[3], to + 2 * apart);
  store(g1[0], g1[1], g1[2], g1[3], to + 3 * apart);
}

}  // namespace
}  // namespace bitstrata
