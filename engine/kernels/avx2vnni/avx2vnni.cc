// The 256-bit VNNI row of the dispatch table: its convolutions and weight gradients; the rest is the AVX2 row's.
#include "avx2vnni.h"

#include <cpuid.h>

#include "../avx2/avx2.h"
#include "../common/winograd.h"

namespace bitstrata {

extern const Kernels kAvx2Kernels;
extern const ProductKernels kAvx2Products;
namespace {

// AVX-VNNI: leaf 7, subleaf 1, EAX bit 4. Not every compiler's __builtin_cpu_supports knows it; that of AVX2 includes
// that the operating system saves the registers.
bool has_avxvnni() {
#ifdef BITSTRATA_HAVE_AVXVNNI
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 &&
         (a >> 4 & 1) != 0;
#else
  return false;
#endif
}

bool has_avx512vnni() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}

const Avx2VnniForm& form() {
#ifdef BITSTRATA_HAVE_AVXVNNI
  static const Avx2VnniForm* const best = has_avxvnni() ? &kAvx2VnniVex : &kAvx2VnniEvex;
  return *best;
#else
  return kAvx2VnniEvex;
#endif
}

// Of the products that two outputs at a time take: more do not pay for what transforming four takes.
constexpr double kMostOfTwo = 0.93;

bool depthwise(const ConvShape& s) { return s.groups > 1 && s.group_in() == 1 && s.group_out() == 1; }

const ConvKernel* pick_conv(const ConvShape& s) {
  if (depthwise(s)) return &kAvx2Depthwise;
  const bool two = avx2vnni_winograd_pays(s), four = avx2vnni_winograd_four_pays(s);
  if (const ConvKernel* tables = avx2_table_choice(s, four ? 0.36 : two ? 0.45 : 0.54, 9)) return tables;
  if (four) return &form().winograd_four;
  if (two) return &form().winograd;
  if (s.in_c < 4 && avx2_stem_pays(s)) return &kAvx2Stem;  // which fills no channels up to four
  return form().direct_fits(s) ? &form().direct : &form().conv;
}

const ConvKernel* other_conv(const ConvShape& s) {
  const ConvKernel *picked = pick_conv(s), *two = winograd_fits<TwoOutputs>(s) ? &form().winograd : nullptr;
  if (two != nullptr && picked == two) return winograd_fits<FourOutputs>(s) ? &form().winograd_four : &form().conv;
  const ConvKernel* few = two != nullptr ? two : avx2_stem_fits(s) ? &kAvx2Stem : nullptr;
  return few != nullptr && picked == few ? &form().conv : few;
}

const WeightGradKernel* pick_weight_grad(const ConvShape& s) {
  if (depthwise(s)) return &form().depthwise_weight_grad;
  return form().winograd_weight_grad_pays(s) ? &form().winograd_weight_grad : &form().weight_grad;
}

const char* find_lacking() {
  if (const char* lacking = kAvx2Kernels.lacks()) return lacking;
  return has_avxvnni() || has_avx512vnni() ? nullptr : "processor flag avx_vnni, or avx512_vnni with avx512vl";
}

const char* lacks() {  // found once: asking a virtual processor takes long
  static const char* const lacking = find_lacking();
  return lacking;
}

bool supported() { return lacks() == nullptr; }

ProductKernels products() {
  ProductKernels row = kAvx2Products;
  row.weight_grad = pick_weight_grad;
  return row;
}

// Made when the program starts, from rows that are constants of the program.
const ProductKernels kProducts = products();

Kernels kernels() {
  Kernels row = kAvx2Kernels;
  row.isa = "avx2vnni";
  row.supported = supported;
  row.lacks = lacks;
  row.conv = pick_conv;
  row.other_conv = other_conv;
  row.products = &kProducts;
  row.limits = [] { return &form().limits; };
  return row;
}

}  // namespace

// With fewer channels, transforming inputs and sums takes what the products gain: from measurements on Zen 5.
bool avx2vnni_winograd_pays(const ConvShape& s) {
  return winograd_fits<TwoOutputs>(s) && s.out_w > 3 && s.in_c > 16 && s.out_c > 16;
}
bool avx2vnni_winograd_four_pays(const ConvShape& s) {
  return winograd_fits<FourOutputs>(s) && s.in_c > 16 && s.out_c > 16 &&
         winograd_passes<FourOutputs>(s) < kMostOfTwo * winograd_passes<TwoOutputs>(s);
}

extern const Kernels kAvx2VnniKernels;
const Kernels kAvx2VnniKernels = kernels();

}  // namespace bitstrata
