#pragma once

#include <nanobind/nanobind.h>

// Adds times of a graph's operations, and what the machine could do at best.
void bind_profile(nanobind::module_& m);
