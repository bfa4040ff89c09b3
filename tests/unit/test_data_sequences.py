"""Texts, time series, interactions and parallel corpora: what is read, how it is cut, and what bad files say."""

from __future__ import annotations

import gzip
import lzma
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitstrata import data
from bitstrata.data.parallel import END, PADDING, START, UNKNOWN

HEADER = "user_id,item_id,timestamp,state_label,comma_separated_list_of_features\n"


def packed(path: Path, text: str | bytes) -> Path:
    """A file with that content, compressed as its name says."""
    content = text if isinstance(text, bytes) else text.encode()
    compress: Any = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.write_bytes(compress(content))
    return path


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- text


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.xz"])
def test_characters(tmp_path: Path, name: str) -> None:
    story = "to be, or not to be: ä\n" * 5
    text = data.read_characters(packed(tmp_path / name, story), valid_fraction=0.2)
    assert text.vocabulary == "".join(sorted(set(story)))
    assert text.decode(torch.cat((text.train, text.valid))) == story
    assert (len(text.train), len(text.valid)) == (92, 23)
    assert torch.equal(text.encode("not ä"), torch.tensor([text.vocabulary.index(c) for c in "not ä"]))


def test_windows_of_text(tmp_path: Path) -> None:
    text = data.read_characters(packed(tmp_path / "a.txt", "".join(map(chr, range(32, 122)))), valid_fraction=0.1)
    inputs, targets = text.windows("train", 500, 7, seeded(0))
    assert inputs.shape == targets.shape == (500, 7)
    assert torch.equal(inputs + 1, targets)  # every character is the one behind the last
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(7))
    assert (int(inputs.min()), int(targets.max())) == (0, 80)  # every start is drawn, none reaches the other part
    assert torch.equal(inputs, text.windows("train", 500, 7, seeded(0))[0])
    assert not torch.equal(inputs, text.windows("train", 500, 7, seeded(1))[0])
    held, told = text.spans("valid", 3)
    assert held.tolist() == [[81, 82, 83], [84, 85, 86]]
    assert torch.equal(told, held + 1)


def test_text_errors(tmp_path: Path) -> None:
    text = data.read_characters(packed(tmp_path / "a.txt", "ab" * 20))
    for make, kind, message in (
        (lambda: text.encode("abx"), data.DataError, "'x' is none of 2 characters"),
        (lambda: text.windows("test", 1, 2, seeded(0)), ValueError, "split must be 'train' or 'valid', got 'test'"),
        (
            lambda: text.windows("valid", 1, 4, seeded(0)),
            ValueError,
            "windows of 4 do not fit the 4 characters of",
        ),
        (lambda: text.spans("valid", 0), ValueError, "windows of 0 do not fit"),
        (lambda: data.read_characters(tmp_path / "a.txt", valid_fraction=1), ValueError, "between 0 and 1, got 1"),
        (lambda: data.read_characters(tmp_path / "none.txt"), data.DataError, "none.txt: cannot be read"),
        (lambda: data.read_characters(packed(tmp_path / "b", "abc")), data.DataError, "b: 3 characters are too few"),
        (
            lambda: data.read_characters(packed(tmp_path / "c", b"ok\nfine\n\xff")),
            data.DataError,
            "c, line 3: not UTF-8 at byte 8",
        ),
    ):
        with pytest.raises(kind, match=message):
            make()


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
@pytest.mark.parametrize("cut", [0, 3, 20, -4])
def test_truncated_compressed_files(tmp_path: Path, suffix: str, cut: int) -> None:
    path = packed(tmp_path / f"a{suffix}", "some text " * 50)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(data.DataError, match=rf"a{suffix}.*({suffix[1:]} file|too few)"):
        data.read_characters(path)


# --- time series


