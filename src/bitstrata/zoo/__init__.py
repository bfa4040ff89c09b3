"""Networks to train and ship: built by name with `create`, or by the function of that name.

    model = create("resnet20", classes=10)
    model = resnet20(classes=10, shortcut="B")

Every network with a name takes float32 (B, C, H, W) to logits (B, classes), is symbolically traceable by torch.fx, and
uses each weighted module once a forward pass. The 1x1 convolutions of shortcuts are found under `downsample` or
`shortcut`. Networks on sequences and graphs are classes alone: `TransformerLM`, `Seq2SeqTransformer`, `LSTMForecaster`,
`TemporalGraphNetwork`.
"""

from .cifar_resnet import CifarResNet, resnet20, resnet32, resnet44, resnet56
from .digits import digits_cnn, digits_resnet
from .forecaster import LSTMForecaster
from .maqd import MaqdPreActResNet, MaqdVgg, maqd_cnn9, maqd_preact_resnet, maqd_vgg
from .mobilenet import MobileNetV1, MobileNetV2, mobilenet_v1, mobilenet_v2
from .preact_resnet import (
    PreActResNet,
    preact_resnet18,
    preact_resnet20,
    preact_resnet32,
    preact_resnet34,
    preact_resnet50,
    preact_resnet56,
)
from .registry import Network, create, get, names
from .resnet import ResNet, resnet18, resnet34, resnet50
from .temporal_graph import TemporalGraphNetwork
from .transformer import Seq2SeqTransformer, TransformerLM
from .vgg import VGG, vgg16_bn
from .vit import VisionTransformer, vit_cifar

__all__ = [
    "VGG",
    "CifarResNet",
    "LSTMForecaster",
    "MaqdPreActResNet",
    "MaqdVgg",
    "MobileNetV1",
    "MobileNetV2",
    "Network",
    "PreActResNet",
    "ResNet",
    "Seq2SeqTransformer",
    "TemporalGraphNetwork",
    "TransformerLM",
    "VisionTransformer",
    "create",
    "digits_cnn",
    "digits_resnet",
    "get",
    "maqd_cnn9",
    "maqd_preact_resnet",
    "maqd_vgg",
    "mobilenet_v1",
    "mobilenet_v2",
    "names",
    "preact_resnet18",
    "preact_resnet20",
    "preact_resnet32",
    "preact_resnet34",
    "preact_resnet50",
    "preact_resnet56",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet44",
    "resnet50",
    "resnet56",
    "vgg16_bn",
    "vit_cifar",
]
