// Whether emulated tiles compute what the tile instructions do; failures are counted as in guarded.h.
#pragma once

namespace bitstrata::test {

void test_emulated_tiles();

}  // namespace bitstrata::test
