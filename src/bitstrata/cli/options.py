"""Options that `train` and `quantize` share; a field's docstring is its help text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

#: Options that a resumed run may change without becoming another run.
FREE = frozenset(
    {
        "out", "root", "threads", "checkpoint_every", "log_every", "fresh", "isa", "keep", "on_nonfinite",
        "allow_inexact", "quiet", "tensorboard", "diagnose", "diagnose_every",
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Data, precisions and the joint training stage."""

    data: str = "cifar10"
    """Data set by name, or PACKAGE.MODULE:FUNCTION of your own, called with "train" or "test" (and root= if given),
    which returns (image, label) pairs such as a torch Dataset, two arrays, or a bitstrata.data.Dataset."""
    root: Path | None = None
    """Directory that holds the data set's files; digits needs none."""
    data_set: tuple[str, ...] = ()
    """Options of the data set, as NAME=VALUE, such as size=64 test_fraction=0.2 for folder."""
    augment: Literal["auto", "none", "crop", "flip", "crop-flip"] = "auto"
    """Augmentation of training images: auto is customary for the data sets with names, and none for your own; crop
    shifts by up to an eighth of the image, flip exchanges left and right."""
    bits: str | None = None
    """Weight bit-widths to train together, ascending, by default the recipe's own; the widest is stored, the others
    are its first bit-planes."""
    a: str | None = None
    """Activation bit-width: same as the weights', or one number for all; by default the recipe's own."""
    recipe: str = "strata"
    """Quantization recipe; `bitstrata recipes` lists them, `bitstrata recipes NAME` its fields."""
    set: tuple[str, ...] = ()
    """Fields of the recipe, as NAME=VALUE, such as per_channel=true or rescale=stddev."""
    model_set: tuple[str, ...] = ()
    """Options of the network, as NAME=VALUE, such as width=32 or stem=cifar."""
    epochs: int = 5
    """Epochs of quantized training, all precisions together."""
    lr: float = 0.02
    """Peak learning rate of quantized training."""
    weight_decay: float = 5e-4
    """L2 decay of weights."""
    warmup: float = 0.0
    """Epochs of linear warm-up of quantized training."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """Optimizer of both stages."""
    paper_schedule: bool = False
    """Optimizer, learning rate, its course, warm-up and weight decay of quantized training as the recipe's paper has
    them, in place of the options here; epochs and batch size are still those of the options."""
    batch_size: int = 128
    """Images a step."""
    artifact: bool = True
    """Refuse, before training, a network that has no integer program; --no-artifact trains and evaluates it."""
    distill: bool = True
    """Distil as the recipe does; --no-distill leaves it out."""
    sampling: Literal["all", "sandwich", "pair"] | None = None
    """Bit-widths of a step: all; the narrowest, the widest and a random one between (sandwich); or the widest and a
    random one (pair); by default the recipe's own."""
    teacher: Literal["float"] | None = None
    """float: the float network teaches every bit-width of quantized training, in the place of a wider one."""
    chain: str | None = None
    """Bit-widths trained by themselves before --bits, --epochs each, every one from the weights of the one before: with
    --bits 1, 4,2 makes the chain float, 4, 2, 1."""
    label_smoothing: float = 0.0
    """Probability mass spread evenly over all classes."""
    clip_grad: float | None = None
    """Largest allowed gradient norm."""
    amp: Literal["none", "bf16"] = "none"
    """Number format of forward passes in training; evaluation against the engine is always exact."""
    channels_last: bool = False
    """NHWC memory order in training."""
    fused: bool = False
    """Run steps of quantized training with convolutions in integer kernels (see fuse): faster, most of all with --amp
    bf16, and less memory."""
    calibration_batches: int = 4
    """Training batches that set the first step sizes."""
    train_limit: int | None = None
    """Use only the first images of the training set."""
    test_limit: int | None = None
    """Use only the first images of the test set."""
    verify_images: int = 64
    """Test images on which every layer is verified against the trained network."""
    seed: int = 0
    """Seed of everything random."""
    threads: int | None = None
    """Threads of training."""
    isa: str | None = None
    """Instruction set of the engine; the best one by default."""
    checkpoint_every: int = 0
    """Steps between checkpoints inside an epoch; 0: one an epoch."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    keep: int = 2
    """Checkpoints that are kept of each stage, the last ones, beside the best one."""
    on_nonfinite: Literal["error", "skip"] = "error"
    """What becomes of a training step with a loss or gradient that is not finite."""
    eval_every: int = 1
    """Epochs between evaluations; 0: at the end only."""
    quiet: bool = False
    """Show no progress; metrics.jsonl is written all the same."""
    tensorboard: Path | None = None
    """Also write TensorBoard's events under this directory; needs pip install "bitstrata[tensorboard]"."""
    diagnose: str | None = None
    """Measure the network while it trains quantized, as sqnr,steps,deviation,clipping,nonzero,flips,kappa,ratio,
    gradient,moo or all; `bitstrata report` draws it. Training is the same to the bit."""
    diagnose_every: int = 100
    """Steps between these measurements."""
    fresh: bool = False
    """Start over although the output directory holds an unfinished or finished run."""
    allow_inexact: bool = False
    """Continue although threads, instruction set or versions are not those of the checkpoint, so that the result will
    not be the same to the bit."""


def provenance(options: Any) -> dict[str, Any]:
    """What an artifact keeps of the options: all that decides its weights, and no directory names."""
    kept = {name: value for name, value in resolved(options).items() if name not in FREE}
    if "checkpoint" in kept:
        kept["checkpoint"] = Path(kept["checkpoint"]).name
    return {"options": kept}


def resolved(options: Any) -> dict[str, Any]:
    """All options as JSON values."""
    forms = {Path: str, tuple: list}
    values = sorted(asdict(options).items())
    return {name: next((f(v) for kind, f in forms.items() if isinstance(v, kind)), v) for name, v in values}
