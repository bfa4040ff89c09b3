// The 256-bit VNNI kernels with EVEX-coded products.
#include "avx2vnni.h"
#include "conv.h"
#include "limits.h"
#include "weight_grad.h"
#include "winograd.h"

namespace bitstrata {

extern const Avx2VnniForm kAvx2VnniEvex = {kStaged,
                                           kDirect,
                                           direct_fits,
                                           kWinograd,
                                           kWinogradFour,
                                           kWeightGrad,
                                           kWinogradWeightGrad,
                                           winograd_weight_grad_pays,
                                           kDepthwiseWeightGrad,
                                           kLimits};

}  // namespace bitstrata
