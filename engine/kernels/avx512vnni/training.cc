// The kernels of a training step: the common ones compiled for this instruction set, and some by hand.
#include "../common/training.h"

#include "training_gradient.h"

namespace bitstrata {
namespace {

constexpr Training with_blocks() {
  Training k = kTraining;
  k.norm_period = kBlock;  // in one block a period, rows follow one another in memory
  k.norm_codes_i32 = fast_norm_codes<int32_t>;
  k.norm_codes_f32 = fast_norm_codes<float>;
  k.norm_sides = fast_norm_sides;
  k.norm_center = fast_norm_center;
  k.norm_to_codes = fast_norm_to_codes;
  k.gradient_range_i32 = fast_gradient_range<int32_t>;
  k.gradient_range_f32 = fast_gradient_range<float>;
  k.gradient_codes_i32 = fast_gradient_codes<int32_t>;
  k.gradient_codes_f32 = fast_gradient_codes<float>;
  k.l1_gradient = fast_l1_gradient;
  k.l1_gradient_codes = fast_l1_gradient_codes;
  return k;
}

}  // namespace

extern const Training kAvx512VnniTraining;
const Training kAvx512VnniTraining = with_blocks();

}  // namespace bitstrata
