"""Attention and embeddings in integers, and models made of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_integer import NEAREST, gauss, leaf, same
from torch import Tensor, nn

from bitstrata.integer import CounterGenerator, IntegerRule, LayerState, integer_linear
from bitstrata.nn import IntegerEmbedding, IntegerMultiheadAttention, IntegerRNN, to_integer
from bitstrata.nn import integer_layers as shared
from bitstrata.nn.integer_layers import STREAMS_A_LAYER
from bitstrata.prepare.integer_training import (
    integer_,
    integer_layers,
    load_noise_state_,
    noise_state,
    saved_memory,
)

EIGHT = IntegerRule(w=8, a=8, g=8)
QUERIES, KEYS, BATCH, WIDTH, HEADS = 4, 6, 3, 8, 2


@pytest.fixture
def float_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in float, so that everything around them can be held against torch's."""
    monkeypatch.setattr(shared, "integer_linear", lambda x, w, b, **_: F.linear(x, w, b))


def pair(rule: IntegerRule | None = None, **options: Any) -> tuple[nn.MultiheadAttention, Any]:
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(WIDTH, HEADS, **options).double()
    with torch.no_grad():
        for p in plain.parameters():
            p.copy_(torch.randn_like(p) / 2)
    return plain, to_integer(copy.deepcopy(plain), rule, seed=7, index=2)


