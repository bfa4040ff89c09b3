// The kernels of the AMX row on emulated tiles, for tests where no processor has real ones; the rest is the generic
// row's.
#include "conv.h"
#include "limits.h"
#include "tiles_emulated.h"
#include "weight_grad.h"

namespace bitstrata {

extern const Kernels kGenericKernels;
extern const ProductKernels kGenericProducts;
extern const Limits kGenericLimits;
namespace {

bool supported() { return true; }

constexpr ConvKernel kConv = TileConv<EmulatedTiles>::staged("amx-emulated");
constexpr ConvKernel kDirect = TileConv<EmulatedTiles>::direct("amx-emulated-direct");
constexpr WeightGradKernel kWeightGrad = TileWeightGrad<EmulatedTiles>::kernel("amx-emulated");

// Depthwise convolutions have one channel to fill a tile with, and are left to the other row.
bool depthwise(const ConvShape& s) { return s.groups > 1 && s.group_in() == 1 && s.group_out() == 1; }

const ConvKernel* pick_conv(const ConvShape& s) {
  if (depthwise(s)) return kGenericKernels.conv(s);
  return TileConv<EmulatedTiles>::direct_fits(s) ? &kDirect : &kConv;
}

const WeightGradKernel* pick_weight_grad(const ConvShape& s) {
  return depthwise(s) ? kGenericKernels.products->weight_grad(s) : &kWeightGrad;
}

ProductKernels products() {
  ProductKernels row = kGenericProducts;
  row.weight_grad = pick_weight_grad;
  return row;
}

// Made when the program starts, from rows that are constants of the program.
const ProductKernels kProducts = products();

const Limits* limits() {
  static const Limits kOnTiles = {kTilePeak<EmulatedTiles>, kGenericLimits.read, kGenericLimits.copy};
  return &kOnTiles;
}

Kernels kernels() {
  Kernels row = kGenericKernels;
  row.isa = "amx-emulated";
  row.supported = supported;
  row.conv = pick_conv;
  row.products = &kProducts;
  row.limits = limits;
  return row;
}

}  // namespace

extern const Kernels kAmxEmulatedKernels;
const Kernels kAmxEmulatedKernels = kernels();

}  // namespace bitstrata
