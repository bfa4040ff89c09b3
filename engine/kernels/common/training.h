// The kernels of bitstrata/training.h as one table.
//
// Like everything in this folder this is compiled once for each instruction set, in an unnamed namespace.
#pragma once

#include "qat_gradient.h"
#include "training_fake.h"
#include "training_gradient.h"
#include "training_layer_norm.h"
#include "training_pool.h"

namespace bitstrata {
namespace {

constexpr Training kTraining = {
    kLongPeriod,
    range<float>,
    range<uint16_t>,
    codes<float>,
    codes<uint16_t>,
    sum_codes_up,
    pack,
    unpack,
    unshift,
    norm_codes<int32_t>,
    norm_codes<float>,
    norm_sides,
    norm_squares,
    norm_center,
    norm_to_codes,
    norm_to_f32,
    max_pool,
    max_pool_gradient,
    keep_maxima,
    put_maxima,
    join<int32_t>,
    join<float>,
    gradient_range<int32_t>,
    gradient_range<float>,
    gradient_codes<int32_t>,
    gradient_codes<float>,
    l1_gradient,
    l2_gradient,
    l1_gradient_codes,
    kLayerKernels,
    kFakeKernels,
    kQatKernels,
};

}  // namespace
}  // namespace bitstrata
