// Which instruction sets this build has, and which one a graph uses.
#pragma once

#include <string>
#include <vector>

#include "bitstrata/kernels.h"

namespace bitstrata {

// Names of the table's rows that this processor and operating system can run, slowest first.
std::vector<std::string> available_isas();

// Names of the rows that compute what another processor's instructions would, for tests: slow, and never chosen unless
// named.
std::vector<std::string> emulated_isas();

// A row of the table, whether this build has it or not.
struct KernelRow {
  std::string isa;
  bool emulated;
  std::string lacks;  // what this machine or this build lacks to run it; empty: it runs
};

// Every row there is, slowest first, then those that are emulated.
std::vector<KernelRow> kernel_table();

// The row named `isa`; if empty, the one that the environment variable BITSTRATA_ISA names; if that is unset or empty
// too, the fastest available. Throws std::invalid_argument if the name is unknown to this build or cannot run here.
const Kernels& select_kernels(const std::string& isa);

// The kernels that compute a convolution exactly on processors of `row`: its own choice first, then those of slower
// rows, each once.
std::vector<const ConvKernel*> conv_kernels(const Kernels& row, const ConvShape& shape);

// What the row could do at best.
const Limits& limits_of(const Kernels& row);

// The row's products of floats.
const FloatProducts& float_products_of(const Kernels& row);

}  // namespace bitstrata
