// Where bit-planes with AVX-512 VPOPCNTDQ are used. Compiled for any processor: this runs before the processor is
// known.
#include "avx512vpopcnt.h"

#include "../common/cells.h"
#include "../common/code_planes.h"

namespace bitstrata {

bool avx512vpopcnt_supported() {
  static const bool yes = __builtin_cpu_supports("avx512vpopcntdq");
  return yes;
}

// Estimated times of both kernels in cycles, from measurements on Zen 4: of a step, and what a vector of
// sums, a pixel and a staged cell take besides.
bool avx512vpopcnt_pays(const ConvShape& s, double byte_share) {
  const CodePlanes form(s);
  const Cells cells(s, form.input_bits, 32, 4, true);
  const double pixels = static_cast<double>(s.groups * s.out_h * s.out_w);
  const double staged = static_cast<double>(s.groups * Cells::read_rows(s) * cells.count);
  const double vectors = static_cast<double>((s.group_out() + 15) / 16),
               parts = static_cast<double>((cells.codes + 63) / 64);
  const double steps = static_cast<double>(s.kernel_h * cells.per_row * cells.words);
  const double pairs = form.input_bits * form.weight_bits;
  const double byte_steps = static_cast<double>(s.kernel_h * s.kernel_w * ((s.group_in() + 3) / 4));
  const double per_part = 5 + 2 * form.input_bits;
  const double per_cell = cells.overlap ? 3 + static_cast<double>(s.in_c) / 64 * per_part : 10 + parts * per_part;
  const double by_planes = pixels * (8 + vectors * (1.7 + pairs * (3.3 + steps * 1.55))) + staged * per_cell;
  return by_planes * 1.1 < pixels * vectors * (4 + byte_share * byte_steps);
}

}  // namespace bitstrata
