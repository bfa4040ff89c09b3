"""Networks on sequences, patches and graphs: what they may see, what they learn of, and training them in integers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitstrata import data, integer_, zoo
from bitstrata.prepare.integer_training import integer_layers
from bitstrata.zoo.transformer import sinusoids
from bitstrata.zoo.vit import SelfAttention


def language_model(**options: Any) -> zoo.TransformerLM:
    torch.manual_seed(0)
    return zoo.TransformerLM(11, context=9, width=16, depth=2, heads=2, **options)


def translator(**options: Any) -> zoo.Seq2SeqTransformer:
    torch.manual_seed(0)
    return zoo.Seq2SeqTransformer(13, 11, width=16, depth=2, heads=2, **options)


def graph_network(**options: Any) -> zoo.TemporalGraphNetwork:
    torch.manual_seed(0)
    return zoo.TemporalGraphNetwork(9, 3, memory=8, time_width=4, width=8, neighbours=3, **options)


def events(count: int, start: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sources 0..4, destinations 5..8, ascending times, features."""
    random = torch.Generator().manual_seed(count)
    sources, destinations = (torch.randint(*ends, (count,), generator=random) for ends in ((0, 5), (5, 9)))
    times = start + torch.rand(count, generator=random, dtype=torch.float64).cumsum(0) * 60
    return sources, destinations, times, torch.randn(count, 3, generator=random)


def experienced(count: int = 20) -> zoo.TemporalGraphNetwork:
    """A network that saw that many events in batches of 5: memories are no longer zero."""
    model, log = graph_network(), events(count)
    for k in range(0, count, 5):
        model.observe(*(part[k : k + 5] for part in log))
    return model


def assert_all_reached(model: nn.Module) -> None:
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert not [name for name, g in gradients.items() if g is None or not g.isfinite().all() or not g.any()]


def test_self_attention_is_torchs() -> None:
    torch.manual_seed(0)
    mine, theirs = SelfAttention(12, 3), nn.MultiheadAttention(12, 3, batch_first=True)
    theirs.load_state_dict(
        {"in_proj_weight": mine.qkv.weight, "in_proj_bias": mine.qkv.bias}
        | {f"out_proj.{key}": value for key, value in mine.out.state_dict().items()}
    )
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(mine(x), theirs(x, x, x)[0])


