"""Looking at training: what quantization does to weights, activations, gradients and the loss.

Nothing here changes the model it is given: parameters, buffers, modes and random streams are as before afterwards.
Reading order: kept (what is put back), signal, nonzero, rules, objectives, measure (all of these at once), live (while
training), landscape, plot, variance.
"""

from .kept import kept
from .landscape import Landscape, loss_landscape
from .live import Live
from .measure import Measurement, measure
from .nonzero import NonzeroRatios, nonzero_activations, nonzero_weights
from .objectives import ObjectiveGeometry, objective_geometry
from .plot import plot_landscape
from .rules import LayerRule, TrainingRules, training_rules
from .signal import CodeFlips, LayerSignal, Signal, layer_signals
from .variance import GradientVariance, LayerVariance, gradient_variance

__all__ = [
    "CodeFlips",
    "GradientVariance",
    "Landscape",
    "LayerRule",
    "LayerSignal",
    "LayerVariance",
    "Live",
    "Measurement",
    "NonzeroRatios",
    "ObjectiveGeometry",
    "Signal",
    "TrainingRules",
    "gradient_variance",
    "kept",
    "layer_signals",
    "loss_landscape",
    "measure",
    "nonzero_activations",
    "nonzero_weights",
    "objective_geometry",
    "plot_landscape",
    "training_rules",
]