def table(rows: int = 20) -> str:
    lines = [f"2016-07-{day + 1:02},{day}.5,{-2 * day},3" for day in range(rows)]
    return "\n".join(("date,A,B,C", *lines)) + "\n"


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.csv.xz"])
def test_series(tmp_path: Path, name: str) -> None:
    series = data.read_ett(packed(tmp_path / name, table()))
    assert (series.names, series.ends, series.values.shape) == (("A", "B", "C"), (12, 16, 20), (20, 3))
    assert series.values[3].tolist() == [3.5, -6, 3]
    scaled = series.standardized().double()
    assert torch.allclose(scaled[:12].mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(scaled[:12].std(0, correction=0), torch.tensor([1.0, 1, 0], dtype=torch.float64), atol=1e-6)
    np.testing.assert_allclose(series.restored(series.standardized()), series.values, rtol=1e-6, atol=1e-5)


def test_carriage_returns_are_taken_off(tmp_path: Path) -> None:
    series = data.read_ett(packed(tmp_path / "a.csv", table().replace("\n", "\r\n")))
    assert (series.names[-1], series.values.shape) == ("C", (20, 3))


def test_standardization_knows_the_training_part_alone(tmp_path: Path) -> None:
    series = data.read_ett(packed(tmp_path / "a.csv", table()))
    changed = data.TimeSeries(np.concatenate((series.values[:12], series.values[12:] * 100)), series.names, series.ends)
    assert torch.equal(series.standardized()[:12], changed.standardized()[:12])


def test_windows_of_series(tmp_path: Path) -> None:
    series = data.read_ett(packed(tmp_path / "a.csv", table()), ends=(10, 14, 20))
    for part, first, last in (("train", 0, 5), ("valid", 7, 9), ("test", 11, 15)):
        starts = series.starts(part, 3, 2)
        assert starts.tolist() == list(range(first, last + 1))
        window, target = series.windows(starts, 3, 2)
        assert window.shape == (len(starts), 3, 3)
        assert target.shape == (len(starts), 2, 3)
        days = series.restored(target)[..., 0] - 0.5
        assert (days.min(), days.max()) == pytest.approx(
            (max(3, {"train": 0, "valid": 10, "test": 14}[part]), last + 4)
        )
    np.testing.assert_allclose(series.restored(window)[0, :, 0], [11.5, 12.5, 13.5], rtol=1e-6)


def test_measures_of_forecasts() -> None:
    forecast, actual = np.array([[1.0, 2.0], [3.0, -4.0]]), np.array([[2.0, 2.0], [0.0, -4.0]])
    assert data.normalized_deviation(forecast, actual) == 4 / 8
    assert data.normalized_rmse(forecast, actual) == pytest.approx((10 / 4) ** 0.5 / 2)
    assert data.normalized_deviation(actual, actual) == data.normalized_rmse(actual, actual) == 0
    with pytest.raises(ValueError, match=r"forecast \(1, 2\) and actual \(2, 2\) differ in shape"):
        data.normalized_rmse(forecast[:1], actual)
    with pytest.raises(ValueError, match=r"the mean of \|actual\| is 0 over 4 elements"):
        data.normalized_deviation(forecast, np.zeros((2, 2)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1: expected a header 'date,NAME,...', found ''"),
        ("nothing here\n1\n", "line 1: expected a header"),
        (table().replace("-2,3", "-2"), "line 3: expected 4 columns, found 3"),
        (table().replace("-2,3", "two,3"), "line 3: column 'B' must be a number, found 'two'"),
        (table().replace("-2,3", "nan,3"), "line 3: column 'B' must be finite, found 'nan'"),
        (table().replace("07-03", "07-02"), "line 4: date '2016-07-02' is not later than '2016-07-02'"),
        (table(4), "4 rows are too few"),
        (table() + "\n", "line 22: expected 4 columns, found 1"),
    ],
)
def test_series_errors(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(data.DataError, match=message) as raised:
        data.read_ett(packed(tmp_path / "bad.csv", content))
    assert str(tmp_path / "bad.csv") in str(raised.value)


def test_ends_and_windows_that_do_not_fit(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.csv", table())
    with pytest.raises(data.DataError, match=r"a.csv: time series: ends \(9, 9, 20\) do not ascend within 20 rows"):
        data.read_ett(path, ends=(9, 9, 20))
    with pytest.raises(data.DataError, match="ends must be three rows"):
        data.read_ett(path, ends=(9, 20))
    series = data.read_ett(path)
    with pytest.raises(ValueError, match=r"no window of 3 \+ 5 rows has its targets in part 'test'"):
        series.starts("test", 3, 5)
    with pytest.raises(ValueError, match="part must be one of train, valid, test, got 'all'"):
        series.starts("all", 3, 5)
    with pytest.raises(ValueError, match="length and horizon must be positive, got 0 and 5"):
        series.starts("test", 0, 5)


# --- interactions


@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz", "log.csv.xz"])
def test_interactions(tmp_path: Path, name: str) -> None:
    content = f"{HEADER}0,0,0.0,0,0.5,-1\n2,0,36.5,1,1e-3,2\n0,1,36.5,0,7,8\n"
    log = data.read_jodie(packed(tmp_path / name, content))
    assert log.users.tolist() == [0, 2, 0]
    assert log.items.tolist() == [0, 0, 1]
    assert log.times.tolist() == [0, 36.5, 36.5]
    assert log.labels.tolist() == [0, 1, 0]
    assert torch.equal(log.features, torch.tensor([[0.5, -1], [1e-3, 2], [7, 8]]))
    assert (log.user_count, log.item_count, log.nodes, log.item_nodes.tolist()) == (3, 2, 5, [3, 3, 4])
    assert not log.synthetic


def test_one_line_is_enough(tmp_path: Path) -> None:
    log = data.read_jodie(packed(tmp_path / "a", f"{HEADER}3,1,5,0,9"))
    assert (len(log), log.features.tolist()) == (1, [[9.0]])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "line 1: expected a header"),
        ("0,0,0,0\n", "line 2: expected 5 columns .*, found 4"),
        ("0,0,0,0,1\n0,0,1,0,1,2\n", "line 3: expected 5 columns .*, found 6"),
        ("0,0,0,0,1\n\n0,0,1,0,1\n", "line 3: expected 5 columns .*, found 1"),
        ("0,0,0,0,1\n-1,0,1,0,1\n", "line 3: the user must be a whole number of at least 0, found '-1'"),
        ("0,0,0,0,1\n0,1.5,1,0,1\n", "line 3: the item must be a whole number of at least 0, found '1.5'"),
        ("0,x,0,0,1\n", "line 2: the item must be a number, found 'x'"),
        ("0,0,0,2,1\n", "line 2: the state label must be 0 or 1, found '2'"),
        ("0,0,5,0,1\n0,0,4,0,1\n", "line 3: timestamp 4 is earlier than 5.0 in the line before"),
        ("0,0,inf,0,1\n", "line 2: the timestamp must be finite, found 'inf'"),
        ("0,0,0,0,1\n0,0,1,0,nan\n", "line 3: feature 0 must be finite, found 'nan'"),
        ("0,0,0,0,1\n0,0,1,0,\n", "line 3: feature 0 must be a number, found ''"),
        ("1e300,0,0,0,1\n", "line 2: the user must be a whole number"),
        ("0,0,0,0,1 # note\n", "line 2: feature 0 must be a number, found '1 # note'"),
    ],
)
def test_interactions_errors(tmp_path: Path, lines: str, message: str) -> None:
    with pytest.raises(data.DataError, match=message) as raised:
        data.read_jodie(packed(tmp_path / "bad.csv", HEADER + lines))
    assert str(tmp_path / "bad.csv") in str(raised.value)


