"""LSTM, GRU and RNN in integers: torch's networks, with integer products in the place of float ones."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_integer import NEAREST, gauss, leaf, same
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from bitstrata import nn as integer_nn
from bitstrata.integer import CounterGenerator, IntegerRule, LayerState, integer_linear
from bitstrata.nn import integer_layers as shared
from bitstrata.nn import to_integer
from bitstrata.nn.integer_layers import STREAMS_A_LAYER
from bitstrata.prepare.integer_training import integer_, integer_layers, noise_state, saved_memory

EIGHT = IntegerRule(w=8, a=8, g=8)
STEPS, BATCH, IN, HIDDEN = 5, 4, 6, 5

LAYERS: list[tuple[type[nn.Module], dict[str, Any]]] = [
    (nn.LSTM, {}),
    (nn.LSTM, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    (nn.LSTM, {"num_layers": 2, "bidirectional": True, "proj_size": 3}),
    (nn.LSTM, {"bias": False, "proj_size": 2}),
    (nn.GRU, {}),
    (nn.GRU, {"num_layers": 3, "bias": False, "batch_first": True}),
    (nn.GRU, {"num_layers": 2, "bidirectional": True}),
    (nn.RNN, {"num_layers": 2}),
    (nn.RNN, {"nonlinearity": "relu", "bidirectional": True, "batch_first": True}),
]
CELLS: list[tuple[type[nn.Module], dict[str, Any]]] = [
    (nn.LSTMCell, {}),
    (nn.LSTMCell, {"bias": False}),
    (nn.GRUCell, {}),
    (nn.GRUCell, {"bias": False}),
    (nn.RNNCell, {}),
    (nn.RNNCell, {"nonlinearity": "relu", "bias": False}),
]


@pytest.fixture
def float_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in float, so that everything around them can be held against torch's."""
    monkeypatch.setattr(shared, "integer_linear", lambda x, w, b, **_: F.linear(x, w, b))


def pair(kind: type[nn.Module], rule: IntegerRule | None = None, **options: Any) -> tuple[nn.Module, Any]:
    """A float64 module and its integer form."""
    torch.manual_seed(0)
    plain = kind(IN, HIDDEN, **options).double()
    return plain, to_integer(copy.deepcopy(plain), rule, seed=7, index=3)


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, PackedSequence):
        return [value.data]
    return [value] if isinstance(value, Tensor) else [t for part in value for t in tensors(part)]


def everything(module: nn.Module, x: Any, hx: Any = None) -> list[Tensor]:
    """Results and the gradients of input, initial state and parameters, for fixed gradients of all results."""
    wanted = [*tensors(x), *(tensors(hx) if hx is not None else []), *module.parameters()]
    results = tensors(module(x) if hx is None else module(x, hx))
    weighted = [(r * gauss(*r.shape, seed=i, axis=-1, dtype=r.dtype)).sum() for i, r in enumerate(results)]
    return [r.detach() for r in results] + list(torch.autograd.grad(sum(weighted), wanted))


def sequence(options: dict[str, Any], batch: int = BATCH) -> Tensor:
    shape = (batch, STEPS, IN) if options.get("batch_first") else (STEPS, batch, IN)
    return leaf(gauss(*shape, axis=-1, dtype=torch.float64))


def initial(module: nn.Module, batch: int | None = BATCH) -> Any:
    count = module.num_layers * (2 if module.bidirectional else 1)
    shapes = [(count, module.proj_size or HIDDEN), (count, HIDDEN)]
    full = [(c, w) if batch is None else (c, batch, w) for c, w in shapes]
    h, c = (leaf(gauss(*shape, seed=9, axis=-1, dtype=torch.float64)) for shape in full)
    return (h, c) if module.mode == "LSTM" else h


def assert_same_network(ours: list[Tensor], torchs: list[Tensor]) -> None:
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# --- around the products, torch's networks ----------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), LAYERS)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.usefixtures("float_products")
def test_layers_are_torchs_around_the_products(kind: type[nn.Module], options: dict[str, Any], given: bool) -> None:
    plain, ours = pair(kind, **options)
    x, hx = sequence(options), initial(plain) if given else None
    assert_same_network(everything(ours, x, hx), everything(plain, x, hx))
    one = leaf(gauss(STEPS, IN, axis=-1, dtype=torch.float64))  # a sequence without a batch
    hx = initial(plain, None) if given else None
    assert_same_network(everything(ours, one, hx), everything(plain, one, hx))


