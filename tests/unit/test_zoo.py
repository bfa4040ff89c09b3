"""The networks: shapes, parameter names, gradients, traceability, errors, and two that must learn."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from bitstrata import data, zoo

PHOTO, SMALL = (3, 64, 64), (3, 32, 32)
VGG = {"width": 4, "hidden": 16}
EIGHTH = {"width": 0.125}

# what is built and fed; every network of the registry, narrow where it is large, and every option
SHAPES: list[tuple[str, dict[str, Any], tuple[int, int, int]]] = [
    ("digits_cnn", {}, (1, 8, 8)),
    ("digits_cnn", {"width": 3, "in_channels": 2}, (2, 8, 8)),
    ("digits_resnet", {}, (1, 8, 8)),
    ("digits_resnet", {"stages": 3, "blocks": 2, "shortcut": "A", "width": 4}, (1, 8, 8)),
    *((name, {}, SMALL) for name in ("resnet20", "resnet32", "resnet44", "resnet56")),
    ("resnet20", {"shortcut": "B", "width": 5, "head_std": 0.3}, SMALL),
    *((f"preact_resnet{depth}", {}, SMALL) for depth in (20, 32, 56)),
    ("preact_resnet20", {"proj_input": "raw", "width": 5}, SMALL),
    *((f"resnet{depth}", {"width": 8}, PHOTO) for depth in (18, 34, 50)),
    *((f"resnet{depth}", {"stem": "cifar", "width": 4, "in_channels": 1}, (1, 32, 32)) for depth in (18, 34, 50)),
    *(
        (f"preact_resnet{depth}", {"proj_input": source, "stem": stem, "width": 4}, shape)
        for depth in (18, 34, 50)
        for source in ("preact", "raw")
        for stem, shape in (("imagenet", PHOTO), ("cifar", SMALL))
    ),
    ("mobilenet_v1", EIGHTH, PHOTO),
    ("mobilenet_v1", {"stem": "cifar", "width": 0.25, "in_channels": 1}, (1, 32, 32)),
    ("mobilenet_v2", EIGHTH, PHOTO),
    ("mobilenet_v2", {"stem": "cifar", "width": 0.35}, SMALL),
    ("mobilenet_v2", {"relu6": False, **EIGHTH}, PHOTO),
    ("mobilenet_v2", {"first_expansion": True, **EIGHTH}, PHOTO),
    ("mobilenet_v2", {"conv_classifier": True, "dropout": 0.5, **EIGHTH}, PHOTO),
    ("vgg16_bn", VGG, PHOTO),
    ("vgg16_bn", {"dropout": 0.1, **VGG}, (3, 224, 224)),
    ("vgg16_bn", {"stem": "cifar", "width": 4, "in_channels": 1}, (1, 32, 32)),
    ("maqd_vgg", {"width": 4}, SMALL),
    ("maqd_vgg", {"width": 4, "norm": lambda channels: nn.GroupNorm(1, channels)}, SMALL),
    ("maqd_preact_resnet", {"width": 4}, SMALL),
    ("maqd_preact_resnet", {"width": 4, "stem": "literal", "final_act": False}, SMALL),
    ("maqd_preact_resnet", {"width": 4, "block_strides": [2, 2, 2, 2, 2, 1, 1, 1]}, SMALL),
    ("maqd_preact_resnet", {"width": 4, "shortcut_kernel": 3, "norm": nn.Identity}, SMALL),
    ("maqd_cnn9", {"width": 4}, SMALL),
    ("maqd_cnn9", {"width": 4, "norm": nn.InstanceNorm2d, "in_channels": 1}, (1, 32, 32)),
    ("vit_cifar", {}, SMALL),
    ("vit_cifar", {"width": 12, "depth": 2, "heads": 2, "hidden": 20, "patch": 8, "in_channels": 1}, (1, 32, 32)),
]


def named(case: Any) -> str | None:
    return case if isinstance(case, str) else "-".join(map(str, case)) if isinstance(case, tuple | dict) else None


def test_cases_cover_every_network_and_option() -> None:
    met: dict[str, set[str]] = {name: set() for name in zoo.names()}
    for name, options, _ in SHAPES:
        met[name] |= set(options)
    for name in ("resnet32", "resnet44", "resnet56"):  # the function of resnet20 with other numbers
        met[name] |= met["resnet20"]
    for name in ("preact_resnet32", "preact_resnet56"):
        met[name] |= met["preact_resnet20"]
    assert {name for name, *_ in SHAPES} == set(zoo.names())
    assert not {name: missing for name in zoo.names() if (missing := set(zoo.get(name).options) - met[name])}


@pytest.mark.parametrize(("name", "options", "shape"), SHAPES, ids=named)
def test_shapes_and_tracing(name: str, options: dict[str, Any], shape: tuple[int, int, int]) -> None:
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


def idle(model: nn.Module) -> set[str]:
    """Parameters that no logit depends on in training: a bias that the batch norm behind it takes off again."""
    if not isinstance(model, zoo.VGG):
        return set()
    return {f"features.{key}.bias" for key, m in model.features.named_children() if isinstance(m, nn.Conv2d)}


@pytest.mark.parametrize(("name", "options", "shape"), SHAPES, ids=named)
def test_gradients_reach_every_parameter(name: str, options: dict[str, Any], shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    model = zoo.create(name, 7, **options)
    F.cross_entropy(model(torch.randn(4, *shape)), torch.tensor([0, 2, 5, 6])).backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients.values())
    still = {key for key, gradient in gradients.items() if gradient is not None and not gradient.any()}
    assert still <= idle(model)


@pytest.mark.parametrize(
    ("name", "options", "keys"),
    [
        ("resnet20", {}, "conv1.weight bn1.running_var layer1.0.conv1.weight layer3.2.bn2.bias linear.bias"),
        ("resnet20", {"shortcut": "B"}, "layer2.0.shortcut.0.weight layer2.0.shortcut.1.running_mean"),
        ("preact_resnet20", {}, "conv1.weight layer1.0.bn1.weight layer2.0.shortcut.weight bn.bias linear.weight"),
        (
            "preact_resnet50",
            {},
            "bn1.weight layer1.0.conv3.weight layer1.0.shortcut.weight layer4.2.bn3.weight bn.bias",
        ),
        ("mobilenet_v1", {}, "features.0.0.weight features.1.0.1.bias features.13.1.0.weight classifier.bias"),
        ("maqd_vgg", {}, "features.0.weight features.1.weight output.0.weight output.1.bias"),
        ("maqd_preact_resnet", {}, "stem.weight blocks.7.shortcut.2.weight blocks.0.body.6.bias final.0.weight"),
    ],
)
def test_parameter_names(name: str, options: dict[str, object], keys: str) -> None:
    with torch.device("meta"):
        state = zoo.create(name, **options).state_dict()
    assert set(keys.split()) <= set(state)
    if name == "resnet20" and not options:
        assert not any("shortcut" in key for key in state)
        assert sum(not key.endswith("num_batches_tracked") for key in state) == 97


# tensors of torchvision's state_dict, and the start of the SHA-256 of its lines "name shape"
TORCHVISION = [
    ("resnet18", 122, "84fb10d9c6905a1c"),
    ("resnet34", 218, "28f9096d51307499"),
    ("resnet50", 320, "d7e4f8bb0a536344"),
    ("mobilenet_v2", 314, "37bbbce8932fd0c4"),
    ("vgg16_bn", 97, "347371586a8ea365"),
]


@pytest.mark.parametrize(("name", "tensors", "digest"), TORCHVISION)
def test_names_and_shapes_of_torchvision(name: str, tensors: int, digest: str) -> None:
    """So its checkpoints load."""
    with torch.device("meta"):
        state = zoo.create(name, 1000).state_dict()
    lines = "\n".join(f"{key} {tuple(tensor.shape)}" for key, tensor in state.items())
    assert len(state) == tensors
    assert hashlib.sha256(lines.encode()).hexdigest().startswith(digest), lines


def test_errors_suggest() -> None:
    for call, message in (
        (lambda: zoo.create("mobilenet2"), "unknown network 'mobilenet2', did you mean 'mobilenet_v2'"),
        (lambda: zoo.create("maqd_vgg", widht=8), "maqd_vgg: unknown option 'widht', did you mean 'width'"),
        (lambda: zoo.create("resnet20", widht=8), "resnet20: unknown option 'widht', did you mean 'width'"),
        (lambda: zoo.create("resnet20", shortcut="C"), "shortcut must be 'A' or 'B', got 'C'"),
        (lambda: zoo.create("resnet20", head_std=0.0), "head_std must be positive, got 0.0"),
        (lambda: zoo.create("resnet20", width=7), "width must be even, got 7"),
        (lambda: zoo.create("resnet18", stem="tiny"), "stem must be 'imagenet' or 'cifar', got 'tiny'"),
        (lambda: zoo.create("mobilenet_v2", classes=0), "MobileNetV2: classes must be positive, got 0"),
        (lambda: zoo.create("mobilenet_v1", width=-0.5), "MobileNetV1: width must be positive, got -0.5"),
        (
            lambda: zoo.create("mobilenet_v1", stem="tiny"),
            "MobileNetV1: stem must be 'imagenet' or 'cifar', got 'tiny'",
        ),
        (lambda: zoo.create("vgg16_bn", hidden=0), "VGG: hidden must be positive, got 0"),
        (lambda: zoo.create("vgg16_bn", stem=None), "VGG: stem must be 'imagenet' or 'cifar', got None"),
        (lambda: zoo.create("resnet50", width=0), "ResNet: width must be positive, got 0"),
        (lambda: zoo.create("preact_resnet18", stem=""), "PreActResNet: stem must be 'imagenet' or 'cifar', got ''"),
        (lambda: zoo.create("preact_resnet20", proj_input="bn"), "proj_input must be 'preact' or 'raw', got 'bn'"),
        (lambda: zoo.create("digits_resnet", stages=4), "allows 1 to 3 stages, got 4"),
        (lambda: zoo.create("maqd_vgg", width=0), "MaqdVgg: width must be positive, got 0"),
        (lambda: zoo.create("maqd_cnn9", classes=-1), "maqd_cnn9: classes must be positive, got -1"),
        (lambda: zoo.create("maqd_preact_resnet", in_channels=0), "MaqdPreActResNet: in_channels must be positive"),
        (lambda: zoo.create("maqd_preact_resnet", stem="cifar"), "stem must be 'conv' or 'literal', got 'cifar'"),
        (lambda: zoo.create("maqd_preact_resnet", shortcut_kernel=2), "shortcut_kernel must be 1 or 3, got 2"),
        (
            lambda: zoo.create("maqd_preact_resnet", block_strides=(1, 2)),
            r"block_strides must be 8 numbers, each 1 or 2, got \(1, 2\)",
        ),
        (
            lambda: zoo.create("maqd_preact_resnet", block_strides=(1, 1, 1, 1, 1, 1, 1, 4)),
            r"block_strides must be 8 numbers, each 1 or 2, got \(1, 1, 1, 1, 1, 1, 1, 4\)",
        ),
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
