"""Interactions of users and items in the order of time: JODIE's table, a synthetic source, measures of ranking."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from .dataset import DataError, require
from .lines import number, read_lines, whole

HEADER = "user_id,item_id,timestamp,state_label,comma_separated_list_of_features"


@dataclass(frozen=True, eq=False)
class Interactions:
    """Interactions, ascending in time.

    users, items: int64 (N,), each numbered from 0. times: float64 (N,), seconds.
    labels: int64 (N,), 0 or 1: the user's state changed. features: float32 (N, F).
    synthetic: drawn by a generator, and no observation of anything.
    """

    users: Tensor
    items: Tensor
    times: Tensor
    labels: Tensor
    features: Tensor
    synthetic: bool = False

    def __post_init__(self) -> None:
        n = len(self.times)
        shapes = [tuple(t.shape) for t in (self.users, self.items, self.times, self.labels)]
        if shapes != [(n,)] * 4 or self.features.dim() != 2 or len(self.features) != n:
            raise DataError(f"interactions: shapes disagree: {shapes}, features {tuple(self.features.shape)}")
        if n and (int(self.users.min()) < 0 or int(self.items.min()) < 0):
            raise DataError("interactions: users and items are numbered from 0")
        if not (bool(torch.isfinite(self.times).all()) and bool(torch.isfinite(self.features).all())):
            raise DataError("interactions: times and features must be finite")
        if bool((self.times.diff() < 0).any()):
            at = int((self.times.diff() < 0).nonzero()[0]) + 1
            raise DataError(f"interactions: time {float(self.times[at])} at {at} is earlier than the one before")

    def __len__(self) -> int:
        return len(self.times)

    @property
    def user_count(self) -> int:
        """Users are 0 .. user_count - 1."""
        return int(self.users.max()) + 1

    @property
    def item_count(self) -> int:
        """Items are 0 .. item_count - 1."""
        return int(self.items.max()) + 1

    @property
    def nodes(self) -> int:
        """Users and items as nodes of one graph: items follow the users."""
        return self.user_count + self.item_count

    @property
    def item_nodes(self) -> Tensor:
        """Node of each interaction's item, int64 (N,)."""
        return self.items + self.user_count

    def ends(self, valid_fraction: float = 0.15, test_fraction: float = 0.15) -> tuple[int, int, int]:
        """Where the training, validation and test part end, in the order of time (Rossi et al., 2020: 70/15/15 %)."""
        if min(valid_fraction, test_fraction) <= 0 or valid_fraction + test_fraction >= 1:
            raise ValueError(
                f"interactions: fractions must be positive and leave a training part, "
                f"got {valid_fraction} and {test_fraction}"
            )
        n = len(self)
        return n - round(n * (valid_fraction + test_fraction)), n - round(n * test_fraction), n

    def other_items(self, count: int, generator: Generator) -> Tensor:
        """`count` items at random, as nodes: what a link predictor has to tell from the true ones."""
        return torch.randint(self.item_count, (count,), generator=generator) + self.user_count


def read_jodie(path: str | Path) -> Interactions:
    """Interactions from a table in JODIE's form, plain, .gz or .xz.

    A header, then `user,item,timestamp,state_label,feature,...` a line; the number of features is that of the first
    line and at least one; timestamps ascend.

    Source: Kumar et al., Predicting dynamic embedding trajectory in temporal interaction networks, 2019.

    Raises:
        DataError: with path and line, for a file that is absent, empty, or malformed.
    """
    path = Path(path)
    lines = read_lines(path)
    if len(lines) < 2 or not lines[0].startswith("user_id,item_id,"):
        raise DataError(f"{path}, line 1: expected a header {HEADER!r} and lines below, found {len(lines)} lines")
    columns = lines[1].count(",") + 1
    try:
        # The fast way; it takes what it should not (a nan), so the result is checked, and it tells no line.
        table = np.loadtxt(lines[1:], np.float64, delimiter=",", comments=None, ndmin=2)
        heads = table[:, (0, 1, 3)]
        sound = bool(np.isfinite(table).all()) and bool((heads >= 0).all()) and bool((heads == np.floor(heads)).all())
        sound = sound and columns >= 5 and len(table) == len(lines) - 1 and bool((table[:, 3] <= 1).all())
        sound = sound and bool((np.diff(table[:, 2]) >= 0).all()) and float(heads[:, :2].max()) < 2**53
    except (ValueError, IndexError):
        sound = False
    if not sound:
        table = _line_by_line(path, lines, columns)
    return _interactions(table)


def _line_by_line(path: Path, lines: list[str], columns: int) -> NDArray[np.float64]:
    """The table with every cell looked at, for the error's sake."""
    rows, time = [], -np.inf
    for index, line in enumerate(lines[1:], 2):
        where = f"{path}, line {index}"
        cells = line.split(",")
        if columns < 5 or len(cells) != columns:
            raise DataError(
                f"{where}: expected {max(columns, 5)} columns (user, item, timestamp, label, features), "
                f"found {len(cells)}"
            )
        user, item = whole(cells[0], where, "the user"), whole(cells[1], where, "the item")
        moment, label = number(cells[2], where, "the timestamp"), whole(cells[3], where, "the state label")
        if label > 1:
            raise DataError(f"{where}: the state label must be 0 or 1, found {cells[3]!r}")
        if moment < time:
            raise DataError(f"{where}: timestamp {cells[2]} is earlier than {time} in the line before")
        time = moment
        features = [number(cell, where, f"feature {k}") for k, cell in enumerate(cells[4:])]
        rows.append([float(user), float(item), moment, float(label), *features])
    return np.array(rows, np.float64)


