"""From a float model to a quantized one: quantize_, calibrate_, precision, summary, parameter groups."""

from .accumulation import accumulate_
from .calibrate import calibrate_, reestimate_batchnorm_
from .float_form import float_form_
from .freeze import freezable_layers, freeze_
from .integer_training import (
    LayerMemory,
    SavedMemory,
    integer_,
    integer_layers,
    load_noise_state_,
    noise_state,
    saved_memory,
)
from .mixed import mixed_precision_map
from .parameters import parameter_groups, precision_parameters
from .precision import precision, precisions, set_precision
from .quantize import Pixels, quantize_
from .step import step_weights, weights_of_a_step
from .summary import Summary, SummaryRow, summary
from .synchronize import synchronize_, synchronized

__all__ = [
    "LayerMemory",
    "Pixels",
    "SavedMemory",
    "Summary",
    "SummaryRow",
    "accumulate_",
    "calibrate_",
    "float_form_",
    "freezable_layers",
    "freeze_",
    "integer_",
    "integer_layers",
    "load_noise_state_",
    "mixed_precision_map",
    "noise_state",
    "parameter_groups",
    "precision",
    "precision_parameters",
    "precisions",
    "quantize_",
    "reestimate_batchnorm_",
    "saved_memory",
    "set_precision",
    "step_weights",
    "summary",
    "synchronize_",
    "synchronized",
    "weights_of_a_step",
]
