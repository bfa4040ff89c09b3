// What layers that read the same codes must agree on.
#pragma once

#include <vector>

#include "bitstrata/program.h"

namespace bitstrata::artifact {

// As bitstrata::check_shared_codes, with the result of code_readers at hand.
void check_shared_codes(const Program& program, const std::vector<std::vector<int>>& readers,
                        const std::vector<int>& map);

}  // namespace bitstrata::artifact
