// The AMX row of the dispatch table: convolutions and weight gradients on tiles; the rest is the AVX-512 VNNI row's.
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "conv.h"
#include "limits.h"
#include "tiles.h"
#include "weight_grad.h"

namespace bitstrata {

extern const Kernels kAvx512VnniKernels;
extern const ProductKernels kAvx512VnniProducts;
extern const Limits kAvx512VnniLimits;
namespace {

// AMX-TILE and AMX-INT8: leaf 7, subleaf 0, EDX bits 24 and 25.
bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d >> 24 & 3) == 3;
}

// The operating system gives room for the tiles' contents to processes that ask for it, for all their threads.
bool permitted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

const char* find_lacking() {
  if (const char* lacking = kAvx512VnniKernels.lacks()) return lacking;
  if (!has_amx()) return "processor flags amx_tile and amx_int8";
  return permitted() ? nullptr : "the operating system's permission to use the tile registers";
}

const char* lacks() {
  static const char* const lacking = find_lacking();
  return lacking;
}

bool supported() { return lacks() == nullptr; }

constexpr ConvKernel kConv = TileConv<Tiles>::staged("amx");
constexpr ConvKernel kDirect = TileConv<Tiles>::direct("amx-direct");
constexpr WeightGradKernel kWeightGrad = TileWeightGrad<Tiles>::kernel("amx");

// Depthwise convolutions have one channel to fill a tile with, and are left to the other row.
bool depthwise(const ConvShape& s) { return s.groups > 1 && s.group_in() == 1 && s.group_out() == 1; }

const ConvKernel* pick_conv(const ConvShape& s) {
  if (depthwise(s)) return kAvx512VnniKernels.conv(s);
  return TileConv<Tiles>::direct_fits(s) ? &kDirect : &kConv;
}

const WeightGradKernel* pick_weight_grad(const ConvShape& s) {
  return depthwise(s) ? kAvx512VnniKernels.products->weight_grad(s) : &kWeightGrad;
}

ProductKernels products() {
  ProductKernels row = kAvx512VnniProducts;
  row.weight_grad = pick_weight_grad;
  return row;
}

// Made when the program starts, from rows that are constants of the program.
const ProductKernels kProducts = products();

const Limits* limits() {
  static const Limits kOnTiles = {kTilePeak<Tiles>, kAvx512VnniLimits.read, kAvx512VnniLimits.copy};
  return &kOnTiles;
}

Kernels kernels() {
  Kernels row = kAvx512VnniKernels;
  row.isa = "amx";
  row.supported = supported;
  row.lacks = lacks;
  row.conv = pick_conv;
  row.products = &kProducts;
  row.limits = limits;
  return row;
}

}  // namespace

extern const Kernels kAmxKernels;
const Kernels kAmxKernels = kernels();

}  // namespace bitstrata
