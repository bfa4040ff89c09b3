"""Looking at training: what quantization does to weights, activations, gradients and the loss.

Nothing here changes the model it is given: parameters, buffers, modes and random streams are as before afterwards.
Reading order: kept (what is put back), signal, nonzero, rules, objectives, landscape, plot, variance.
"""

from .landscape import Landscape, loss_landscape
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
    "NonzeroRatios",
    "ObjectiveGeometry",
    "Signal",
    "TrainingRules",
    "gradient_variance",
    "layer_signals",
    "loss_landscape",
    "nonzero_activations",
    "nonzero_weights",
    "objective_geometry",
    "plot_landscape",
    "training_rules",
]
