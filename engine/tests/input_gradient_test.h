// The gradient of a convolution's input in bfloat16, on guarded buffers.
#pragma once

#include "bitstrata/dispatch.h"

namespace bitstrata::test {

void test_input_gradients(const Kernels& row);

}  // namespace bitstrata::test
