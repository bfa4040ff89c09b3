"""A training step in integers from end to end: fused convolutions, normalizations and rectifiers."""

from .network import FusedNetwork, fuse
from .plan import FuseError

__all__ = ["FuseError", "FusedNetwork", "fuse"]
