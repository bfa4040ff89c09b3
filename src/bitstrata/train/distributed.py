"""Training by several processes, as accelerate or torchrun launches them: what the Trainer asks of them."""

from __future__ import annotations

import importlib.util
import itertools
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.data import DataLoader

from bitstrata.data import Loader
from bitstrata.prepare import load_noise_state_, noise_state, synchronize_, synchronized
from bitstrata.prepare.wrapped import is_sharded
from bitstrata.train.config import Level
from bitstrata.train.objective import LevelLoss

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

ODD = 0x9E3779B97F4A7C15  # takes the seeds of ranks far apart
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
SUPPORTED = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "MULTI_MLU", "MULTI_SDAA", "MULTI_MUSA")


class Distributed:
    """The processes that train one network together, one share of every batch each; a single one unless launched so.

    Methods that exchange something ("on every rank") wait until all ranks call them.

    Args:
        accelerator: of accelerate; None to make one if the environment says that torchrun or accelerate has launched
            several processes.

    Raises:
        ImportError: several processes, and accelerate is not installed.
        ValueError: an accelerator that shards the network (FSDP, DeepSpeed, ...), accumulates gradients or scales
            losses, none of which the Trainer does.
    """

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        if accelerator is None and launched() > 1:
            accelerator = _accelerator()
        self.accelerator = accelerator
        self.rank, self.size = 0, 1
        if accelerator is not None:
            _check(accelerator)
            self.rank, self.size = accelerator.process_index, accelerator.num_processes

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The network on the accelerator's device, in `DistributedDataParallel` if there are several ranks."""
        return model if self.accelerator is None else self.accelerator.prepare_model(model)

    def share(self, loader: Any, seed: int) -> Any:
        """This rank's share of a training loader: by its `shard(rank, ranks)`, or of a DataLoader by accelerate.

        accelerate deals out whole batches, seeds each epoch's order, and fills the last round from the beginning.
        Raises TypeError for another kind of loader, on several ranks.
        """
        if self.size == 1:
            return loader
        if hasattr(loader, "shard"):
            return loader.shard(self.rank, self.size)
        if not isinstance(loader, DataLoader):
            raise TypeError(
                f"Trainer: on {self.size} ranks the train_loader has to be a bitstrata.data.Loader or a torch "
                f"DataLoader, which can be shared out; got {type(loader).__name__}"
            )
        from accelerate.data_loader import prepare_data_loader

        return prepare_data_loader(
            loader,
            num_processes=self.size,
            process_index=self.rank,
            put_on_device=False,
            use_seedable_sampler=True,
            data_seed=seed,
        )

    def every(self, loader: Any) -> Iterable[Any]:
        """The batches of an evaluation loader that this rank counts: each belongs to one rank."""
        if isinstance(loader, Loader):
            return loader.epoch(0, min(self.rank, len(loader)), self.size)
        batches = loader.epoch(0, 0) if hasattr(loader, "epoch") else loader
        return batches if self.size == 1 else itertools.islice(batches, self.rank, None, self.size)

    def synchronized(self, model: nn.Module) -> AbstractContextManager[object]:
        """Statistics of the joined batch inside the `with` block, if there are several ranks."""
        return synchronized(model) if self.size > 1 else nullcontext()

    @contextmanager
    def alone(self, model: nn.Module) -> Iterator[None]:
        """Inside, the network (not its wrapper) runs without waiting for other ranks."""
        if self.size == 1:
            yield
            return
        synchronize_(model, False)
        try:
            yield
        finally:
            synchronize_(model)

    def seed(self, seed: int) -> int:
        """A rank's own seed for what differs between samples, such as dropout; the given one on the first."""
        return (seed + self.rank * ODD) % 2**63

    def own_noise_(self, model: nn.Module) -> None:
        """Give stochastic rounding of integer layers a stream of this rank's own, from what is equal on all ranks."""
        if self.rank:
            state = noise_state(model)
            moved = {name: {**s, "seed": (s["seed"] + self.rank * ODD) % 2**64} for name, s in state.items()}
            load_noise_state_(model, moved)

    def sums(self, values: Sequence[float]) -> list[float]:
        """Sums over ranks, in float64, on every rank."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(total)
        return [float(value) for value in total]

    def joined(self, results: Mapping[Any, LevelLoss], labels: Tensor) -> _Joined:
        """Mean losses, correct answers and samples of the joined batch of a step, on every rank."""
        losses = {level: float(result.loss) for level, result in results.items()}
        hits = {level: int((result.logits.detach().argmax(1) == labels).sum()) for level, result in results.items()}
        if self.size == 1:
            return losses, hits, len(labels)
        keys, samples = list(losses), len(labels)
        found = self.sums([*(losses[k] * samples for k in keys), *(hits[k] for k in keys), samples])
        count = int(found[-1])
        means = {k: total / count for k, total in zip(keys, found, strict=False)}
        return means, {k: int(total) for k, total in zip(keys, found[len(keys) :], strict=False)}, count

    def agreed(self, requested: str) -> str:
        """A signal's name where any rank was sent one, else "", on every rank."""
        if self.size == 1:
            return requested
        number = torch.tensor(signal.Signals[requested].value if requested else 0, device=self._device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return signal.Signals(int(number)).name if int(number) else ""

    def breaking_off(self, watch: Watch) -> Watch:
        """`watch` of a single process; with others, who would wait, what is begun is finished."""
        return watch if self.size == 1 else lambda batches: batches

    def from_first(self, work: Callable[[], T]) -> T:
        """What `work` returns, or raises, on the first rank, on every rank; the others do not run it."""
        if self.size == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = work()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, device=self._device)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def of_all(self, state: T) -> T | list[T]:
        """`state` itself of a single process, else the list of all ranks' states, on every rank."""
        if self.size == 1:
            return state
        states: list[Any] = [None] * self.size
        dist.all_gather_object(states, state)
        return states

    def mine(self, states: Any) -> Any:
        """This rank's part of what `of_all` returned."""
        return states if self.size == 1 else states[self.rank]

    @property
    def _device(self) -> torch.device:
        assert self.accelerator is not None
        return self.accelerator.device


