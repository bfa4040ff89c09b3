"""Networks to train and ship: built by name with `create`, or by the function of that name.

    model = create("resnet20", classes=10)
    model = resnet20(classes=10, shortcut="B")

Every network takes float32 (B, C, H, W) to logits (B, classes), is symbolically traceable by torch.fx, and uses each
weighted module once a forward pass.
"""

from .cifar_resnet import CifarResNet, resnet20, resnet32, resnet44, resnet56
from .digits import digits_cnn, digits_resnet
from .mobilenet import MobileNetV2, mobilenet_v2
from .preact_resnet import PreActResNet, preact_resnet20, preact_resnet32, preact_resnet56
from .registry import Network, create, get, names
from .resnet import ResNet, resnet18

__all__ = [
    "CifarResNet",
    "MobileNetV2",
    "Network",
    "PreActResNet",
    "ResNet",
    "create",
    "digits_cnn",
    "digits_resnet",
    "get",
    "mobilenet_v2",
    "names",
    "preact_resnet20",
    "preact_resnet32",
    "preact_resnet56",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
]
