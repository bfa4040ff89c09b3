"""Looking at training: what quantization does to weights, activations, gradients and the loss.

Nothing here changes the model it is given: parameters, buffers, modes and random streams are as before afterwards.
Reading order: kept (what is put back), signal, nonzero, rules, objectives, measure (all of these at once), live (while
training), landscape, arriving (gradients), variance, ranges, norms, plot, plot_layers.
"""

from .kept import kept
from .landscape import Landscape, loss_landscape
from .live import Live
from .measure import Measurement, measure
from .nonzero import NonzeroRatios, nonzero_activations, nonzero_weights
from .norms import NormReading, NormStatistics, norm_statistics
from .objectives import ObjectiveGeometry, objective_geometry
from .plot import plot_landscape
from .plot_layers import plot_norms, plot_ranges
from .ranges import LayerRanges, gradient_ranges
from .rules import LayerRule, TrainingRules, training_rules
from .signal import CodeFlips, LayerSignal, Signal, layer_signals
from .variance import GradientVariance, LayerVariance, gradient_variance

__all__ = [
    "CodeFlips",
    "GradientVariance",
    "Landscape",
    "LayerRanges",
    "LayerRule",
    "LayerSignal",
    "LayerVariance",
    "Live",
    "Measurement",
    "NonzeroRatios",
    "NormReading",
    "NormStatistics",
    "ObjectiveGeometry",
    "Signal",
    "TrainingRules",
    "gradient_ranges",
    "gradient_variance",
    "kept",
    "layer_signals",
    "loss_landscape",
    "measure",
    "nonzero_activations",
    "nonzero_weights",
    "norm_statistics",
    "objective_geometry",
    "plot_landscape",
    "plot_norms",
    "plot_ranges",
    "training_rules",
]