Watch = Callable[[Iterable[Any]], Iterable[Any]]
_Joined = tuple[dict[Level, float], dict[Level, int], int]


def launched() -> int:
    """Processes that the environment announces, as torchrun, accelerate and MPI do."""
    return next((int(os.environ[name]) for name in SIZES if os.environ.get(name)), 1)


def first_process() -> bool:
    """Whether the environment makes this process the first, or the only one, of those launched."""
    return launched() == 1 or next((int(os.environ[name]) for name in RANKS if os.environ.get(name)), 0) == 0


def refuse_distributed(model: nn.Module) -> None:
    """Raise ValueError for a network that somebody has prepared for several ranks: the Trainer does that itself."""
    if isinstance(model, DataParallel | DistributedDataParallel):
        raise ValueError(
            f"Trainer: the model is wrapped in {type(model).__name__}, which the Trainer does itself where there are "
            "several ranks; give it the network inside, model.module"
        )
    if is_sharded(model):
        raise ValueError(
            "Trainer: the model's parameters are sharded over ranks (FSDP), and the Trainer keeps the whole network on "
            "every rank; give it the network as it is before sharding, or train the sharded one in a loop of your own "
            "with joint_backward, as docs/distributed.md shows"
        )


def _accelerator() -> Accelerator:
    if importlib.util.find_spec("accelerate") is None:
        raise ImportError(
            f"Trainer: {launched()} processes were launched, and accelerate is not installed: "
            'pip install "bitstrata[distributed]"'
        )
    from accelerate import Accelerator, DistributedDataParallelKwargs

    # An objective that runs one precision a step leaves the parameters of the others without gradient.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(cpu=not torch.accelerator.is_available(), kwargs_handlers=[unused])


def _check(accelerator: Accelerator) -> None:
    kind = accelerator.distributed_type.value
    if kind not in SUPPORTED:
        raise ValueError(
            f"Trainer: accelerate runs with {kind}, and the Trainer with whole networks on every rank (DDP); for "
            "sharded ones write the loop yourself, with joint_backward, as docs/distributed.md shows"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"Trainer: accelerate's gradient_accumulation_steps={accelerator.gradient_accumulation_steps} is void "
            "here; use a larger batch_size"
        )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(
            f"Trainer: accelerate's mixed_precision={accelerator.mixed_precision!r} is not supported; leave it out and "
            'give TrainConfig(amp="bf16")'
        )
