"""SAT's first rule of efficient training on a head of 1,024 classes: the next word of a text.

A row is a setting and a seed. Each is trained from scratch by the same steps; rows that are in the file of results are
not repeated, so the command can be given again after an interruption, and several processes can fill one file.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import re
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitstrata as bs
from bitstrata.cli.common import environment, write_json
from bitstrata.data.lines import read_text
from bitstrata.diagnostics import training_rules

CLASSES = 1024
FEW = 32
WORD = re.compile(r"[a-z]+(?:'[a-z]+)*|[^\sa-z]")  # words, and marks of punctuation one by one
RESCALES = {"clamped": None, "constant": "constant", "deviation": "stddev"}
Batch = tuple[Tensor, Tensor]
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What a row changes. rescale: a key of RESCALES, or None for float weights. rate: factor on the learning rate."""

    rescale: str | None = None
    bits: int | None = None
    classes: int = CLASSES
    rate: float = 1.0

    @property
    def name(self) -> str:
        words = ["float"] if self.rescale is None else [self.rescale, f"{self.bits} bits"]
        words += [f"{self.classes} classes"] if self.classes != CLASSES else []
        return ", ".join([*words, f"rate x {self.rate:g}"] if self.rate != 1 else words)


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting(),
        *(Setting(rescale, bits) for bits in (8, 4, 2) for rescale in RESCALES),
        Setting(classes=FEW),
        *(Setting(rescale, 4, FEW) for rescale in ("clamped", "constant")),
        *(
            Setting(rescale, rescale and 4, rate=rate)
            for rate in (0.3, 3.0)
            for rescale in (None, "clamped", "constant")
        ),
    )
}

#: Arguments that do not decide what a row holds.
FREE = ("data", "json", "only", "seeds", "quick")


@dataclass(frozen=True)
class Words:
    """Next-word prediction. context: int64 (N, C), words before, of 0..classes, where `classes` stands for all rarer
    ones; word: int64 (N,), the next one, of 0..classes - 1."""

    context: Tensor
    word: Tensor

    def __len__(self) -> int:
        return len(self.word)

    def batch(self, rows: Tensor | slice) -> Batch:
        return self.context[rows], self.word[rows]


def read_words(path: Path, classes: int, length: int) -> tuple[Words, Words]:
    """The first nine tenths of a text to train on and the rest: places whose next word is among the `classes` most
    frequent. Contexts know the CLASSES most frequent words, whatever `classes`. ValueError for a text of fewer words.
    """
    tokens = WORD.findall(read_text(path).lower())
    common = [word for word, _ in Counter(tokens).most_common(CLASSES)]
    if len(common) < CLASSES:
        raise ValueError(f"{path}: {len(common)} different words, but the head has {CLASSES} classes")
    index = {word: i for i, word in enumerate(common)}
    numbers = torch.tensor([index.get(token, CLASSES) for token in tokens])
    windows = numbers.unfold(0, length + 1, 1)
    split = len(windows) * 9 // 10
    parts = (windows[: split - length], windows[split:])  # no word in both
    kept = [part[part[:, -1] < classes] for part in parts]
    return Words(kept[0][:, :-1], kept[0][:, -1]), Words(kept[1][:, :-1], kept[1][:, -1])


