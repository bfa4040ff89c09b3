"""A training step with convolutions, normalizations and rectifiers fused, in integers as far as they reach."""

from .network import FusedNetwork, fuse
from .plan import FuseError

__all__ = ["FuseError", "FusedNetwork", "fuse"]
