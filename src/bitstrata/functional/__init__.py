"""Pure functions: fake quantization with its gradient rule, step-size constants, gradient helpers.

Nothing here knows of modules, layers or recipes.
"""

from .nested import nested_codes, nested_fake_quantize
from .steps import nested_step, optimal_step, rectified_step, symmetric_step
from .uniform import uniform_codes, uniform_fake_quantize

__all__ = [
    "nested_codes",
    "nested_fake_quantize",
    "nested_step",
    "optimal_step",
    "rectified_step",
    "symmetric_step",
    "uniform_codes",
    "uniform_fake_quantize",
]
