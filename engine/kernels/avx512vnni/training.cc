// The kernels of a training step, compiled for this instruction set.
#include "../common/training.h"

namespace bitstrata {

extern const Training kAvx512VnniTraining = kTraining;

}  // namespace bitstrata
