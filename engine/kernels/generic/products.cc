// The integer products of the generic row: weight gradients by plain loops.
#include "../common/product_loops.h"
#include "../common/weight_grad_plain.h"

namespace bitstrata {
namespace {

constexpr WeightGradKernel kWeightGrad = PlainWeightGrad::kernel("generic");

const WeightGradKernel* pick_weight_grad(const ConvShape&) { return &kWeightGrad; }

}  // namespace

extern const ProductKernels kGenericProducts;
const ProductKernels kGenericProducts = product_kernels(pick_weight_grad);

}  // namespace bitstrata
