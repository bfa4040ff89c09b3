"""Networks as users write them: what of torch's many ways to say a thing lowers, and how all that does not is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitstrata as bs
from bitstrata.lowering import LowerError, UnsupportedError

PIXELS = bs.Pixels((0.5,), (0.25,))


class Net(nn.Module):
    """Two convolutions and a linear layer; `ends` is what happens between them and behind the second."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        self.a = nn.Conv2d(1, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.b = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 3)
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        y = self.run(self, x)
        return y if labels is None else F.cross_entropy(y, labels)

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.b(F.relu(self.bn(self.a(x)))))


def prepared(model: nn.Module) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 1, 8, 8)
    bs.quantize_(model, bs.recipes.strata(w=(2, 4)), x, input=PIXELS)
    return bs.calibrate_(model, [x]).eval(), x


def skip_if_same(n: Any, x: Tensor) -> Tensor:
    x = F.relu(n.bn(n.a(x)))
    y = n.b(x)
    return n.fc(torch.add(x, y).mean((2, 3)) if y.shape == x.shape else y.mean((2, 3)))


def checked(n: Any, x: Tensor) -> Tensor:
    if x.dim() == 3:
        x = x.unsqueeze(1)
    assert len(x.shape) == 4, x.shape
    assert x.shape[1] == 1, "one channel"
    x = n.body(x)
    return n.fc(F.avg_pool2d(x, x.shape[-1]).reshape(len(x), x[0].numel() // 64))


FORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "shapes compared": skip_if_same,
    "shapes asserted": checked,
    "sizes unpacked": lambda n, x: n.fc(F.max_pool2d(n.body(x), x.size(-1)).view(x.size(0), -1)),
    "in place": lambda n, x: n.fc(n.body(x).add_(n.a(x)).relu_().mean(dim=[-2, -1])),
    "amax": lambda n, x: n.fc(n.body(x).amax((2, 3))),
    "adaptive max": lambda n, x: n.fc(torch.flatten(F.adaptive_max_pool2d(n.body(x), 1), 1)),
    "adaptive max module": lambda n, x: n.fc(n.pool(n.body(x)).amax((2, 3))),
    "dropout functions": lambda n, x: n.fc(F.alpha_dropout(torch.dropout(n.body(x), 0.5, n.training).mean((-1, -2)))),
}


@pytest.mark.parametrize("name", FORMS)
def test_ways_to_write_a_forward(name: str) -> None:
    model, x = prepared(Net(FORMS[name], pool=nn.AdaptiveMaxPool2d((2, 2))))
    report = bs.verify(model, bs.lower(model, x), torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8))
    assert report.ok, report


def test_a_branch_on_sizes_is_the_one_that_the_example_takes() -> None:
    model, x = prepared(
        Net(lambda n, x: n.fc(n.body(x).mean((2, 3))) if x.shape[-1] < 9 else n.fc(n.a(x).mean((2, 3))))
    )
    assert "b" in bs.lower(model, x).layers
    assert "b" not in bs.lower(model, torch.zeros(1, 1, 16, 16)).layers


def unsupported(n: Any, x: Tensor) -> Tensor:
    x = n.up(n.norm(n.act(n.bn(n.a(x)))))
    x = n.b(n.other(x)) * torch.sigmoid(x)
    return torch.softmax(n.fc(torch.cat([x, x], 1)[:, ::2].mean((2, 3))), 1)


def test_all_operations_without_an_integer_form_are_named_at_once() -> None:
    parts = {"act": nn.SiLU(), "other": nn.SiLU(), "norm": nn.GroupNorm(2, 4), "up": nn.Upsample(scale_factor=2)}
    model, x = prepared(Net(unsupported, **parts))
    with pytest.raises(UnsupportedError) as caught:
        bs.lower(model, x)
    text = str(caught.value)
    assert text.startswith(
        "lower: 7 operations of the model have no integer form:\n  (1) module 'act', module 'other' of "
    )
    for part in (
        "of type SiLU has no integer form; use nn.ReLU",
        "module 'norm' of type GroupNorm has no integer form; use batch normalization",
        "module 'up' of type Upsample has no integer form; programs do not enlarge maps",
        "'mul' in the model's forward has no integer form; products and quotients of two maps",
        "'cat' in the model's forward has no integer form; a layer that reads joined maps is the sum",
        "'softmax' in the model's forward has no integer form; leave it out of the network",
    ):
        assert part in text
    assert len(caught.value.problems) == 7


def test_what_only_follows_from_a_problem_is_not_named() -> None:
    model, x = prepared(Net(lambda n, x: n.fc(n.body((x - 0.5) / 0.5).mean((2, 3)))))
    with pytest.raises(
        UnsupportedError, match=r"leave it out of the forward and give quantize_ input=Pixels"
    ) as caught:
        bs.lower(model, x)
    assert len(caught.value.problems) == 1


class Scaled(nn.Conv2d):
    pass


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: Scaled(4, 4, 3), r"of type Scaled has no integer form; only Conv2d itself is quantized"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), r"remove_parametrizations"),
    ],
)
def test_layers_that_are_almost_quantizable(layer: Callable[[], nn.Module], message: str) -> None:
    model, x = prepared(Net(lambda n, x: n.fc(n.odd(n.body(x)).mean((2, 3))), odd=layer()))
    with pytest.raises(UnsupportedError, match=message):
        bs.lower(model, x)


def test_casts_in_the_forward() -> None:
    model, x = prepared(Net(lambda n, x: n.fc(n.body(x.float()).mean((2, 3)))))
    with pytest.raises(LowerError, match=r"lowering evaluates in float64: leave casts such as x\.float\(\)"):
        bs.lower(model, x)
