#pragma once

#include <nanobind/nanobind.h>

// Adds the integer products of a training step to the module.
void bind_products(nanobind::module_& m);
