// Whose threads share the loops of quantize.h, products.h and conv_norm.h.
#pragma once

#include <string>

namespace bitstrata {

// From now on those of an OpenMP runtime, if the library at this path is one and the process has loaded it; false if
// not. Where others compute with the same runtime between our loops, there are no threads then that wait beside theirs.
// Results do not depend on it. A graph keeps threads of its own.
bool use_openmp(const std::string& library);

}  // namespace bitstrata
