"""Pure functions: fake quantization with its gradient rule, step-size constants, gradient helpers.

Nothing here knows of modules, layers or recipes.
"""

from .affine import affine_codes, affine_fake_quantize, best_affine
from .allocation import Allocation, allocate_widths
from .clipping import clipping_codes, clipping_fake_quantize
from .dorefa import dorefa_codes, dorefa_gradient, tanh_normalize
from .fake_quantize import fused_kernels
from .nested import nested_codes, nested_fake_quantize
from .sat import clamped_weight, deviation_scale, sat_scale
from .ste import floor_ste, grad_scale, round_ste, with_value
from .steps import (
    nested_step,
    optimal_step,
    rectified_sqnr_db,
    rectified_step,
    symmetric_sqnr_db,
    symmetric_step,
)
from .symmetric import symmetric_codes, symmetric_fake_quantize
from .uniform import uniform_codes, uniform_fake_quantize
from .vertical import vertical_codes, vertical_fake_quantize, vertical_offset

__all__ = [
    "Allocation",
    "affine_codes",
    "affine_fake_quantize",
    "allocate_widths",
    "best_affine",
    "clamped_weight",
    "clipping_codes",
    "clipping_fake_quantize",
    "deviation_scale",
    "dorefa_codes",
    "dorefa_gradient",
    "floor_ste",
    "fused_kernels",
    "grad_scale",
    "nested_codes",
    "nested_fake_quantize",
    "nested_step",
    "optimal_step",
    "rectified_sqnr_db",
    "rectified_step",
    "round_ste",
    "sat_scale",
    "symmetric_codes",
    "symmetric_fake_quantize",
    "symmetric_sqnr_db",
    "symmetric_step",
    "tanh_normalize",
    "uniform_codes",
    "uniform_fake_quantize",
    "vertical_codes",
    "vertical_fake_quantize",
    "vertical_offset",
    "with_value",
]
