#pragma once

#include <nanobind/nanobind.h>

// Quantization and normalization of a training step.
void bind_training(nanobind::module_& m);

// A convolution with its normalization as one operation.
void bind_conv_norm(nanobind::module_& m);

// The layer normalization.
void bind_layer_norm(nanobind::module_& m);

// A layer's products and quantization in one call each way.
void bind_layer_step(nanobind::module_& m);

// Fake quantization.
void bind_fake_quantize(nanobind::module_& m);

// Quantization-aware training on integer sums.
void bind_qat(nanobind::module_& m);

// Products of floats of its backward pass.
void bind_qat_products(nanobind::module_& m);
