"""The networks: shapes, parameter counts and names, traceability, and two that must learn."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from bitstrata import data, zoo

# classes, options, parameters; counts of the first five are published ones
COUNTS = [
    ("resnet20", 10, {}, 269_722),
    ("resnet18", 1000, {}, 11_689_512),
    ("mobilenet_v2", 1000, {}, 3_504_872),
    ("preact_resnet32", 100, {}, 472_564),
    ("preact_resnet20", 10, {}, 272_282),
    ("resnet32", 10, {}, 464_154),
    ("resnet44", 10, {}, 658_586),
    ("resnet56", 10, {}, 853_018),
    ("preact_resnet56", 10, {}, 855_578),
    ("resnet20", 10, {"shortcut": "B"}, 269_722 + 16 * 32 + 64 + 32 * 64 + 128),
    ("resnet18", 10, {"stem": "cifar"}, 11_173_962),
    ("digits_cnn", 10, {}, 15_418),
    ("digits_resnet", 10, {}, 20_666),
]


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "classes", "options", "count"), COUNTS)
def test_parameter_counts(name: str, classes: int, options: dict[str, object], count: int) -> None:
    assert parameters(zoo.create(name, classes, **options)) == count


def test_counts_cover_every_network() -> None:
    assert {name for name, *_ in COUNTS} == set(zoo.names())
    assert all(zoo.get(name).description and zoo.get(name).name == name for name in zoo.names())


SHAPES = [
    *((name, {}, zoo.get(name).input_shape) for name in zoo.names()),
    ("resnet20", {"shortcut": "B", "width": 5}, (3, 32, 32)),
    ("resnet18", {"stem": "cifar", "width": 8, "in_channels": 1}, (1, 32, 32)),
    ("mobilenet_v2", {"stem": "cifar", "width": 0.35}, (3, 32, 32)),
    ("digits_resnet", {"stages": 3, "blocks": 2, "shortcut": "A", "width": 4}, (1, 8, 8)),
    ("digits_cnn", {"width": 3, "in_channels": 2}, (2, 8, 8)),
]


@pytest.mark.parametrize(("name", "options", "shape"), SHAPES)
def test_shapes_and_tracing(name: str, options: dict[str, object], shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    model = zoo.create(name, 7, **options).eval()
    x = torch.randn(2, *shape)
    traced = fx.symbolic_trace(model)
    with torch.inference_mode():
        logits = model(x)
        assert logits.shape == (2, 7)
        assert torch.isfinite(logits).all()
        assert torch.equal(traced(x), logits)
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    weighted = [key for key, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert [calls.count(key) for key in weighted] == [1] * len(weighted)


def spatial(model: nn.Module, x: torch.Tensor, kind: type[nn.Module]) -> list[int]:
    """Heights of the outputs of all modules of a kind, in order of execution."""
    heights: list[int] = []
    for module in model.modules():
        if isinstance(module, kind):
            module.register_forward_hook(lambda _m, _i, out: heights.append(out.shape[2]))
    with torch.inference_mode():
        model.eval()(x)
    return heights


def test_small_stems_keep_resolution() -> None:
    x = torch.zeros(1, 3, 32, 32)
    heights = spatial(zoo.create("resnet18", stem="cifar", width=4), x, nn.Conv2d)
    assert (heights[0], heights[-1]) == (32, 4)
    heights = spatial(zoo.create("mobilenet_v2", stem="cifar", width=0.25), x, nn.Conv2d)
    assert (heights[0], heights[-1]) == (32, 4)
    heights = spatial(zoo.create("mobilenet_v2", width=0.25), torch.zeros(1, 3, 64, 64), nn.Conv2d)
    assert (heights[0], heights[-1]) == (32, 2)


@pytest.mark.parametrize(
    ("name", "options", "keys"),
    [
        ("resnet20", {}, "conv1.weight bn1.running_var layer1.0.conv1.weight layer3.2.bn2.bias linear.bias"),
        ("resnet20", {"shortcut": "B"}, "layer2.0.shortcut.0.weight layer2.0.shortcut.1.running_mean"),
        ("preact_resnet20", {}, "conv1.weight layer1.0.bn1.weight layer2.0.shortcut.weight bn.bias linear.weight"),
        ("resnet18", {}, "conv1.weight bn1.bias layer2.0.downsample.0.weight layer4.1.bn2.weight fc.bias"),
        (
            "mobilenet_v2",
            {},
            "features.0.0.weight features.1.conv.0.0.weight features.1.conv.1.weight features.2.conv.1.1.bias "
            "features.2.conv.2.weight features.17.conv.3.running_var features.18.1.weight classifier.1.bias",
        ),
    ],
)
def test_parameter_names(name: str, options: dict[str, object], keys: str) -> None:
    state = zoo.create(name, **options).state_dict()
    assert set(keys.split()) <= set(state)
    if name == "resnet20" and not options:
        assert not any("shortcut" in key for key in state)
        assert sum(not key.endswith("num_batches_tracked") for key in state) == 97
    if name == "mobilenet_v2":
        assert state["features.18.0.weight"].shape == (1280, 320, 1, 1)


def test_pad_shortcut() -> None:
    model = zoo.resnet20(width=4)
    x = torch.randn(2, 4, 5, 6)
    out = model.layer2[0].shortcut(x)  # type: ignore[index,union-attr]
    want = torch.zeros(2, 8, 3, 3)
    want[:, 2:6] = x[:, :, ::2, ::2]
    assert torch.equal(out, want)


def test_preact_shortcut_reads_the_activation() -> None:
    torch.manual_seed(0)
    block = zoo.preact_resnet20(width=4).layer2[0].eval()
    assert block.shortcut is not None
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(1, 4, 6, 6)
    assert torch.equal(block(x), block.shortcut(F.relu(block.bn1(x))))


def test_initialization() -> None:
    torch.manual_seed(0)
    model = zoo.resnet18()
    weight = model.layer4[1].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)
    assert model.fc.bias.abs().max() == 0
    torch.manual_seed(0)
    assert torch.equal(zoo.resnet18().fc.weight, model.fc.weight)


def test_errors_suggest() -> None:
    for call, message in (
        (lambda: zoo.create("mobilenet"), "unknown network 'mobilenet', did you mean 'mobilenet_v2'"),
        (lambda: zoo.create("resnet20", widht=8), "resnet20: unknown option 'widht', did you mean 'width'"),
        (lambda: zoo.create("resnet20", shortcut="C"), "shortcut must be 'A' or 'B', got 'C'"),
        (lambda: zoo.create("resnet20", width=7), "width must be even, got 7"),
        (lambda: zoo.create("resnet18", stem="tiny"), "stem must be 'imagenet' or 'cifar', got 'tiny'"),
        (lambda: zoo.create("mobilenet_v2", classes=0), "MobileNetV2: classes must be positive, got 0"),
        (lambda: zoo.create("digits_resnet", stages=4), "allows 1 to 3 stages, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("name", ["digits_cnn", "digits_resnet"])
def test_digits_networks_learn(name: str) -> None:
    """A short run; 30 epochs reach 98.7 % and more."""
    torch.manual_seed(0)
    train, test = data.load("digits"), data.load("digits", split="test")
    model = zoo.create(name)
    loader = data.Loader(train, 64, train=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=6 * len(loader))
    for epoch in range(6):
        for images, labels in loader.epoch(epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    images, labels = data.Loader(test, len(test), train=False).batch(0, 0)
    with torch.inference_mode():
        correct = (model.eval()(images).argmax(1) == labels).double().mean().item()
    assert correct > 0.96


@pytest.mark.skipif(
    not {"BITSTRATA_CIFAR10_ROOT", "BITSTRATA_RESNET20"} <= set(os.environ),
    reason="set BITSTRATA_CIFAR10_ROOT (a CIFAR-10 directory) and BITSTRATA_RESNET20 (a safetensors checkpoint)",
)
def test_public_checkpoint() -> None:
    """The public ResNet-20 checkpoint of Y. Idelbayev: 91.73 % on CIFAR-10's test images."""
    from safetensors.torch import load_file

    test = data.load(
        "cifar10", os.environ["BITSTRATA_CIFAR10_ROOT"], "test", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )
    model = zoo.resnet20()
    model.load_state_dict(load_file(os.environ["BITSTRATA_RESNET20"]), strict=True)
    model.eval()
    with torch.inference_mode():
        batches = data.Loader(test, 250, train=False).epoch(0)
        correct = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
    assert 100 * correct / len(test) == pytest.approx(91.73, abs=0.05)