def inputs(plain: nn.MultiheadAttention, share: str, batched: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value; `share` has a letter for each, equal ones for one tensor."""
    made: dict[str, Tensor] = {}
    for position, letter in enumerate(share):
        width = (plain.embed_dim, plain.kdim, plain.vdim)[position]
        steps = QUERIES if letter == "q" else KEYS
        shape = (steps, width) if not batched else (BATCH, steps, width) if plain.batch_first else (steps, BATCH, width)
        if letter not in made:
            made[letter] = leaf(gauss(*shape, seed=position, axis=-1, dtype=torch.float64))
    q, k, v = (made[letter] for letter in share)
    return q, k, v


def everything(module: nn.Module, given: tuple[Tensor, ...], **options: Any) -> list[Tensor]:
    """Result, attention weights where there are any, and gradients of inputs and parameters."""
    results = [r for r in module(*given, **options) if r is not None]
    wanted = [*{id(x): x for x in given}.values(), *module.parameters()]
    loss = sum((r * gauss(*r.shape, seed=i, axis=-1, dtype=r.dtype)).sum() for i, r in enumerate(results))
    return [r.detach() for r in results] + list(torch.autograd.grad(loss, wanted))


def assert_same_network(ours: list[Tensor], torchs: list[Tensor]) -> None:
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


# --- around the products, torch's attention ---------------------------------------------------------------------------

MODULES: list[tuple[dict[str, Any], str]] = [
    ({}, "qqq"),
    ({"batch_first": True}, "qkk"),
    ({"batch_first": True, "bias": False}, "qkv"),
    ({"kdim": 5, "vdim": 7}, "qkv"),
    ({"kdim": 5, "vdim": 5, "bias": False, "batch_first": True}, "qkk"),
    ({"add_bias_kv": True, "add_zero_attn": True}, "qkk"),
    ({"add_bias_kv": True, "batch_first": True}, "qqk"),
    ({"add_zero_attn": True, "batch_first": True}, "qqq"),
]


@pytest.mark.parametrize(("options", "share"), MODULES)
@pytest.mark.parametrize("masks", ["none", "bool", "float", "heads", "padding", "both"])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.usefixtures("float_products")
def test_attention_is_torchs_around_the_products(
    options: dict[str, Any], share: str, masks: str, need_weights: bool
) -> None:
    plain, ours = pair(**options)
    share = share.replace("qqk", "kkv")  # the same tensor for query and key, and another of as many steps
    given = inputs(plain, share)
    queries, keys = (QUERIES if share[i] == "q" else KEYS for i in (0, 1))
    how: dict[str, Any] = {"need_weights": need_weights}
    generator = torch.Generator().manual_seed(3)
    if masks in ("bool", "both"):
        how["attn_mask"] = torch.rand(queries, keys, generator=generator) < 0.3
        how["attn_mask"][:, 0] = False
    elif masks == "float":
        how["attn_mask"] = torch.randn(queries, keys, generator=generator, dtype=torch.float64)
    elif masks == "heads":
        how["attn_mask"] = torch.randn(BATCH * HEADS, queries, keys, generator=generator, dtype=torch.float64)
    if masks in ("padding", "both"):
        how["key_padding_mask"] = torch.arange(keys) >= torch.tensor([[keys], [2], [1]])
    assert_same_network(everything(ours, given, **how), everything(plain, given, **how))
    how["average_attn_weights"] = False
    assert_same_network(everything(ours, given, **how), everything(plain, given, **how))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.usefixtures("float_products")
def test_one_sequence_without_a_batch(batch_first: bool) -> None:
    plain, ours = pair(batch_first=batch_first)
    given = inputs(plain, "qkk", batched=False)
    how = {"key_padding_mask": torch.arange(KEYS) > 3, "attn_mask": torch.arange(QUERIES)[:, None] < torch.arange(KEYS)}
    assert_same_network(everything(ours, given, **how), everything(plain, given, **how))


@pytest.mark.usefixtures("float_products")
def test_causal_hint_and_dropout() -> None:
    plain, ours = pair(dropout=0.4)
    given = inputs(plain, "qqq")
    mask = nn.Transformer.generate_square_subsequent_mask(QUERIES, dtype=torch.float64)
    plain.eval(), ours.eval()
    for need_weights in (False, True):
        how = {"attn_mask": mask, "is_causal": True, "need_weights": need_weights}
        assert_same_network(everything(ours, given, **how), everything(plain, given, **how))
    first, second = ours.train()(*given)[1], ours(*given)[1]
    assert not torch.equal(first, second)
    undropped = ours.eval()(*given, average_attn_weights=False)[1]
    dropped = ours.train()(*given, average_attn_weights=False)[1]
    kept = dropped != 0
    assert 0 < int(kept.sum()) < kept.numel()
    torch.testing.assert_close(dropped[kept], undropped[kept] / 0.6)


# --- the products -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "share"), MODULES)
def test_eight_bits_are_close_to_float(options: dict[str, Any], share: str) -> None:
    plain, ours = pair(EIGHT, **options)
    given = inputs(plain, share.replace("qqk", "kkv"))
    first, second = everything(ours, given), everything(plain, given)
    for a, b in zip(first[2:], second[2:], strict=True):
        assert float((a - b).norm()) <= 0.05 * float(b.norm()) + 0.02  # key biases change no score: their gradient is 0
    for a, b in zip(first[:2], second[:2], strict=True):
        assert 0 < float((a - b).norm()) <= 0.04 * float(b.norm())


@pytest.mark.parametrize(
    ("options", "share", "products"),
    [
        ({}, "qqq", [("q_proj", 0, 3), ("out_proj", 3, 4)]),
        ({}, "qkk", [("q_proj", 0, 1), ("k_proj", 1, 3), ("out_proj", 3, 4)]),
        ({}, "kkv", [("q_proj", 0, 2), ("v_proj", 2, 3), ("out_proj", 3, 4)]),
        ({}, "kvk", [("q_proj", 0, 1), ("k_proj", 1, 2), ("v_proj", 2, 3), ("out_proj", 3, 4)]),
        ({"kdim": WIDTH, "vdim": 5}, "qkv", [("q_proj", 0, 1), ("k_proj", 1, 2), ("v_proj", 2, 3), ("out_proj", 3, 4)]),
    ],
)
def test_attention_is_a_composition_of_integer_products_to_the_bit(
    options: dict[str, Any], share: str, products: list[tuple[str, int, int]]
) -> None:
    _, ours = pair(IntegerRule(w=4, a=5, g=3), **options, batch_first=True)
    given = inputs(ours, share)
    first = everything(ours, given)
    separate = ours.in_proj_weight is None
    weights = [ours.q_proj_weight, ours.k_proj_weight, ours.v_proj_weight] if separate else ours.in_proj_weight.chunk(3)

    def composed(*given: Tensor) -> tuple[Tensor, Tensor]:
        parts: list[Tensor] = []
        for name, begin, end in products:
            stream = 2 * STREAMS_A_LAYER + ("q_proj", "k_proj", "v_proj", "out_proj").index(name) * STREAMS_A_LAYER // 4
            state = LayerState("mine", CounterGenerator(7, stream))
            if name == "out_proj":
                q, k, v = (p.unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in parts)
                scores = ((q * (WIDTH / HEADS) ** -0.5) @ k.transpose(-2, -1)).softmax(-1)
                x, weight, bias = (scores @ v).transpose(1, 2).flatten(2), ours.out_proj.weight, ours.out_proj.bias
                return integer_linear(x, weight, bias, rule=ours.rule, state=state), scores.mean(1)
            weight = torch.cat(list(weights[begin:end])) if end - begin > 1 else weights[begin]
            bias = torch.cat(ours.in_proj_bias.chunk(3)[begin:end])
            parts += integer_linear(given[begin], weight, bias, rule=ours.rule, state=state).chunk(end - begin, -1)
        raise AssertionError("no out-projection")

    assert list(ours.states) == ["q_proj", "k_proj", "v_proj", "out_proj"]
    drawn = [state.noise.stream % (STREAMS_A_LAYER // 4) for state in ours.states.values()]
    assert drawn == [int(name in {p[0] for p in products}) for name in ours.states]
    ours.forward = composed
    assert same(first, everything(ours, given))


def test_changing_class_keeps_parameters_and_keys() -> None:
    for options, _ in MODULES:
        plain = nn.MultiheadAttention(WIDTH, HEADS, **options)
        keys, parameters = list(plain.state_dict()), list(plain.parameters())
        ours = to_integer(plain, EIGHT)
        assert type(ours) is IntegerMultiheadAttention
        assert list(ours.state_dict()) == keys
        assert all(a is b for a, b in zip(ours.parameters(), parameters, strict=True))
        nn.MultiheadAttention(WIDTH, HEADS, **options).load_state_dict(ours.state_dict())
        assert repr(ours).startswith("IntegerMultiheadAttention(\n  w/a/g=8/8/8, groups=4")
    made = IntegerMultiheadAttention(WIDTH, HEADS, rule=NEAREST, seed=3, index=1, batch_first=True)
    assert made.rule is NEAREST
    assert made.states["q_proj"].noise.stream == STREAMS_A_LAYER


def test_autocast_has_no_effect_on_the_products() -> None:
    ours = to_integer(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), NEAREST)
    x = gauss(BATCH, KEYS, WIDTH, axis=-1)
    mask = torch.ones(KEYS, KEYS, dtype=torch.bool).triu(1)
    for need_weights in (False, True):
        with torch.no_grad():
            plain = ours(x, x, x, attn_mask=mask, need_weights=need_weights)[0]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                inside = ours(x, x, x, attn_mask=mask, need_weights=need_weights)[0]
        assert inside.dtype == torch.float32
        assert float((inside - plain).norm()) < 0.2 * float(plain.norm())


BAD: list[tuple[list[tuple[int, ...]], dict[str, Any], str]] = [
    ([(4, 3, 7)] * 3, {}, r"must be \(steps, batch, features\) .* 8, 8, 8 .* got \(4, 3, 7\), \(4, 3, 7\), "),
    ([(4, 3, 8), (6, 3, 8), (5, 3, 8)], {}, r"key and value of the same steps, got .*\(6, 3, 8\), \(5, 3, 8\)"),
    ([(4, 3, 8), (6, 2, 8), (6, 2, 8)], {}, r"got \(4, 3, 8\), \(6, 2, 8\), \(6, 2, 8\)"),
    ([(4, 8), (6, 3, 8), (6, 3, 8)], {}, r"got \(4, 8\), \(6, 3, 8\)"),
    ([(4, 3, 8)] * 3, {"is_causal": True}, "is_causal is a hint about attn_mask, which must be given"),
    ([(4, 3, 8)] * 3, {"key_padding_mask": torch.zeros(4, 3)}, r"key_padding_mask must be \(3, 4\), got \(4, 3\)"),
    ([(4, 8)] * 3, {"key_padding_mask": torch.zeros(1, 4)}, r"key_padding_mask must be \(4,\), got \(1, 4\)"),
    (
        [(4, 3, 8)] * 3,
        {"attn_mask": torch.zeros(3, 4, 4)},
        r"attn_mask must be \(4, 4\) or \(6, 4, 4\), got \(3, 4, 4\)",
    ),
    (
        [(4, 3, 8)] * 3,
        {"attn_mask": torch.zeros(4, 4, dtype=torch.int64)},
        r"attn_mask must be boolean or floating, got torch\.int64",
    ),
]


@pytest.mark.parametrize(("shapes", "how", "message"), BAD)
def test_arguments_that_do_not_fit(shapes: list[tuple[int, ...]], how: dict[str, Any], message: str) -> None:
    ours = to_integer(nn.MultiheadAttention(WIDTH, HEADS), name="attend")
    with pytest.raises(ValueError, match=f"IntegerMultiheadAttention 'attend': .*{message}"):
        ours(*(torch.zeros(shape) for shape in shapes), **how)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused() -> None:
    ours = to_integer(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), name="attend").eval()
    x = torch.nested.nested_tensor([torch.zeros(2, WIDTH), torch.zeros(3, WIDTH)])
    with pytest.raises(ValueError, match="IntegerMultiheadAttention 'attend': nested tensors have no integer form"):
        ours(x, x, x)


def test_a_query_without_keys_is_reported() -> None:
    ours = to_integer(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), name="attend")
    x, nothing = gauss(BATCH, KEYS, WIDTH, axis=-1), torch.ones(BATCH, KEYS, dtype=torch.bool)
    with pytest.raises(ValueError, match="'attend', out_proj: 144 of 144 elements of the activation"):
        ours(x, x, x, key_padding_mask=nothing)


# --- embeddings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_embedding_is_exact(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    plain = nn.Embedding(10, 4, **options)
    ours = to_integer(copy.deepcopy(plain))
    indices = torch.tensor([[1, 2, 2], [7, 1, 0]])
    g = gauss(2, 3, 4, axis=-1)
    for module in (plain, ours):
        module(indices).backward(g)
    assert type(ours) is IntegerEmbedding
    assert torch.equal(ours(indices), plain(indices))
    assert torch.equal(ours.weight.grad.to_dense(), plain.weight.grad.to_dense())
    assert not ours.states
    assert repr(ours) == repr(plain).replace("Embedding", "IntegerEmbedding")
    assert type(IntegerEmbedding(3, 2, rule=EIGHT, seed=1)) is IntegerEmbedding


class Words(nn.Module):
    """Embedding, attention, recurrence, and an output layer with the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, WIDTH)
        self.attend = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.memory = nn.RNN(WIDTH, WIDTH, batch_first=True)
        self.out = nn.Linear(WIDTH, 12, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, indices: Tensor) -> Tensor:
        x = self.embed(indices)
        x = x + self.attend(query=x, key=x, value=x, need_weights=False)[0]
        return self.out(x + self.memory(x)[0])