@pytest.mark.parametrize(("kind", "options"), LAYERS)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.usefixtures("float_products")
def test_packed_sequences_are_torchs_around_the_products(
    kind: type[nn.Module], options: dict[str, Any], given: bool
) -> None:
    plain, ours = pair(kind, **options)
    hx = initial(plain) if given else None
    for lengths in ([2, 5, 1, 5], [4, 4, 4, 4], [1, 1, 3, 2]):
        packed = pack_padded_sequence(
            sequence(options).detach(), torch.tensor(lengths), bool(options.get("batch_first")), enforce_sorted=False
        )
        packed.data.requires_grad_()
        result = ours(packed, hx)[0]
        torchs = plain(packed, hx)[0]
        assert torch.equal(result.batch_sizes, torchs.batch_sizes)
        assert torch.equal(result.unsorted_indices, torchs.unsorted_indices)
        assert_same_network(everything(ours, packed, hx), everything(plain, packed, hx))


@pytest.mark.parametrize(("kind", "options"), CELLS)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.usefixtures("float_products")
def test_cells_are_torchs_around_the_products(kind: type[nn.Module], options: dict[str, Any], given: bool) -> None:
    plain, ours = pair(kind, **options)
    for shape in ((BATCH,), ()):
        x = leaf(gauss(*shape, IN, axis=-1, dtype=torch.float64))
        h, c = (leaf(gauss(*shape, HIDDEN, seed=s, axis=-1, dtype=torch.float64)) for s in (4, 5))
        hx = None if not given else (h, c) if kind is nn.LSTMCell else h
        assert_same_network(everything(ours, x, hx), everything(plain, x, hx))


@pytest.mark.usefixtures("float_products")
def test_dropout_lies_between_layers_in_training_only() -> None:
    plain, ours = pair(nn.LSTM, num_layers=2, dropout=0.5)
    x = sequence({})
    results = []
    for module in (plain, ours):
        torch.manual_seed(1)
        results.append(module(x)[0])
    torch.testing.assert_close(*results)  # torch draws the same mask
    assert not torch.allclose(ours(x)[0], results[1])
    torch.testing.assert_close(ours.eval()(x)[0], plain.eval()(x)[0])


# --- the products -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), LAYERS)
def test_eight_bits_are_close_to_float(kind: type[nn.Module], options: dict[str, Any]) -> None:
    plain, ours = pair(kind, EIGHT, **options)
    x, hx = sequence(options), initial(plain)
    for a, b in zip(everything(ours, x, hx), everything(plain, x, hx), strict=True):
        assert float((a - b).norm()) <= 0.04 * float(b.norm())
        assert not torch.equal(a, b)


@pytest.mark.parametrize(("kind", "options"), CELLS)
def test_cells_of_eight_bits_are_close_to_float(kind: type[nn.Module], options: dict[str, Any]) -> None:
    plain, ours = pair(kind, EIGHT, **options)
    x = leaf(gauss(BATCH, IN, axis=-1, dtype=torch.float64))
    for a, b in zip(everything(ours, x), everything(plain, x), strict=True):
        assert float((a - b).norm()) <= 0.04 * float(b.norm())


