"""scikit-learn's bundled handwritten digits: 1,797 images of 8x8 pixels, 10 classes; nothing to download."""

from __future__ import annotations

import numpy as np
import torch

from .dataset import ArrayDataset, channel_statistics, require, stratified_split


def read_digits(split: str, *, test_fraction: float = 0.25, seed: int = 0) -> ArrayDataset:
    """Images uint8 (N, 1, 8, 8): the published values 0..16, scaled to round(value * 255 / 16).

    The published set has no split of its own, so a stratified one is drawn from `seed`. Mean and std are those of
    the training part, in both parts. Raises ImportError without scikit-learn, ValueError for a bad fraction.

    Source: UCI Optical Recognition of Handwritten Digits, test part, as in sklearn.datasets.load_digits.
    """
    bunch = require("sklearn.datasets", "the digits data set").load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = bunch.target.astype(np.int64)
    mean, std = channel_statistics(images[stratified_split(labels, test_fraction, seed, "train")])
    part = stratified_split(labels, test_fraction, seed, split)
    return ArrayDataset(
        images=torch.from_numpy(images[part]),
        labels=torch.from_numpy(labels[part]),
        classes=tuple(str(digit) for digit in range(10)),
        mean=mean,
        std=std,
        split=split,
    )
