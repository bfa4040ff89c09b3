// Shapes and kinds of a program's values, and with them the check of everything that nodes can get wrong together.
#pragma once

#include "bitstrata/program.h"

namespace bitstrata::artifact {

// Fills `values` and `input` from the rest. The tables and each node for itself have been checked. Throws ArtifactError
// (program) that names manifest.json, the node or layer, and the cause.
void check_graph(Program* program);

}  // namespace bitstrata::artifact
