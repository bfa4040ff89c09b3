// Bit-planes of weight codes (spec/artifact.md, section 5).
#pragma once

#include <cstdint>

namespace bitstrata::artifact {

// Codes one bit wider: codes of `held` bits become 2*code + digit, where held is 0 (whatever the codes were, they
// become digit - 1) to 7. plane: (weights + 7) / 8 bytes, the first weight in the highest bit. codes: (weights,).
void widen(const uint8_t* plane, int64_t weights, int held, int8_t* codes);

// Whether the unused low bits of a plane's last byte are 0.
bool padding_is_zero(const uint8_t* plane, int64_t weights);

}  // namespace bitstrata::artifact