def _interactions(table: NDArray[np.float64], synthetic: bool = False) -> Interactions:
    users, items, labels = (torch.from_numpy(table[:, k].astype(np.int64)) for k in (0, 1, 3))
    return Interactions(
        users,
        items,
        torch.from_numpy(table[:, 2].copy()),
        labels,
        torch.from_numpy(table[:, 4:].astype(np.float32)),
        synthetic,
    )


def write_jodie(path: str | Path, interactions: Interactions) -> None:
    """The table that `read_jodie` reads; times and features keep every bit of float64 and float32."""
    parts = (interactions.users, interactions.items, interactions.times, interactions.labels, interactions.features)
    columns = [part.tolist() for part in parts]
    with Path(path).open("w", encoding="utf-8", newline="\n") as file:
        file.write(f"{HEADER}\n")
        for user, item, time, label, features in zip(*columns, strict=True):
            file.write(f"{user},{item},{time!r},{label},{','.join(map(repr, features))}\n")


def synthetic_interactions(
    count: int = 10_000,
    *,
    users: int = 500,
    items: int = 100,
    features: int = 16,
    topics: int = 8,
    repeat: float = 0.6,
    drift: float = 0.02,
    seed: int = 0,
) -> Interactions:
    """Made-up interactions with something to learn in them. They show that a method runs, not how good it is.

    Each user prefers one of `topics`, each item belongs to one. Times are a Poisson process, one interaction a minute
    on average; busy users and popular items are drawn by Zipf weights 1 / rank. In an interaction the user's topic
    changes with probability `drift`, which is the state label; the user returns to the last item with probability
    `repeat` (not after a change), else draws an item of the topic. Features are a vector of the item's topic plus noise
    of the same size.

    Returns interactions with `synthetic` set, the same for equal arguments under every release of numpy.
    Raises ValueError for counts that are not positive, fewer items than topics, probabilities outside 0..1.
    """
    for name, value in (("count", count), ("users", users), ("features", features), ("topics", topics)):
        if value < 1:
            raise ValueError(f"synthetic_interactions: {name} must be positive, got {value}")
    if items < topics:
        raise ValueError(f"synthetic_interactions: {items} items cannot cover {topics} topics")
    for name, share in (("repeat", repeat), ("drift", drift)):
        if not 0 <= share <= 1:
            raise ValueError(f"synthetic_interactions: {name} must lie in 0..1, got {share}")
    random = np.random.RandomState(seed)
    centres = random.standard_normal((topics, features))
    item_topic = np.arange(items) % topics
    shares = 1 / np.arange(1, items + 1)
    ladders = []
    for topic in range(topics):
        members = np.flatnonzero(item_topic == topic)
        ladders.append((members, np.cumsum(shares[members]) / shares[members].sum()))
    busy = np.cumsum(1 / np.arange(1, users + 1))
    who = np.searchsorted(busy, random.random_sample(count) * busy[-1], side="right")
    moments = np.cumsum(random.exponential(60.0, count))
    draws = random.random_sample((count, 3))
    fresh = random.randint(topics, size=count)
    topic_of, last = random.randint(topics, size=users), np.full(users, -1)
    table = np.empty((count, 4 + features))
    for n, user in enumerate(who):
        changed = draws[n, 0] < drift
        if changed:
            topic_of[user] = fresh[n]
        if changed or last[user] < 0 or draws[n, 1] >= repeat:
            members, ladder = ladders[topic_of[user]]
            last[user] = members[min(int(np.searchsorted(ladder, draws[n, 2], side="right")), len(members) - 1)]
        table[n, :4] = user, last[user], moments[n], changed
    table[:, 4:] = centres[item_topic[table[:, 1].astype(np.int64)]] + random.standard_normal((count, features))
    return _interactions(table, synthetic=True)


def ranking(positive: Tensor, negative: Tensor) -> tuple[float, float]:
    """Area under the ROC curve and average precision of scores, any shapes, by scikit-learn.

    Raises ValueError for scores that are not finite or for none on one side.
    """
    if not positive.numel() or not negative.numel():
        raise ValueError(f"ranking: needs scores on both sides, got {positive.numel()} and {negative.numel()}")
    scores = torch.cat((positive.flatten(), negative.flatten())).double()
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("ranking: scores must be finite")
    truth = torch.cat((torch.ones(positive.numel()), torch.zeros(negative.numel()))).numpy()
    metrics = require("sklearn.metrics", "measuring a ranking")
    return float(metrics.roc_auc_score(truth, scores)), float(metrics.average_precision_score(truth, scores))
