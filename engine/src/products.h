// What the products share.
#pragma once

#include "bitstrata/products.h"
#include "checks.h"

namespace bitstrata {

// Throws std::invalid_argument, naming the operation.
void check_codes(const std::string& op, const ProductCodes&, int64_t channels);

}  // namespace bitstrata
