#pragma once

namespace bitstrata::test {

void test_low_bit_kernels();  // counts failures in guarded.h's `failures`

}  // namespace bitstrata::test
