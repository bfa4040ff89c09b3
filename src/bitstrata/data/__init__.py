"""Data sets in memory or on disk, batched augmentation and a loader whose position determines every later batch.

    train = load("cifar10", root, split="train")
    loader = Loader(train, 128, train=True, transform=Compose((RandomCrop(32, 4), RandomHorizontalFlip())), seed=0)
    for images, labels in loader.epoch(0): ...

Sequences and graphs have readers of their own, by function: `read_characters`, `read_ett`, `read_jodie`,
`read_parallel`. `from_pairs` takes a user's own (input, label) pairs.

Reading order: dataset, then the sources (digits, cifar, idx, folder, own), registry, transforms, loader; lines, then
text, timeseries, interactions, parallel.
"""

from .dataset import ArrayDataset, DataError, Dataset
from .folder import FolderDataset
from .interactions import Interactions, ranking, read_jodie, synthetic_interactions, write_jodie
from .loader import Loader
from .own import FloatDataset, from_pairs
from .parallel import ParallelCorpus, WordVocabulary, bleu, read_parallel
from .registry import Source, get, load, names
from .text import CharacterText, read_characters
from .timeseries import TimeSeries, normalized_deviation, normalized_rmse, read_ett
from .transforms import (
    CenterCrop,
    Compose,
    Part,
    RandomCrop,
    RandomHorizontalFlip,
    RandomResizedCrop,
    Resize,
    Transform,
    normalize,
)

__all__ = [
    "ArrayDataset",
    "CenterCrop",
    "CharacterText",
    "Compose",
    "DataError",
    "Dataset",
    "FloatDataset",
    "FolderDataset",
    "Interactions",
    "Loader",
    "ParallelCorpus",
    "Part",
    "RandomCrop",
    "RandomHorizontalFlip",
    "RandomResizedCrop",
    "Resize",
    "Source",
    "TimeSeries",
    "Transform",
    "WordVocabulary",
    "bleu",
    "from_pairs",
    "get",
    "load",
    "names",
    "normalize",
    "normalized_deviation",
    "normalized_rmse",
    "ranking",
    "read_characters",
    "read_ett",
    "read_jodie",
    "read_parallel",
    "synthetic_interactions",
    "write_jodie",
]
