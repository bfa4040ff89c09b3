"""Training objectives: distillation losses and the joint objective over all precisions."""

from .distill import DISTILLATIONS, cosine_distillation
from .joint import JointLoss, joint_backward

__all__ = ["DISTILLATIONS", "JointLoss", "cosine_distillation", "joint_backward"]
