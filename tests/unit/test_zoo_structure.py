"""What is where in the networks: resolutions, shortcuts, activations and pools, and what each switch changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bitstrata import zoo
from bitstrata.zoo.maqd import MaqdBlock
from bitstrata.zoo.preact_resnet import PreActBlock, PreActBottleneck
from bitstrata.zoo.resnet import Bottleneck

IMAGES = {"cifar": torch.zeros(1, 3, 32, 32), "imagenet": torch.zeros(1, 3, 64, 64)}


def outputs(model: nn.Module, x: Tensor, *kinds: type[nn.Module]) -> list[Tensor]:
    """Outputs of all modules of some kinds, in order of execution, in evaluation mode."""
    seen: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, kinds):
            module.register_forward_hook(lambda _m, _i, out: seen.append(out))
    with torch.no_grad():
        model.eval()(x)
    return seen


def shaken(module: nn.Module) -> nn.Module:
    """The module in evaluation mode, its batch norms far from the identity so that their places matter."""
    torch.manual_seed(0)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    return module.eval()


RESIDUAL = [f"{kind}{depth}" for kind in ("resnet", "preact_resnet") for depth in (18, 34, 50)]
# network, stem, side of the map behind the first and the last convolution: 32x32 with "cifar", 64x64 with "imagenet"
STEMS = [
    *((name, "cifar", (32, 4)) for name in (*RESIDUAL, "mobilenet_v1", "mobilenet_v2")),
    *((name, "imagenet", (32, 2)) for name in (*RESIDUAL, "mobilenet_v1", "mobilenet_v2")),
    ("vgg16_bn", "cifar", (32, 2)),
    ("vgg16_bn", "imagenet", (64, 4)),
]


@pytest.mark.parametrize(("name", "stem", "sides"), STEMS)
def test_stems(name: str, stem: str, sides: tuple[int, int]) -> None:
    narrow = {"width": 0.125} if name.startswith("mobilenet") else {"width": 4}
    model = zoo.create(name, stem=stem, **narrow)
    heights = [out.shape[2] for out in outputs(model, IMAGES[stem], nn.Conv2d)]
    assert (heights[0], heights[-1]) == sides
    residual = "resnet" in name
    pools = [m for m in model.modules() if isinstance(m, nn.MaxPool2d)]
    assert len(pools) == (5 if name == "vgg16_bn" else int(residual and stem == "imagenet"))


def test_preact_small_stem_is_a_convolution_alone() -> None:
    small, large = (zoo.preact_resnet18(stem=stem, width=4) for stem in ("cifar", "imagenet"))
    norms = [sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) for model in (small, large)]
    assert norms == [17, 18]
    x = torch.randn(1, 3, 8, 8)
    seen = outputs(small, x, nn.Conv2d, nn.BatchNorm2d)
    assert torch.equal(seen[0], small.conv1(x))
    assert torch.equal(seen[1], small.layer1[0].bn1(seen[0]))  # type: ignore[index,union-attr]


def test_pad_shortcut() -> None:
    model = zoo.resnet20(width=4)
    x = torch.randn(2, 4, 5, 6)
    out = model.layer2[0].shortcut(x)  # type: ignore[index,union-attr]
    want = torch.zeros(2, 8, 3, 3)
    want[:, 2:6] = x[:, :, ::2, ::2]
    assert torch.equal(out, want)


@pytest.mark.parametrize("proj_input", ["preact", "raw"])
def test_preact_block(proj_input: str) -> None:
    block = shaken(PreActBlock(4, 8, 2, proj_input))
    x = torch.randn(2, 4, 6, 6)
    y = F.relu(block.bn1(x))
    main = F.conv2d(
        F.relu(block.bn2(F.conv2d(y, block.conv1.weight, stride=2, padding=1))), block.conv2.weight, padding=1
    )
    source = y if proj_input == "preact" else x
    assert torch.equal(block(x), main + source_projection(source, block))


@pytest.mark.parametrize("proj_input", ["preact", "raw"])
def test_preact_bottleneck(proj_input: str) -> None:
    block = shaken(PreActBottleneck(4, 16, 2, proj_input))
    x = torch.randn(2, 4, 6, 6)
    y = F.relu(block.bn1(x))
    middle = F.conv2d(F.relu(block.bn2(F.conv2d(y, block.conv1.weight))), block.conv2.weight, stride=2, padding=1)
    assert middle.shape == (2, 4, 3, 3)
    main = F.conv2d(F.relu(block.bn3(middle)), block.conv3.weight)
    source = y if proj_input == "preact" else x
    assert torch.equal(block(x), main + source_projection(source, block))


def source_projection(source: Tensor, block: nn.Module) -> Tensor:
    return F.conv2d(source, block.shortcut.weight, stride=2)


@pytest.mark.parametrize("block", [PreActBlock(4, 4, 1, "raw"), PreActBottleneck(4, 4, 1, "raw"), Bottleneck(4, 4, 1)])
def test_unchanged_shape_needs_no_projection(block: nn.Module) -> None:
    last = block.conv2 if isinstance(block, PreActBlock) else block.conv3
    nn.init.zeros_(last.weight)
    x = torch.rand(1, 4, 3, 3)
    assert not any(isinstance(m, nn.Conv2d) and m.stride == (2, 2) for m in block.modules())
    assert torch.equal(block.eval()(x), x)


def test_bottleneck() -> None:
    block = shaken(Bottleneck(4, 16, 2))
    x = torch.randn(2, 4, 6, 6)
    out = F.relu(block.bn1(F.conv2d(x, block.conv1.weight)))
    out = F.relu(block.bn2(F.conv2d(out, block.conv2.weight, stride=2, padding=1)))
    convolution, norm = block.downsample
    shortcut = norm(F.conv2d(x, convolution.weight, stride=2))
    assert torch.equal(block(x), F.relu(block.bn3(F.conv2d(out, block.conv3.weight)) + shortcut))


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", *(f"preact_resnet{d}" for d in (18, 20, 34, 50))])
def test_projections_are_found_by_name(name: str) -> None:
    model = zoo.create(name, width=4)
    projections = {
        key
        for key, m in model.named_modules()
        if isinstance(m, nn.Conv2d) and {"downsample", "shortcut"} & set(key.split("."))
    }
    word = "shortcut" if name.startswith("preact") else "downsample.0"
    stages = (2, 3) if name == "preact_resnet20" else (1, 2, 3, 4) if name.endswith("50") else (2, 3, 4)
    assert projections == {f"layer{stage}.0.{word}" for stage in stages}


def test_initialization() -> None:
    torch.manual_seed(0)
    model = zoo.resnet18()
    assert std(model.layer4[1].conv2) == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)  # type: ignore[index]
    assert model.fc.bias.abs().max() == 0
    assert std(model.fc) == pytest.approx(0.01, rel=0.05)
    torch.manual_seed(0)
    assert torch.equal(zoo.resnet18().fc.weight, model.fc.weight)
    assert std(zoo.maqd_cnn9()[23]) == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)
    assert std(zoo.maqd_vgg().features[3]) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    depthwise = zoo.mobilenet_v1().features[13][0][0]  # type: ignore[index]
    assert depthwise.groups == 1024
    assert std(depthwise) == pytest.approx((2 / (1024 * 9)) ** 0.5, rel=0.05)


def std(layer: nn.Module) -> float:
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    return layer.weight.std().item()


def test_mobilenet_v1_alternates() -> None:
    kernels = [
        (m.kernel_size[0], m.groups == m.in_channels, m.stride[0])
        for m in zoo.mobilenet_v1(width=0.25).modules()
        if isinstance(m, nn.Conv2d)
    ]
    assert kernels[0] == (3, False, 2)
    assert [(kernel, depthwise) for kernel, depthwise, _ in kernels[1:]] == [(3, True), (1, False)] * 13
    assert [stride for _, depthwise, stride in kernels if depthwise] == [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]


def test_mobilenet_v2_relu6() -> None:
    x = 50 * torch.randn(1, 3, 32, 32)
    clipped, free = (zoo.mobilenet_v2(width=0.25, relu6=relu6) for relu6 in (True, False))
    free.load_state_dict(clipped.state_dict())
    assert max(out.max().item() for out in outputs(clipped, x, nn.ReLU6)) == 6
    assert not any(isinstance(m, nn.ReLU6) for m in free.modules())
    assert max(out.max().item() for out in outputs(free, x, nn.ReLU)) > 6


def test_mobilenet_v2_classifier() -> None:
    torch.manual_seed(0)
    linear, convolution = (zoo.mobilenet_v2(width=0.25, conv_classifier=on).eval() for on in (False, True))
    state = linear.state_dict()
    assert not state.pop("classifier.1.bias").any()
    state["classifier.1.weight"] = state["classifier.1.weight"][:, :, None, None]
    convolution.load_state_dict(state)
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert convolution(x).shape == (2, 10)
        torch.testing.assert_close(convolution(x), linear(x))


def test_mobilenet_v2_first_expansion() -> None:
    first = zoo.mobilenet_v2(first_expansion=True).features[1].conv  # type: ignore[union-attr]
    assert [m.weight.shape[:2] for m in first.modules() if isinstance(m, nn.Conv2d)] == [(32, 32), (32, 1), (16, 32)]  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match=r"features\.1\.conv"):
        zoo.mobilenet_v2(first_expansion=True).load_state_dict(zoo.mobilenet_v2().state_dict())


# --- MaQD ------------------------------------------------------------------------------------------------------------


def kinds(model: nn.Module) -> list[str]:
    """The chain of modules without children, as short names."""
    short = {nn.Conv2d: "C", nn.BatchNorm2d: "N", nn.ReLU: "A", nn.AvgPool2d: "P", nn.AdaptiveAvgPool2d: "G"}
    return [short.get(type(m), type(m).__name__) for m in model.modules() if not list(m.children())]


def test_maqd_chains() -> None:
    stages = ("CNA" * 4 + "P") * 3 + "CNA" * 4
    assert kinds(zoo.maqd_vgg(width=1)) == [*stages, "C", "N", "G"]
    stages = ("CNA" * 2 + "P") * 2 + "CNA" * 4
    assert kinds(zoo.maqd_cnn9(width=1)) == [*stages, "G", "Flatten", "Linear"]
    x = torch.zeros(1, 3, 32, 32)
    heights = [out.shape[2] for out in outputs(zoo.maqd_vgg(width=1), x, nn.Conv2d)]
    assert heights == [32] * 4 + [16] * 4 + [8] * 4 + [4] * 5
    heights = [out.shape[2] for out in outputs(zoo.maqd_cnn9(width=1), x, nn.Conv2d)]
    assert heights == [32] * 2 + [16] * 2 + [8] * 4


FUNCTIONS = ("call_function", "call_method")
MAQD: list[tuple[str, dict[str, Any], int, int]] = [  # name, options, weight layers, activations
    ("maqd_vgg", {}, 17, 16),
    ("maqd_cnn9", {}, 9, 8),
    ("maqd_preact_resnet", {}, 26, 25),
    ("maqd_preact_resnet", {"stem": "literal", "final_act": False}, 25, 24),
    ("maqd_preact_resnet", {"stem": "literal"}, 25, 25),
    ("maqd_preact_resnet", {"final_act": False}, 26, 24),
    ("maqd_preact_resnet", {"shortcut_kernel": 3}, 26, 25),
]


@pytest.mark.parametrize(("name", "options", "weights", "activations"), MAQD)
def test_maqd_modules_have_one_place(name: str, options: dict[str, Any], weights: int, activations: int) -> None:
    """Each module runs once, and only sums and the last flattening are functions."""
    model = zoo.create(name, width=2, **options)
    nodes = fx.symbolic_trace(model).graph.nodes
    called = [node.target for node in nodes if node.op == "call_module"]
    assert len(set(called)) == len(called)
    functions = {n.target if n.op == "call_method" else n.target.__name__ for n in nodes if n.op in FUNCTIONS}
    assert functions <= {"add", "flatten"}
    run = [model.get_submodule(target) for target in called]
    assert len({id(module) for module in run}) == len(run)
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in run) == weights
    assert sum(isinstance(m, nn.ReLU) for m in run) == activations
    assert all(m.bias is None for m in run if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize(("stride", "kernel"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_maqd_block(stride: int, kernel: int) -> None:
    block = shaken(MaqdBlock(3, 5, stride, kernel, nn.BatchNorm2d))
    x = torch.randn(2, 3, 6, 6)
    y = F.avg_pool2d(x, 2) if stride == 2 else x
    norms = [m for m in block.body if isinstance(m, nn.BatchNorm2d)]
    weights = [m.weight for m in block.body if isinstance(m, nn.Conv2d)]
    out = F.conv2d(F.relu(norms[0](y)), weights[0], padding=1)
    out = norms[2](F.conv2d(F.relu(norms[1](out)), weights[1], padding=1))
    before, _, projection, after = block.shortcut
    shortcut = after(F.conv2d(F.relu(before(y)), projection.weight, padding=kernel // 2))
    assert torch.equal(block(x), out + shortcut)


def test_maqd_block_strides() -> None:
    x = torch.zeros(1, 3, 32, 32)

    def sides(**options: Any) -> list[int]:
        return [out.shape[2] for out in outputs(zoo.maqd_preact_resnet(width=1, **options), x, MaqdBlock)]

    assert sides() == [32, 32, 16, 16, 8, 8, 4, 4]
    assert sides(block_strides=(2, 1, 1, 1, 1, 1, 1, 2)) == [16] * 7 + [8]


def test_maqd_literal_stem_activates_the_image() -> None:
    """Pixels under zero do not matter to the literal form, and do to a convolution."""
    x = torch.rand(1, 3, 16, 16) - 0.5
    for stem, equal in (("literal", True), ("conv", False)):
        torch.manual_seed(0)
        model = zoo.maqd_preact_resnet(width=2, stem=stem).eval()
        with torch.inference_mode():
            assert torch.equal(model(x), model(x.clamp(min=0))) is equal


def test_maqd_final_activation() -> None:
    x = torch.randn(1, 3, 16, 16)
    for final_act in (True, False):
        model = zoo.maqd_preact_resnet(width=2, final_act=final_act)
        seen: list[Tensor] = []
        model.output.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0]))
        blocks = outputs(model, x, MaqdBlock)
        assert (seen[0].min().item() < 0) is not final_act
        assert torch.equal(seen[0], blocks[-1]) is not final_act


@pytest.mark.parametrize("name", ["maqd_vgg", "maqd_preact_resnet", "maqd_cnn9"])
def test_maqd_norm_is_the_callers(name: str) -> None:
    made: list[nn.GroupNorm] = []

    def norm(channels: int) -> nn.Module:
        made.append(nn.GroupNorm(1, channels))
        return made[-1]

    model = zoo.create(name, 7, width=2, norm=norm)
    places = {id(m) for m in model.modules() if isinstance(m, nn.GroupNorm)}
    assert places == {id(m) for m in made}
    assert len(made) == {"maqd_vgg": 17, "maqd_preact_resnet": 5 * 8 + 2, "maqd_cnn9": 8}[name]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert made[-1].num_channels == (8 if name == "maqd_cnn9" else 7)
