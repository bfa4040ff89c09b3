"""Training objectives: losses, distillation, the joint objective over all precisions, and schemes of training."""

from .chain import ChainStage, warm_start_chain
from .distill import DISTILLATIONS, cosine_distillation, kl_distillation
from .joint import JointLoss, joint_backward, losses_of_a_step
from .joint_loss import joint_loss
from .losses import LOSSES, cross_entropy, make_loss, maqd
from .mgd import min_norm_point
from .sampling import SAMPLINGS, PrecisionSampler
from .schemes import Stage, ascending_stages, copy_norms_, cotrain, top_then_finetune, warm_start_

__all__ = [
    "DISTILLATIONS",
    "LOSSES",
    "SAMPLINGS",
    "ChainStage",
    "JointLoss",
    "PrecisionSampler",
    "Stage",
    "ascending_stages",
    "copy_norms_",
    "cosine_distillation",
    "cotrain",
    "cross_entropy",
    "joint_backward",
    "joint_loss",
    "kl_distillation",
    "losses_of_a_step",
    "make_loss",
    "maqd",
    "min_norm_point",
    "top_then_finetune",
    "warm_start_",
    "warm_start_chain",
]
