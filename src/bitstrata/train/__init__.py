"""Training: `Trainer` for one stage, `evaluate` for its accuracy; a user's own loop needs neither."""

from bitstrata.train.allocator import keep_freed_memory
from bitstrata.train.callback import Callback, Moment
from bitstrata.train.chain import fit_chain
from bitstrata.train.checkpoint import CheckpointError
from bitstrata.train.config import Level, TrainConfig
from bitstrata.train.evaluate import evaluate
from bitstrata.train.lock import DirectoryInUseError
from bitstrata.train.progress import quiet, reporter
from bitstrata.train.signals import TrainingStopped
from bitstrata.train.trainer import Trainer

__all__ = [
    "Callback",
    "CheckpointError",
    "DirectoryInUseError",
    "Level",
    "Moment",
    "TrainConfig",
    "Trainer",
    "TrainingStopped",
    "evaluate",
    "fit_chain",
    "keep_freed_memory",
    "quiet",
    "reporter",
]
