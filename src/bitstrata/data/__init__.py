"""Data sets in memory or on disk, batched augmentation and a loader whose position determines every later batch.

    train = load("cifar10", root, split="train")
    loader = Loader(train, 128, train=True, transform=Compose((RandomCrop(32, 4), RandomHorizontalFlip())), seed=0)
    for images, labels in loader.epoch(0): ...

Reading order: dataset, then the sources (digits, cifar, idx, folder), registry, transforms, loader.
"""

from .dataset import ArrayDataset, DataError, Dataset
from .folder import FolderDataset
from .loader import Loader
from .registry import Source, get, load, names
from .transforms import (
    CenterCrop,
    Compose,
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
    "Compose",
    "DataError",
    "Dataset",
    "FolderDataset",
    "Loader",
    "RandomCrop",
    "RandomHorizontalFlip",
    "RandomResizedCrop",
    "Resize",
    "Source",
    "Transform",
    "get",
    "load",
    "names",
    "normalize",
]
