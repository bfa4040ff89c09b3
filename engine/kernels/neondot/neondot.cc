// The dot product row of the dispatch table (Armv8.2): its convolutions and weight gradients; the rest is the NEON
// row's. This file is compiled for any AArch64 processor, because the row is made before the processor is known.
#include "neondot.h"

#include "../neon/neon.h"

#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace bitstrata {
namespace {

bool supported() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof(has);
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) == 0 && has != 0;
#else
  return false;
#endif
}

const ConvKernel* pick_conv(const ConvShape& s) {
  if (s.groups > 1 && s.group_in() == 1 && s.group_out() == 1) return kNeonKernels.conv(s);
  return neon_direct_fits(s) ? &kNeonDotDirect : &kNeonDotConv;
}

const WeightGradKernel* pick_weight_grad(const ConvShape& s) {
  return s.groups > 1 && s.group_in() == 1 && s.group_out() == 1 ? kNeonProducts.weight_grad(s) : &kNeonDotWeightGrad;
}

ProductKernels products() {
  ProductKernels row = kNeonProducts;
  row.weight_grad = pick_weight_grad;
  return row;
}

// Made when the program starts, from rows that are constants of the program.
const ProductKernels kProducts = products();

Kernels kernels() {
  Kernels row = kNeonKernels;
  row.isa = "neon-dot";
  row.supported = supported;
  row.conv = pick_conv;
  row.products = &kProducts;
  return row;
}

}  // namespace

extern const Kernels kNeonDotKernels;
const Kernels kNeonDotKernels = kernels();

}  // namespace bitstrata
