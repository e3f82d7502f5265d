"""ResNet-18 for images of 32×32 pixels."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

from ift_tune.tasks.vision import torchvision_part

_STAGES = 4
_BLOCKS = 2  # in a stage


def resnet18(classes: int = 10, width: int = 64) -> nn.Sequential:
    """Return ResNet-18 (He et al. 2016) with the stem that small images need.

    The usual stem, 7×7 with stride 2 and a max-pooling, would leave 8×8 of 32×32 pixels before the
    first block. Here it is 3×3 with stride 1 and no pooling, as is common for CIFAR-10. The rest
    is torchvision's: its blocks, and its initialisation.

    Args:
        classes: Number of classes.
        width: Channels of the first stage, doubled in each of the next three. ResNet-18 has 64;
            fewer make a net for trying things out, whose cost falls with their square.

    Returns:
        A network from images (B, 3, H, W) to logits (B, `classes`), randomly initialised. It has
        11,173,962 weights at the default arguments.

    Raises:
        MissingDependencyError: If torchvision is not installed.
    """
    block = torchvision_part("models").resnet.BasicBlock
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=_convolution(3, width, kernel=3))
    layers["activation"] = nn.ReLU(inplace=True)
    channels = width
    for stage in range(_STAGES):
        out = width * 2**stage
        for number in range(_BLOCKS):
            stride = 2 if stage > 0 and number == 0 else 1
            layers[f"stage{stage + 1}_{number + 1}"] = _block(block, channels, out, stride)
            channels = out
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    layers["classifier"] = nn.Linear(channels, classes)
    net = nn.Sequential(layers)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


def _block(kind: Any, channels: int, out: int, stride: int) -> nn.Module:
    """Return a residual block, with a projection on its shortcut where the shape changes."""
    same = stride == 1 and channels == out
    shortcut = None if same else _convolution(channels, out, kernel=1, stride=stride)
    block: nn.Module = kind(channels, out, stride, shortcut)
    return block


def _convolution(channels: int, out: int, *, kernel: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution that keeps the size at stride 1, with batch normalisation."""
    return nn.Sequential(
        nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(out),
    )
