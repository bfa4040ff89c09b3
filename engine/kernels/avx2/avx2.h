// What the AVX2 files share.
#pragma once

#include "bitstrata/kernels.h"

namespace bitstrata {

// Any convolution, products of pairs in int16: exact whatever the codes.
extern const ConvKernel kAvx2Wide;
// Products of u8 and s8 pairs, summed in int16: only where avx2_narrow_fits.
extern const ConvKernel kAvx2Narrow;
// Three neighbouring columns of weights of few bits, with stride 1, by two thirds of the narrow kernel's products.
extern const ConvKernel kAvx2Winograd;
// The same stride and columns, codes of eight bits, by half of the wide kernel's products.
extern const ConvKernel kAvx2WinogradWide;
// Few input channels and seven columns with stride 2, by less than half of the wide kernel's products: only where
// avx2_stem_fits.
extern const ConvKernel kAvx2Stem;
// Sums of chosen inputs from tables, by planes of the weights' bits: only where avx2_table_fits.
extern const ConvKernel kAvx2Table;
// The same of two pixels at once, inputs of one bit: only where avx2_pairs_fits.
extern const ConvKernel kAvx2Pairs;
// One input and one output channel in each group.
extern const ConvKernel kAvx2Depthwise;

// What bounds those that the row's fastest products do not; the narrow kernel's products are the row's fastest.
extern const PeakLoop kAvx2WidePeak, kAvx2TablePeak, kAvx2PairPeak;

// How many steps int16 holds of the narrow kernel's pair sums, for every weight and input within the shape's bounds.
int64_t avx2_narrow_steps(const ConvShape&);
// Whether int16 holds several of the narrow kernel's pair sums, for every weight and input within the shape's bounds.
bool avx2_narrow_fits(const ConvShape&);
// Whether bytes hold what the Winograd kernel makes of weights and inputs, and int16 several of its pair sums.
bool avx2_winograd_fits(const ConvShape&);
// Whether it fits and is faster than the narrow one.
bool avx2_winograd_pays(const ConvShape&);
// Whether 16 bits hold what the wide Winograd kernel makes of weights and inputs, and 29 bits its results.
bool avx2_winograd_wide_fits(const ConvShape&);
// Whether it fits and is faster than the wide one.
bool avx2_winograd_wide_pays(const ConvShape&);
// Whether 16 bits hold what the stem kernel makes of weights and inputs, and 29 bits its results.
bool avx2_stem_fits(const ConvShape&);
// Whether it fits and is faster than the wide one.
bool avx2_stem_pays(const ConvShape&);
// Whether 16 bits hold every sum of products of codes moved to begin at 0.
bool avx2_table_fits(const ConvShape&);
// Whether the inputs have one bit too.
bool avx2_pairs_fits(const ConvShape&);
// The kernel by tables that fits and is faster than one by bytes that takes, for each pixel and vector of eight output
// channels, step_cycles for every four inputs and vector_cycles besides; null if none is: an estimate, from
// measurements on Zen 4.
const ConvKernel* avx2_table_choice(const ConvShape&, double step_cycles, double vector_cycles);

}  // namespace bitstrata