INDICES = torch.tensor([[1, 5, 5, 0], [11, 3, 2, 7]])


def words(**options: Any) -> Words:
    torch.manual_seed(0)
    model = Words()
    integer_(model, INDICES, **options)
    return model


def test_tied_weights_get_both_gradients() -> None:
    """The embedding's exact one and the output layer's from integers; torch's own order of the sum."""
    model = words()
    assert model.embed.weight is model.out.weight
    state = noise_state(model)
    g = gauss(2, 4, 12, axis=-1)
    model(INDICES).backward(g)
    tied = model.embed.weight.grad.clone()
    load_noise_state_(model, state)
    model.out.weight = nn.Parameter(model.embed.weight.detach().clone())
    model.embed.weight.grad = None
    model(INDICES).backward(g)
    torch.testing.assert_close(tied, model.embed.weight.grad + model.out.weight.grad, rtol=1e-6, atol=1e-7)
    assert bool((model.embed.weight.grad != 0).any())
    assert bool((model.out.weight.grad != 0).any())


# --- whole models -----------------------------------------------------------------------------------------------------


def test_models_of_all_kinds_are_converted() -> None:
    model = words(edge_bits=7)
    kinds = {name: type(layer) for name, layer in integer_layers(model).items()}
    assert kinds["embed"] is IntegerEmbedding
    assert kinds["attend"] is IntegerMultiheadAttention
    assert kinds["memory"] is IntegerRNN
    widths = {name: layer.rule.w for name, layer in integer_layers(model).items() if layer.multiplies}
    assert widths == {"attend": 7, "memory": 4, "out": 7}  # a lookup is no edge
    products = ["attend.q_proj", "attend.k_proj", "attend.v_proj", "attend.out_proj"]
    products += ["memory.weight_ih_l0", "memory.weight_hh_l0", "out"]
    assert list(noise_state(model)) == products


