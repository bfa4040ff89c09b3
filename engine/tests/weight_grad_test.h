// The weight gradients of one instruction set against plain sums; failures are counted as in guarded.h.
#pragma once

#include "bitstrata/kernels.h"

namespace bitstrata::test {

void test_weight_grads(const Kernels& row);

}  // namespace bitstrata::test
