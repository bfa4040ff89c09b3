"""Looking at training: the loss around a point, and what quantization adds to gradients.

Nothing here changes the model it is given: parameters, buffers, modes and random streams are as before afterwards.
Reading order: kept (what is put back), landscape, plot, variance.
"""

from .landscape import Landscape, loss_landscape
from .nonzero import NonzeroRatios, nonzero_activations, nonzero_weights
from .plot import plot_landscape
from .variance import GradientVariance, LayerVariance, gradient_variance

__all__ = [
    "GradientVariance",
    "Landscape",
    "LayerVariance",
    "NonzeroRatios",
    "gradient_variance",
    "loss_landscape",
    "nonzero_activations",
    "nonzero_weights",
    "plot_landscape",
]