def test_resuming_continues_every_product_exactly() -> None:
    model = words()
    model(INDICES).square().mean().backward()
    state = copy.deepcopy((model.state_dict(), noise_state(model)))
    assert [entry["stream"] % (STREAMS_A_LAYER // 8) for entry in state[1].values()] == [1, 0, 0, 1, 1, 4, 1]
    other = words(seed=99)
    other.load_state_dict(state[0])
    load_noise_state_(other, state[1])
    gradients = []
    for net in (model, other):
        net.zero_grad()
        net(INDICES).square().mean().backward()
        gradients.append([p.grad for p in net.parameters()])
    assert same(*gradients)


def test_saved_memory_counts_all_kinds() -> None:
    torch.manual_seed(0)
    plain = saved_memory(Words(), INDICES)
    ours = saved_memory(words(w=4, a=4, g=4, edge_bits=4), INDICES)
    assert list(plain.layers) == list(ours.layers) == ["embed", "attend", "memory", "out"]
    assert [layer.float32 for layer in ours.layers.values()] == [8 * 8, 8 * 8 * 4, 8 * 8 * 4, 8 * 8 * 4]
    assert ours.layers["embed"].kept == plain.layers["embed"].kept == 8 * 8
    assert ours.layers["out"].kept == 8 * 8 // 2 + 2 + 4
    assert ours.layers["attend"].kept < plain.layers["attend"].kept
    assert ours.layers["memory"].kept > 0
    assert ours.total < plain.total


def test_models_without_a_product_and_embeddings_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="integer_: no layer to convert among 1 candidates"):
        integer_(nn.Sequential(nn.Embedding(3, 2)), torch.tensor([1]))
    model = Words()
    with torch.no_grad():
        model.attend.in_proj_weight[3, 2] = torch.inf
    with pytest.raises(ValueError, match="MultiheadAttention 'attend': 1 of 192 values of in_proj_weight are not fin"):
        integer_(model, INDICES)
    assert not integer_layers(model)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoders_with_padding_run_in_integers_in_evaluation_too(batch_first: bool, norm_first: bool) -> None:
    """In evaluation torch would take its fused path, with nested tensors; it must not be taken."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first, norm_first=norm_first)
    encoder = nn.TransformerEncoder(block, 2, enable_nested_tensor=not norm_first and batch_first)
    x = torch.randn(3, 5, 8) if batch_first else torch.randn(5, 3, 8)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [2]])
    plain = copy.deepcopy(encoder).eval()
    integer_(encoder.eval(), (x, None, padding), w=3, a=3, edge_bits=3)
    assert sum(type(layer) is IntegerMultiheadAttention for layer in integer_layers(encoder).values()) == 2
    with torch.no_grad():
        evaluated, trained = encoder(x, None, padding), encoder.train()(x, None, padding)
        torch.testing.assert_close(evaluated, trained)
        valid = ~padding if batch_first else ~padding.T
        assert not torch.allclose(evaluated[valid], plain(x, None, padding)[valid], atol=1e-2)


def test_a_whole_transformer_trains() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)
    source, target = torch.randn(4, 5, 8), torch.randn(4, 6, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    integer_(model, (source, target), w=6, a=6, g=6)
    attention = [n for n, layer in integer_layers(model).items() if type(layer) is IntegerMultiheadAttention]
    assert attention == ["encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.0.multihead_attn"]
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.mse_loss(model(source, target, tgt_mask=mask, tgt_is_causal=True), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    assert all(p.grad is not None for p in model.parameters())
