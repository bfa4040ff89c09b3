#pragma once

#include <nanobind/nanobind.h>

// Quantization and normalization of a training step.
void bind_training(nanobind::module_& m);