def test_vit_sees_the_order_of_patches() -> None:
    torch.manual_seed(0)
    model = zoo.create("vit_cifar", width=12, depth=1).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert (model(x) - model(x.flip(3))).abs().max() > 1e-4
        model.positions.zero_()
        moved = x.roll(4, 3)  # by one patch: without positions, the same set of patches
        torch.testing.assert_close(model(moved), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_language_model_learns_and_sees_no_later_token(tied: bool) -> None:
    model = language_model(tied=tied)
    tokens = torch.randint(11, (3, 9), generator=torch.Generator().manual_seed(1))
    logits = model(tokens)
    assert logits.shape == (3, 9, 11)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    assert_all_reached(model)
    for place in range(9):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % 11
        with torch.no_grad():
            moved = (model(changed) - logits).abs().amax((0, 2))
        assert torch.equal(moved[:place], torch.zeros(place))
        assert (moved[place:] > 1e-6).all()
    assert torch.allclose(model(tokens[:, :4]), logits[:, :4], atol=1e-5)
    shared = model.head.weight is model.embedding.weight
    assert shared == tied
    assert sum(p.numel() for p in model.parameters()) == 9 * 16 + (1 if tied else 2) * 176 + 32 + 2 * 3_280


def test_translator_sees_the_past_of_the_target_and_no_padding() -> None:
    model = translator().eval()
    source, target = torch.tensor([[4, 5, 6, 2], [7, 2, 0, 0]]), torch.tensor([[1, 4, 5], [1, 6, 7]])
    logits = model(source, target)
    assert logits.shape == (2, 3, 11)
    changed = target.clone()
    changed[:, 2] = 9
    moved = (model(source, changed) - logits).abs().amax((0, 2))
    assert torch.equal(moved[:2], torch.zeros(2))
    assert moved[2] > 1e-6
    torch.testing.assert_close(model(source[1:, :2], target[1:]), logits[1:])  # padding has no part in it
    other = source.clone()
    other[0, 3] = 8  # the last word of the source reaches the first word of the target
    assert (model(other, target) - logits)[0, 0].abs().max() > 1e-6


def test_translator_gradients() -> None:
    model = translator(tied=False, dropout=0.0)
    source, target = torch.tensor([[4, 5, 6, 2], [7, 2, 0, 0]]), torch.tensor([[1, 4, 5], [1, 6, 7]])
    F.cross_entropy(model(source, target).flatten(0, 1), torch.tensor([4, 5, 2, 6, 7, 2])).backward()
    assert_all_reached(model)


def test_greedy_repeats_what_the_decoder_says() -> None:
    model = translator().eval()
    source = torch.tensor([[4, 5, 6, 2], [7, 2, 0, 0]])
    told = model.greedy(source, start=1, end=2, limit=6)
    assert told.shape[1] <= 6
    fed = torch.cat((torch.ones(2, 1, dtype=torch.int64), told), 1)
    with torch.no_grad():
        scores = model(source, fed)[:, :-1].clone()
    scores[..., 0] = -math.inf
    wanted = scores.argmax(2)
    for row, words in zip(told, wanted, strict=True):
        ends = (row == 2).nonzero()
        length = int(ends[0]) + 1 if len(ends) else len(row)
        assert torch.equal(row[:length], words[:length])
        assert not row[length:].any()
    with torch.no_grad():  # a model that always says "end"
        model.head.weight = nn.Parameter(torch.zeros(11, 16))
        model.decoder_norm.bias.fill_(1)
        model.head.weight[2] = 1
        model.decoder_norm.weight.zero_()
    assert torch.equal(model.greedy(source, 1, 2, 6), torch.tensor([[2], [2]]))


def test_translator_learns_to_copy() -> None:
    model = translator(dropout=0.0)
    random = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    ones = torch.ones(32, 1, dtype=torch.int64)
    for _ in range(150):
        words = torch.randint(3, 11, (32, 4), generator=random)
        source, target = torch.cat((words, 2 * ones), 1), torch.cat((ones, words), 1)
        loss = F.cross_entropy(model(source, target).flatten(0, 1), source.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    words = torch.randint(3, 11, (32, 4), generator=random)
    told = model.eval().greedy(torch.cat((words, 2 * ones), 1), 1, 2, 8)
    right = F.pad(told, (0, 8 - told.shape[1]))[:, :4] == words
    assert right.float().mean() > 0.9


def test_sinusoids() -> None:
    rows = sinusoids(3, 4)
    wanted = [[math.sin(t), math.cos(t), math.sin(t / 100), math.cos(t / 100)] for t in range(3)]
    torch.testing.assert_close(rows, torch.tensor(wanted))


def test_forecaster() -> None:
    torch.manual_seed(0)
    model = zoo.LSTMForecaster(3, 4, hidden=8, layers=2)
    window = torch.randn(5, 6, 3)
    forecast = model(window)
    assert forecast.shape == (5, 4, 3)
    forecast.square().mean().backward()
    assert_all_reached(model)
    for base, added in (("zero", 0 * window[:, :1]), ("last", window[:, 5:]), ("repeat", window[:, 2:])):
        other = zoo.LSTMForecaster(3, 4, hidden=8, layers=2, base=base)
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(other(window) - added, forecast - window[:, 5:])
    early = window.clone()
    early[:, 0] += 1  # the first row of the window counts too
    assert (model(early) - forecast).abs().max() > 1e-7


def test_graph_network_gradients_reach_the_updater() -> None:
    model = experienced()
    later = events(6, start=float(model.now))
    positive, negative = model(later[0], later[1], later[1].flip(0), later[2])
    assert positive.shape == negative.shape == (6,)
    (F.softplus(-positive).mean() + F.softplus(negative).square().mean()).backward()
    assert_all_reached(model)


def test_graph_network_predicts_before_it_learns() -> None:
    """Scores of a batch depend on nothing that happens in it or after it, and forward changes no state."""
    model = experienced().eval()
    now = float(model.now)
    sources, destinations, times, features = events(6, start=now)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad():
        scores = model(sources, destinations, destinations.flip(0), times)
        assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
        one = model(sources[:1], destinations[:1], destinations.flip(0)[:1], times[:1])
        torch.testing.assert_close(one[0], scores[0][:1])  # nothing of the batch's other interactions
        model.observe(sources, destinations, times, features)
        after = model(sources[:1], destinations[:1], destinations[:1], times[-1:])
    assert (after[0] - scores[0][:1]).abs() > 1e-6


def test_memory_updates_come_from_the_past_alone() -> None:
    """An interaction leaves a message; the memory changes when the node's next interaction is observed."""
    model = graph_network()
    model.observe(*(torch.tensor(v) for v in ([0], [5], [10.0])), torch.ones(1, 3))
    assert not model.memory.any()
    assert model.waiting.nonzero().flatten().tolist() == [0, 5]
    model.observe(*(torch.tensor(v) for v in ([0], [6], [20.0])), torch.zeros(1, 3))
    assert model.memory.any(1).nonzero().flatten().tolist() == [0]
    assert model.updated.tolist()[0] == 10.0
    span = model.time(torch.tensor([10.0]))
    message = torch.cat((torch.zeros(1, 16), torch.ones(1, 3), span), 1)  # both memories, features, time
    torch.testing.assert_close(model.memory[:1], model.updater(message, torch.zeros(1, 8)).detach())
    remembered = model.memory.clone()
    model.observe(*(torch.tensor(v) for v in ([2], [7], [20.0])), torch.ones(1, 3))
    assert torch.equal(model.memory, remembered)


def test_last_message_of_a_batch_counts_and_latest_neighbours_stay() -> None:
    model = graph_network()
    sources, times = torch.zeros(5, dtype=torch.int64), torch.arange(5.0)
    model.observe(sources, torch.tensor([5, 6, 7, 8, 5]), times, times[:, None].repeat(1, 3))
    assert (int(model.other[0]), float(model.event_time[0]), model.event_features[0].tolist()) == (5, 4.0, [4.0] * 3)
    assert (int(model.other[6]), float(model.event_time[6])) == (0, 1.0)
    assert sorted(zip(model.near[0].tolist(), model.near_time[0].tolist(), strict=True)) == [
        (5, 4.0),
        (7, 2.0),
        (8, 3.0),
    ]
    assert model.near_features[0, :, 0].tolist() == model.near_time[0].tolist()
    assert model.written.tolist() == [5, 0, 0, 0, 0, 2, 1, 1, 1]
    model.observe(torch.tensor([0]), torch.tensor([6]), torch.tensor([9.0]), torch.ones(1, 3))
    assert sorted(model.near[0].tolist()) == [5, 6, 8]  # the oldest of three gave way


def test_one_batch_or_many_give_the_same_neighbours() -> None:
    whole, pieces = graph_network(), graph_network()
    batch = events(30)
    whole.observe(*batch)
    for k in range(0, 30, 7):
        pieces.observe(*(part[k : k + 7] for part in batch))
    for name in ("near", "near_time", "near_features", "written", "event_time", "other", "now"):
        assert torch.equal(getattr(whole, name), getattr(pieces, name)), name


def test_absent_neighbours_have_no_part() -> None:
    model = graph_network().eval()
    model.observe(*events(3))
    nodes, times = torch.arange(9), torch.full((9,), 1e4, dtype=torch.float64)
    wanted = model.embed(nodes, times)
    free = torch.arange(3) >= model.written[:, None]
    model.near[free], model.near_time[free], model.near_features[free] = 4, 77.0, 1e3
    torch.testing.assert_close(model.embed(nodes, times), wanted)


def test_reset_forgets() -> None:
    model, fresh = experienced(), graph_network()
    model.reset()
    state = fresh.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: zoo.create("vit_cifar", patch=5), "32 pixels do not divide into patches of 5"),
        (lambda: zoo.create("vit_cifar", heads=5), "width 192 is no multiple of 5 heads"),
        (lambda: zoo.create("vit_cifar", depth=0), "depth must be positive, got 0"),
        (lambda: language_model()(torch.zeros(1, 10, dtype=torch.int64)), r"T in 1\.\.9, got \(1, 10\)"),
        (lambda: zoo.TransformerLM(5, width=10, heads=3), "TransformerLM: width 10 is no multiple of 3 heads"),
        (lambda: zoo.Seq2SeqTransformer(5, 5, width=9, heads=3), "width must be even for sinusoidal positions, got 9"),
        (lambda: translator()(torch.ones(2, 3), torch.ones(1, 3)), r"got \(2, 3\) and \(1, 3\)"),
        (lambda: translator().encode(torch.tensor([[1], [0]])), "source sentence 1 holds nothing but padding"),
        (lambda: translator().greedy(torch.ones(1, 1), 1, 2, 0), "limit must be at least 1, got 0"),
        (lambda: zoo.LSTMForecaster(3, 0), "LSTMForecaster: horizon must be positive, got 0"),
        (lambda: zoo.LSTMForecaster(3, 2)(torch.zeros(1, 4, 2)), r"must be \(B, T, 3\) with T >= 1, got \(1, 4, 2\)"),
        (lambda: zoo.LSTMForecaster(3, 2, base="mean"), "base must be 'last' or 'repeat' or 'zero', got 'mean'"),
        (lambda: zoo.LSTMForecaster(3, 2, base="repeat")(torch.zeros(1, 1, 3)), r"T >= 2, got \(1, 1, 3\)"),
        (lambda: graph_network(heads=3), "width 8 is no multiple of 3 heads"),
        (lambda: graph_network().observe(*events(4)[:3], torch.zeros(4, 2)), r"must be \(4, 3\), got \(4, 2\)"),
        (lambda: graph_network()(*events(4)[:2], events(3)[0], events(4)[2]), r"all be \(B,\), got .*\(3,\)"),
        (lambda: graph_network().observe(events(4)[0] + 9, *events(4)[1:]), r"observe: node \d+ is outside 0\.\.8"),
        (
            lambda: graph_network().observe(*events(4)[:2], events(4)[2].flip(0), events(4)[3]),
            "times must ascend from the last one observed, -inf",
        ),
        (
            lambda: graph_network().observe(*events(4)[:2], events(4)[2] * torch.nan, events(4)[3]),
            "observe: times must be finite, got nan",
        ),
    ],
)
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_time_does_not_run_backwards_over_batches() -> None:
    model = graph_network()
    model.observe(*events(5, start=100.0))
    with pytest.raises(ValueError, match="times must ascend from the last one observed"):
        model(*events(5)[:2], events(5)[1], events(5)[2])