def test_header_is_needed(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match="line 1: expected a header"):
        data.read_jodie(packed(tmp_path / "a", "0,0,0,0,1\n0,0,1,0,1\n"))


def test_synthetic_interactions_are_reproducible(tmp_path: Path) -> None:
    log, again, other = (data.synthetic_interactions(400, users=30, items=12, seed=seed) for seed in (5, 5, 6))
    for name in ("users", "items", "times", "labels", "features"):
        assert torch.equal(getattr(log, name), getattr(again, name))
        assert not torch.equal(getattr(log, name), getattr(other, name))
    assert log.synthetic
    # fixed numbers, so that a change of the generator is seen
    assert (log.users[:5].tolist(), log.items[:5].tolist()) == ([4, 1, 0, 1, 0], [0, 0, 4, 0, 4])
    data.write_jodie(tmp_path / "log.csv", log)
    read = data.read_jodie(tmp_path / "log.csv")
    for name in ("users", "items", "times", "labels", "features"):
        assert torch.equal(getattr(log, name), getattr(read, name))


def test_synthetic_interactions_follow_their_options() -> None:
    log = data.synthetic_interactions(3_000, users=20, items=16, topics=4, repeat=0.7, drift=0.05, seed=1)
    assert log.labels.double().mean() == pytest.approx(0.05, abs=0.015)
    assert log.times.diff().mean() == pytest.approx(60, rel=0.1)
    last: dict[int, int] = {}
    returns = []
    for user, item, label in zip(log.users.tolist(), log.items.tolist(), log.labels.tolist(), strict=True):
        if user in last and not label:
            returns.append(item == last[user])
        last[user] = item
    assert 0.7 < sum(returns) / len(returns) < 0.9  # a fresh draw meets the last item too
    same, apart = [], []
    for item in range(4):
        centre = log.features[log.items == item].mean(0)
        same.append((centre - log.features[log.items == item + 4].mean(0)).norm())
        apart.append((centre - log.features[log.items == (item + 1) % 4].mean(0)).norm())
    assert max(same) < min(apart)  # items 4 apart are of one topic
    still = data.synthetic_interactions(200, users=3, items=4, topics=2, repeat=1.0, drift=0.0, seed=1)
    assert all(len(set(still.items[still.users == user].tolist())) == 1 for user in range(3))