def product(module: Any, kind: str, tail: str, position: int, count: int) -> Any:
    """One product of a layer as a composition of its own, drawing where the layer's should."""
    start = 3 * STREAMS_A_LAYER + position * (STREAMS_A_LAYER // count)
    state = LayerState("mine", CounterGenerator(7, start))
    weight, bias = getattr(module, f"weight_{kind}_{tail}"), getattr(module, f"bias_{kind}_{tail}")
    return lambda x: integer_linear(x, weight, bias, rule=module.rule, state=state)


def test_lstm_is_a_composition_of_integer_products_to_the_bit() -> None:
    """The input's product on all steps at once, the hidden state's at each step; both directions."""
    _, ours = pair(nn.LSTM, IntegerRule(w=4, a=4, g=4), bidirectional=True)
    twin = copy.deepcopy(ours)
    outputs = []

    def composed(x: Tensor, hx: Any) -> Any:
        for direction, tail in enumerate(("l0", "l0_reverse")):
            from_input = product(twin, "ih", tail, 2 * direction, 4)(x)
            hidden = product(twin, "hh", tail, 2 * direction + 1, 4)
            h, c = hx[0][direction], hx[1][direction]
            steps = []
            for t in range(STEPS) if direction == 0 else reversed(range(STEPS)):
                i, f, g, o = (from_input[t] + hidden(h)).chunk(4, -1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                steps.append(h)
            outputs.append((steps if direction == 0 else steps[::-1], h, c))
        both = [torch.cat(parts, -1) for parts in zip(outputs[0][0], outputs[1][0], strict=True)]
        return torch.stack(both), (torch.stack((outputs[0][1], outputs[1][1])), torch.stack((outputs[0][2], c)))

    x, hx = sequence({}), initial(ours)
    first = everything(ours, x, hx)
    twin.forward = composed
    assert same(first, everything(twin, x, hx))


def test_gru_cell_is_a_composition_of_integer_products_to_the_bit() -> None:
    _, ours = pair(nn.GRUCell)
    x, h = (leaf(gauss(BATCH, n, seed=n, axis=-1, dtype=torch.float64)) for n in (IN, HIDDEN))
    first = everything(ours, x, h)
    streams = [3 * STREAMS_A_LAYER, 3 * STREAMS_A_LAYER + STREAMS_A_LAYER // 2]
    states = [LayerState("mine", CounterGenerator(7, stream)) for stream in streams]

    def composed(x: Tensor, h: Tensor) -> Tensor:
        a = integer_linear(x, ours.weight_ih, ours.bias_ih, rule=ours.rule, state=states[0]).chunk(3, -1)
        b = integer_linear(h, ours.weight_hh, ours.bias_hh, rule=ours.rule, state=states[1]).chunk(3, -1)
        z = (a[1] + b[1]).sigmoid()
        return (1 - z) * (a[2] + (a[0] + b[0]).sigmoid() * b[2]).tanh() + z * h

    ours.forward = composed
    assert same(first, everything(ours, x, h))


def test_a_packed_sequence_without_padding_is_the_padded_one_to_the_bit() -> None:
    _, ours = pair(nn.LSTM, num_layers=2, bidirectional=True)
    twin, x = copy.deepcopy(ours), sequence({}).detach()
    packed = pack_padded_sequence(x, torch.full((BATCH,), STEPS))
    packed.data.requires_grad_()
    padded = everything(ours, leaf(x))
    ours_packed = everything(twin, packed)
    padded[0], padded[3] = padded[0].flatten(0, 1), padded[3].flatten(0, 1)
    assert same(padded, ours_packed)
    output, lengths = pad_packed_sequence(twin.eval()(packed)[0])
    assert torch.equal(output, ours.eval()(x)[0])
    assert lengths.tolist() == [STEPS] * BATCH


def test_each_product_has_streams_of_its_own() -> None:
    _, ours = pair(nn.LSTM, num_layers=2, proj_size=3)
    names = [f"weight_{kind}_l{layer}" for layer in (0, 1) for kind in ("ih", "hh", "hr")]
    assert list(ours.states) == names
    begin = [state.noise.stream for state in ours.states.values()]
    share = STREAMS_A_LAYER // 6
    assert begin == [3 * STREAMS_A_LAYER + i * share for i in range(6)]
    everything(ours, sequence({}))
    drawn = [state.noise.stream - start for state, start in zip(ours.states.values(), begin, strict=True)]
    assert drawn == [1, STEPS, STEPS] * 2
    assert ours.states["weight_hr_l1"].name == "IntegerLSTM, weight_hr_l1"


def test_the_input_has_one_range_over_time_and_the_state_one_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = pair(nn.RNN, NEAREST)
    seen: list[tuple[int, ...]] = []

    def spy(x: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append(tuple(x.shape))
        return integer_linear(x, *args, **options)

    monkeypatch.setattr(shared, "integer_linear", spy)
    x = sequence({}).detach()
    small = ours(x)[0]
    x[-1] *= 1000
    large = ours(x)[0]
    assert seen == ([(STEPS * BATCH, IN)] + [(BATCH, HIDDEN)] * STEPS) * 2
    assert not torch.equal(small[0], large[0])  # the first step reads the range of all


# --- modules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), LAYERS + CELLS)
def test_changing_class_keeps_parameters_and_keys(kind: type[nn.Module], options: dict[str, Any]) -> None:
    plain = kind(IN, HIDDEN, **options)
    keys, parameters = list(plain.state_dict()), list(plain.parameters())
    ours = to_integer(plain)
    assert ours is plain
    assert type(ours) is getattr(integer_nn, f"Integer{kind.__name__}")
    assert list(ours.state_dict()) == keys
    assert all(a is b for a, b in zip(ours.parameters(), parameters, strict=True))
    kind(IN, HIDDEN, **options).load_state_dict(ours.state_dict())
    made = type(ours)(IN, HIDDEN, rule=EIGHT, seed=2, index=1, **options)
    assert list(made.state_dict()) == keys
    assert "w/a/g=8/8/8, groups=4" in repr(made)


@pytest.mark.parametrize(("kind", "options"), [LAYERS[2], CELLS[0]])
def test_copies_and_pickles_continue_with_the_same_draws(kind: type[nn.Module], options: dict[str, Any]) -> None:
    _, ours = pair(kind, **options)
    x = sequence(options) if kind is nn.LSTM else leaf(gauss(BATCH, IN, dtype=torch.float64))
    everything(ours, x)
    others = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]
    results = [everything(module, x) for module in (ours, *others)]
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_evaluation_draws_nothing() -> None:
    _, ours = pair(nn.GRU)
    ours.eval()
    x = sequence({})
    assert same(everything(ours, x), everything(ours, x))
    assert [state.noise.stream % (STREAMS_A_LAYER // 2) for state in ours.states.values()] == [0, 0]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_autocast_and_half_precision(kind: type[nn.Module]) -> None:
    ours = to_integer(kind(IN, HIDDEN), NEAREST)
    x = gauss(STEPS, BATCH, IN, axis=-1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ours(x)[0]
    assert torch.equal(inside, ours(x)[0])
    half = ours.to(torch.bfloat16)(x.bfloat16())[0]
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), inside, rtol=0, atol=0.2)


def test_an_lstm_learns_at_four_bits() -> None:
    """The mean of a sequence's last two elements, from 32 sequences: the error falls to a tenth."""
    torch.manual_seed(0)
    model = to_integer(nn.LSTM(1, 16), IntegerRule(w=4, a=4, g=4))
    head = nn.Linear(16, 1)
    x = torch.rand(6, 32, 1)
    target = x[-2:].mean(0)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], 0.02)
    losses = []
    for _ in range(120):
        optimizer.zero_grad()
        loss = F.mse_loss(head(model(x)[0][-1]), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert min(losses[-10:]) < losses[0] / 10


class Lines(nn.Module):
    """A stack of recurrent layers of which the first reads a packed sequence, and a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(IN, HIDDEN, bidirectional=True)
        self.second = nn.GRU(2 * HIDDEN, HIDDEN)
        self.cell = nn.GRUCell(HIDDEN, HIDDEN)
        self.out = nn.Linear(HIDDEN, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        _, h = self.second(self.first(packed)[0])
        return self.out(self.cell(hx=h[0], input=h[0].relu()))


def test_models_with_packed_sequences_are_converted() -> None:
    torch.manual_seed(0)
    model, example = Lines(), (torch.randn(STEPS, BATCH, IN), torch.tensor([3, 1, 5, 2]))
    memory = saved_memory(model, example)
    integer_(model, example, seed=4)
    widths = {name: (type(layer).__name__, layer.rule.a) for name, layer in integer_layers(model).items()}
    kinds = {"first": ("IntegerLSTM", 8), "second": ("IntegerGRU", 4)}
    assert widths == kinds | {"cell": ("IntegerGRUCell", 4), "out": ("IntegerLinear", 8)}
    model(*example).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    streams = [entry["stream"] % (1 << 37) for entry in noise_state(model).values()]
    assert streams == [1, STEPS, 1, STEPS, 1, STEPS, 1, 1, 1]
    ours = saved_memory(model, example)
    elements = 3 + 1 + 5 + 2
    assert ours.layers["first"].float32 == memory.layers["first"].float32 == 4 * elements * IN
    assert ours.layers["second"].float32 == 4 * elements * 2 * HIDDEN
    assert ours.layers["cell"].float32 == 2 * 4 * BATCH * HIDDEN


# --- bad input --------------------------------------------------------------------------------------------------------

BAD: list[tuple[type[nn.Module], Any, Any, str]] = [
    (nn.LSTM, (5, 4, 7), None, r"input must be \(steps, batch, 6\) or \(steps, 6\), got \(5, 4, 7\)"),
    (nn.GRU, (6,), None, r"input must be \(steps, batch, 6\) or \(steps, 6\), got \(6,\)"),
    (nn.LSTM, (0, 4, 6), None, r"input \(0, 4, 6\) has no steps"),
    (nn.LSTM, (5, 4, 6), [(1, 4, 5)], r"hx must be h0 and c0, each a Tensor, got \(Tensor\)"),
    (nn.LSTM, (5, 4, 6), [(1, 4, 5), (1, 3, 5)], r"c0 must be \(1, 4, 5\), got \(1, 3, 5\)"),
    (nn.GRU, (5, 4, 6), [(1, 4, 5), (1, 4, 5)], r"hx must be h0, each a Tensor, got \(Tensor, Tensor\)"),
    (nn.RNN, (5, 4, 6), [(2, 4, 5)], r"h0 must be \(1, 4, 5\), got \(2, 4, 5\)"),
    (nn.LSTMCell, (4, 5), None, r"input must be \(batch, 6\) or \(6,\), got \(4, 5\)"),
    (nn.LSTMCell, (4, 6), [(4, 5), (3, 5)], r"c0 must be \(4, 5\), got \(3, 5\)"),
    (nn.GRUCell, (2, 4, 6), None, r"input must be \(batch, 6\) or \(6,\), got \(2, 4, 6\)"),
    (nn.RNNCell, (4, 6), [(5,)], r"h0 must be \(4, 5\), got \(5,\)"),
]


@pytest.mark.parametrize(("kind", "shape", "states", "message"), BAD)
def test_shapes_that_do_not_fit(kind: type[nn.Module], shape: Any, states: Any, message: str) -> None:
    ours = to_integer(kind(IN, HIDDEN), name="memory")
    hx = None if states is None else tuple(torch.zeros(s) for s in states)
    hx = hx[0] if hx is not None and len(hx) == 1 else hx
    with pytest.raises(ValueError, match=f"Integer{kind.__name__} 'memory': {message}"):
        ours(torch.zeros(shape), hx)


def test_packed_sequences_that_do_not_fit() -> None:
    ours = to_integer(nn.GRU(IN, HIDDEN), name="memory")
    with pytest.raises(ValueError, match=r"data of a packed input must be \(elements, 6\), got \(20, 7\)"):
        ours(pack_padded_sequence(torch.zeros(5, 4, 7), torch.full((4,), 5)))
    packed = pack_padded_sequence(torch.zeros(5, 4, IN), torch.tensor([1, 5, 2, 3]), enforce_sorted=False)
    with pytest.raises(ValueError, match=r"h0 must be \(1, 4, 5\), got \(1, 5, 5\)"):
        ours(packed, torch.zeros(1, 5, 5))


@pytest.mark.parametrize(("where", "what"), [("input", "weight_ih_l0"), ("state", "weight_hh_l0")])
def test_errors_name_the_product(where: str, what: str) -> None:
    ours = to_integer(nn.GRU(IN, HIDDEN), name="memory")
    x, h = torch.zeros(STEPS, BATCH, IN), torch.zeros(1, BATCH, HIDDEN)
    (x if where == "input" else h)[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=f"IntegerGRU 'memory', {what}: 1 of .* elements of the activation"):
        ours(x, h)