def vit_case() -> tuple[nn.Module, tuple[Any, ...], set[str]]:
    torch.manual_seed(0)
    return (
        zoo.create("vit_cifar", width=12, depth=1),
        (torch.randn(2, 3, 32, 32),),
        {"patches", "blocks.0.attention.qkv"},
    )


def lm_case() -> tuple[nn.Module, tuple[Any, ...], set[str]]:
    return (
        language_model(),
        (torch.arange(18).view(2, 9) % 11,),
        {"embedding", "blocks.0.attention", "blocks.0.feed.fc1", "head"},
    )


def translator_case() -> tuple[nn.Module, tuple[Any, ...], set[str]]:
    words = torch.tensor([[4, 5, 6, 2], [7, 2, 0, 0]])
    return (
        translator(dropout=0.0),
        (words, words),
        {"target_embedding", "decoder.0.cross", "encoder.0.feed.fc1", "head"},
    )


def lstm_case() -> tuple[nn.Module, tuple[Any, ...], set[str]]:
    torch.manual_seed(0)
    return zoo.LSTMForecaster(3, 4, hidden=8), (torch.randn(5, 6, 3),), {"lstm", "head"}


def graph_case() -> tuple[nn.Module, tuple[Any, ...], set[str]]:
    model = experienced()
    later = events(6, start=float(model.now))
    return model, (later[0], later[1], later[1].flip(0), later[2]), {"updater", "attention.key_value", "score2"}