def test_parts_and_other_items() -> None:
    log = data.synthetic_interactions(1_000, users=30, items=12, seed=0)
    assert log.ends() == (700, 850, 1_000)
    assert log.ends(0.1, 0.2) == (700, 800, 1_000)
    others = log.other_items(2_000, seeded(0))
    assert others.unique().tolist() == [log.user_count + item for item in range(log.item_count)]
    with pytest.raises(ValueError, match=r"fractions must be positive .*, got 0\.5 and 0\.5"):
        log.ends(0.5, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count must be positive, got 0"),
        ({"items": 3, "topics": 4}, "3 items cannot cover 4 topics"),
        ({"repeat": 1.1}, r"repeat must lie in 0\.\.1, got 1\.1"),
    ],
)
def test_synthetic_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.synthetic_interactions(**options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"times": torch.tensor([1.0, 0.0])}, "time 0.0 at 1 is earlier"),
        ({"users": torch.tensor([0])}, "shapes disagree"),
        ({"items": torch.tensor([0, -1])}, "numbered from 0"),
        ({"features": torch.tensor([[1.0], [float("nan")]])}, "must be finite"),
    ],
)
def test_interactions_that_disagree(changes: dict[str, Any], message: str) -> None:
    zeros = torch.zeros(2, dtype=torch.int64)
    fields = {"users": zeros, "items": zeros, "times": torch.arange(2.0), "labels": zeros, "features": torch.ones(2, 1)}
    with pytest.raises(data.DataError, match=message):
        data.Interactions(**{**fields, **changes})


def test_ranking() -> None:
    area, precision = data.ranking(torch.tensor([0.9, 0.4]), torch.tensor([[0.5, 0.1]]))
    assert area == 0.75  # three of four pairs are in order
    assert precision == pytest.approx((1 + 2 / 3) / 2)
    with pytest.raises(ValueError, match="scores on both sides, got 0 and 1"):
        data.ranking(torch.zeros(0), torch.ones(1))
    with pytest.raises(ValueError, match="scores must be finite"):
        data.ranking(torch.tensor([float("inf")]), torch.ones(1))