def network(setting: Setting, args: argparse.Namespace, example: Tensor) -> nn.Module:
    """Embedded words side by side, two linear layers with batch normalization and ReLU, and the head.

    The head starts from N(0, 1/classes), as the paper's table of kappa_0 assumes (eq. S6). Its weight alone is
    quantized, so that rows differ in nothing else.
    """
    width, out = args.width, setting.classes
    model = nn.Sequential(
        nn.Embedding(CLASSES + 1, args.embedding), nn.Flatten(),
        nn.Linear(args.context * args.embedding, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(),
        nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(),
        nn.Linear(width, out),
    )  # fmt: skip
    head = model[-1]
    nn.init.normal_(head.weight, 0, out**-0.5)
    nn.init.zeros_(head.bias)
    if setting.rescale is not None and setting.bits is not None:
        recipe = bs.recipes.sat(setting.bits, None, rescale=RESCALES[setting.rescale], edges="inner")
        bs.quantize_(model, recipe, example, filter=lambda name, layer: layer is head)
    return model


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def train(model: nn.Module, words: Words, setting: Setting, seed: int, args: argparse.Namespace) -> list[float]:
    """SGD with Nesterov's momentum, the rate rising over a twentieth of the steps and falling as a cosine; losses."""
    random = torch.Generator().manual_seed(seed)
    count = len(words) // args.batch
    steps = min(args.steps or args.epochs * count, args.epochs * count)
    rise = max(1, steps // 20)
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr * setting.rate, momentum=0.9, nesterov=True, weight_decay=args.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    model.train()
    losses: list[float] = []
    while len(losses) < steps:
        for rows in torch.randperm(len(words), generator=random).split(args.batch)[: min(count, steps - len(losses))]:
            loss = loss_of(model, words.batch(rows))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def evaluate(model: nn.Module, words: Words) -> Row:
    """Mean cross entropy in nats, its exponential, and the share of next words that come first."""
    model.eval()
    loss, hits = 0.0, 0
    for rows in torch.arange(len(words)).split(2048):
        context, word = words.batch(rows)
        logits = model(context)
        loss += float(F.cross_entropy(logits, word, reduction="sum"))
        hits += int((logits.argmax(1) == word).sum())
    mean = loss / len(words)
    return {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "accuracy": 100 * hits / len(words)}


def diagnose(model: nn.Module, batch: Batch) -> Row:
    """Both rules, and what the head does to the softmax and to the gradients behind it, in training mode.

    head_scale: n^_L VAR of the head's weight, the factor by which eqs. 3 and 4 have the head enlarge the gradient
    variance behind it. gradient_ratio: variance of the gradient to the last hidden weight over that to the head's.
    logit_deviation, confidence: of the logits, and the mean largest probability.
    """
    rules = training_rules(model, loss_of, batch, training=True)
    layers = list(rules.layers.values())
    model.train()
    with torch.no_grad():
        logits = model(batch[0])
    head, before = layers[-1], layers[-2]
    return {
        "kappa0": rules.kappa0,
        "kappa1": [layer.kappa1 for layer in layers[:-1]],
        "gradient_variance": [layer.gradient for layer in layers],
        "head_scale": head.outputs * head.variance,
        "gradient_ratio": before.gradient / head.gradient,
        "loss": float(F.cross_entropy(logits, batch[1])),
        "logit_deviation": float(logits.std()),
        "confidence": float(logits.softmax(1).amax(1).mean()),
    }


def measure(setting: Setting, seed: int, args: argparse.Namespace) -> Row:
    """One row."""
    words, held = read_words(args.data, setting.classes, args.context)
    torch.manual_seed(seed)
    model = network(setting, args, words.context[:4])
    probe = words.batch(torch.randperm(len(words), generator=torch.Generator().manual_seed(1))[: args.probe])
    begin = time.process_time()
    start = diagnose(model, probe)
    losses = train(model, words, setting, seed, args)
    end = diagnose(model, probe)
    late = losses[-max(1, len(losses) // 20) :]
    return {
        "setting": setting.name, "seed": seed, **evaluate(model, held), "train_loss": statistics.mean(late),
        "steps": len(losses), "start": start, "end": end, "cpu_s": round(time.process_time() - begin, 1),
        "commit": environment()["commit"],
    }  # fmt: skip


COLUMNS = ("loss", "perplexity", "accuracy", "train_loss")
PROBED = ("kappa0", "head_scale", "gradient_ratio", "logit_deviation", "confidence")


def summary(rows: list[Row]) -> dict[str, Row]:
    """Setting -> number -> [mean, standard deviation of a sample] over seeds; of two moments, by "start kappa0"."""
    result: dict[str, Row] = {}
    for name in SETTINGS:
        mine = [row for row in rows if row["setting"] == name]
        columns = {column: [row[column] for row in mine] for column in COLUMNS}
        columns |= {f"{when} {p}": [row[when][p] for row in mine] for when in ("start", "end") for p in PROBED}
        if mine:
            result[name] = {"seeds": len(mine)} | {
                key: [statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0] for key, v in columns.items()
            }
    return result


def table(found: dict[str, Row]) -> str:
    """What `summary` found, as a table in Markdown."""
    head = ("setting", "κ₀, start → end", "n̂ VAR, start", "gradient ratio, start → end", "largest probability, start",
            "loss", "perplexity", "accuracy", "seeds")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, row in found.items():
        mean = {key: value[0] for key, value in row.items() if key != "seeds"}
        cells = (
            name, f"{mean['start kappa0']:.3g} → {mean['end kappa0']:.3g}", f"{mean['start head_scale']:.3g}",
            f"{mean['start gradient_ratio']:.3g} → {mean['end gradient_ratio']:.3g}",
            f"{mean['start confidence']:.3f}", f"{row['loss'][0]:.3f} ± {row['loss'][1]:.3f}",
            f"{mean['perplexity']:.1f}", f"{row['accuracy'][0]:.2f} ± {row['accuracy'][1]:.2f}", str(row["seeds"]),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a text, plain, .gz or .xz: Tiny Shakespeare")
    parser.add_argument("--json", type=Path, help="results; rows that are there already are not repeated")
    parser.add_argument("--only", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--steps", type=int, default=0, help="no more than these; 0: all of the epochs")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_argument("--weight-decay", type=float, default=4e-5)
    parser.add_argument("--context", type=int, default=4, help="words that the network sees")
    parser.add_argument("--embedding", type=int, default=32)
    parser.add_argument("--width", type=int, default=96, help="of the hidden layers: n_L of the head")
    parser.add_argument("--probe", type=int, default=1024, help="places that rules are measured on")
    parser.add_argument("--quick", action="store_true", help="4 steps and one seed: does it run?")
    args = parser.parse_args(given)
    if args.quick:
        args.steps, args.seeds, args.probe = 4, args.seeds[:1], 64
    return args


def earlier(path: Path | None, fixed: Row) -> list[Row]:
    """Rows of a file of results. Exits where they are of other arguments."""
    if path is None or not path.exists():
        return []
    found = json.loads(path.read_text())
    if found["arguments"] != fixed:
        raise SystemExit(f"{path} holds rows of other arguments, {found['arguments']}; now {fixed}")
    return found["rows"]


def keep(path: Path, fixed: Row, row: Row) -> None:
    """Add a row to the file, alone among processes."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = [*earlier(path, fixed), row]
        write_json(path, {"arguments": fixed, **environment(), "summary": summary(rows), "rows": rows})


def main(given: list[str] | None = None) -> None:
    """Run what is missing, one row after the other; write the file after each."""
    args = arguments(given)
    torch.set_num_threads(1)
    fixed = {name: value for name, value in vars(args).items() if name not in FREE}
    rows = []
    for seed in args.seeds:
        for name in args.only:
            if any(row["setting"] == name and row["seed"] == seed for row in earlier(args.json, fixed)):
                continue
            row = measure(SETTINGS[name], seed, args)
            rows.append(row)
            print(f"{name:28} seed {seed}  loss {row['loss']:.4f}  accuracy {row['accuracy']:.2f}  kappa0 "
                  f"{row['start']['kappa0']:.3g}  {row['cpu_s']} s", flush=True)  # fmt: skip
            if args.json:
                keep(args.json, fixed, row)
    print(table(summary(earlier(args.json, fixed) or rows)))


if __name__ == "__main__":
    main()