@pytest.mark.parametrize("case", [vit_case, lm_case, translator_case, lstm_case, graph_case])
def test_training_in_integers(case: Any) -> None:
    """integer_ converts the layers, a step of training gives finite gradients to all and changes every weight."""
    model, inputs, expected = case()
    keys = set(model.state_dict())
    with torch.no_grad():
        floating = _joined(model.eval()(*inputs))
    integer_(model, inputs, w=8, a=8, g=8, seed=1)
    assert expected <= set(integer_layers(model))
    assert set(model.state_dict()) == keys
    with torch.no_grad():
        difference = _joined(model(*inputs)) - floating
    assert 0 < difference.abs().max() < 0.2 * floating.abs().max()  # 8 bits: near, and not the same
    model.train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    F.softplus(_joined(model(*inputs))).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    optimizer.step()
    same = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    assert same <= {"time.phase"}


def _joined(result: Any) -> Tensor:
    return torch.cat([part.flatten() for part in (result if isinstance(result, tuple) else (result,))])


def test_synthetic_links_are_learned() -> None:
    """A small network gets well above chance on made-up interactions, at the end of its third pass over them."""
    torch.manual_seed(0)
    log = data.synthetic_interactions(1500, users=60, items=24, features=4, topics=4, seed=3)
    model = zoo.TemporalGraphNetwork(log.nodes, 4, memory=16, time_width=8, width=16, neighbours=5)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    random, scores = torch.Generator().manual_seed(0), []
    for _ in range(3):
        model.reset()
        for rows in torch.arange(len(log)).split(50):
            users, items, times = log.users[rows], log.item_nodes[rows], log.times[rows]
            positive, negative = model(users, items, log.other_items(len(rows), random), times)
            loss = F.softplus(-positive).mean() + F.softplus(negative).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.observe(users, items, times, log.features[rows])
            scores.append((positive.detach(), negative.detach()))
    late = scores[-8:]
    area, _ = data.ranking(torch.cat([p for p, _ in late]), torch.cat([n for _, n in late]))
    assert area > 0.7, area