# --- parallel corpora


def corpus(path: Path) -> data.ParallelCorpus:
    source = packed(path / "a.de.gz", "das haus\ndas kleine haus\nein haus\n")
    return data.read_parallel(source, packed(path / "a.en", "the house\nthe small house\na house\n"))


def test_vocabulary() -> None:
    words = data.WordVocabulary.build([["b", "a", "b"], ["c", "a", "<unk>"]])
    assert words.words == ("<pad>", "<s>", "</s>", "<unk>", "a", "b", "c")
    assert data.WordVocabulary.build([["b", "a", "b"], ["c"]], limit=1).words[4:] == ("b",)
    assert data.WordVocabulary.build([["b", "a", "b"], ["c"]], least=2).words[4:] == ("b",)
    tokens = words.encode([["a", "new", "c"], ["b"]], start=True)
    assert tokens.tolist() == [[START, 4, UNKNOWN, 6, END], [START, 5, END, PADDING, PADDING]]
    assert words.decode(tokens) == [["a", "<unk>", "c"], ["b"]]
    assert words.decode(torch.tensor([[4, END, 5], [4, 5, 6]])) == [["a"], ["a", "b", "c"]]
    assert words.encode([]).shape == (0, 0)
    assert words.encode([["</s>", "<pad>"]]).tolist() == [[UNKNOWN, UNKNOWN, END]]
    with pytest.raises(ValueError, match="limit and least must be at least 1, got 0 and 1"):
        data.WordVocabulary.build([], limit=0)


def test_pairs(tmp_path: Path) -> None:
    pairs = corpus(tmp_path)
    assert len(pairs) == 3
    assert pairs.source[1] == ("das", "kleine", "haus")
    german, english = (data.WordVocabulary.build(side) for side in (pairs.source, pairs.target))
    read, told, wanted = pairs.batch([1, 0], german, english)
    assert [german.decode(read), english.decode(told)] == [
        [["das", "kleine", "haus"], ["das", "haus"]],
        [["the", "small", "house"], ["the", "house"]],
    ]
    the, small, house = (english.words.index(word) for word in ("the", "small", "house"))
    assert told.tolist() == [[START, the, small, house], [START, the, house, PADDING]]
    assert wanted.tolist() == [[the, small, house, END], [the, house, END, PADDING]]
    with pytest.raises(IndexError):
        pairs.batch([3], german, english)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("a\nb\n", "a\n", "a.x has 2 lines but .*a.y 1: not aligned"),
        ("", "", "a.x: no lines"),
        ("a\n \n", "a\nb\n", "a.x, line 2: a sentence without words"),
        ("a\nb\n", "\nb\n", "a.y, line 1: a sentence without words"),
    ],
)
def test_pairs_that_disagree(tmp_path: Path, source: str, target: str, message: str) -> None:
    with pytest.raises(data.DataError, match=message):
        data.read_parallel(packed(tmp_path / "a.x", source), packed(tmp_path / "a.y", target))


def test_bleu() -> None:
    pytest.importorskip("sacrebleu")
    assert data.bleu(["the house is small indeed"], ["the house is small indeed"]) == pytest.approx(100)
    # 5 of 6 words, 3 of 5 pairs, 1 of 4 triples, and no four words in a row (counted as half of one of three)
    got = data.bleu(["the cat sat on a mat"], ["the cat lay on a mat"])
    assert got == pytest.approx(100 * (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25, rel=1e-6)
    with pytest.raises(ValueError, match="bleu: 1 hypotheses do not fit 2 references"):
        data.bleu(["a"], ["a", "b"])


def test_bleu_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ImportError, match=r"BLEU needs sacrebleu: pip install 'bitstrata\[tasks\]'"):
        data.bleu(["a"], ["a"])
