// What the files of the 256-bit VNNI row share.
//
// Its products, vpdpbusd on 256-bit registers, have two encodings: VEX (AVX-VNNI) and EVEX (AVX-512 VNNI with AVX-512
// VL). Processors have either or both, so that the same source is compiled for each.
#pragma once

#include "bitstrata/kernels.h"

namespace bitstrata {

struct Avx2VnniForm {
  ConvKernel conv;    // any convolution: products of u8 and s8 in fours, summed in int32
  ConvKernel direct;  // the same where pixels can be read from the input itself
  bool (*direct_fits)(const ConvShape&);
  ConvKernel winograd;       // only where avx2vnni_winograd_pays
  ConvKernel winograd_four;  // only where avx2vnni_winograd_four_pays
  WeightGradKernel weight_grad;
  WeightGradKernel winograd_weight_grad;
  bool (*winograd_weight_grad_pays)(const ConvShape&);
  WeightGradKernel depthwise_weight_grad;
  Limits limits;
};

// Whether the Winograd kernel of two outputs fits and is faster than the first.
bool avx2vnni_winograd_pays(const ConvShape&);
// Whether that of four outputs fits and is faster still.
bool avx2vnni_winograd_four_pays(const ConvShape&);

extern const Avx2VnniForm kAvx2VnniVex;
extern const Avx2VnniForm kAvx2VnniEvex;

}  // namespace bitstrata
