"""The four models that `peers.py` compares on, with a decay for each of their weights.

All of them are ordinary PyTorch, and what the contestants share: the model, λ, the loaders and the
two losses. None has BatchNorm, whose running statistics the functional forms of the peers cannot
follow, nor a fused attention, which has no second derivative without further ado.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ift_tune import Batches, ClassificationProblem, Splits, WeightDecay, tasks
from ift_tune.base.errors import DataNotFoundError
from ift_tune.base.randomness import RandomStream
from ift_tune.problem.problem import BilevelProblem
from ift_tune.tasks.vision import torchvision_part

CLASSES = 10


@dataclass(frozen=True)
class Setting:
    """A model with its data, and what all contestants are told.

    Attributes:
        name: On the command line.
        summary: In tables and figures.
        build: Returns the problem on a device, the same one at each call.
        inner_steps: T.
        terms: K, the Hessian-vector products of the Neumann series.
        alpha: Of the series, given, so that all sum the same one.
        inner_lr: Adam's.
        meta_lr: RMSprop's.
    """

    name: str
    summary: str
    build: Callable[[str | None, torch.device], BilevelProblem]
    inner_steps: int
    terms: int = 3
    alpha: float = 0.02
    inner_lr: float = 1e-4
    meta_lr: float = 0.1


def mnist_mlp(data_root: str | None, device: torch.device) -> BilevelProblem:
    """Return the problem of Lorraine et al.: 50 images train, 50 validate, batches of 32.

    Embedded digits, enlarged, stand in where MNIST is not there.
    """
    task = tasks.get("mnist-overfit", data_root=data_root)
    try:
        return task.make_problem(task.default_config, device, 0)
    except DataNotFoundError:
        task = tasks.get("mnist-overfit", embedded=True)
        return task.make_problem(task.default_config, device, 0)


def lenet() -> nn.Module:
    """Return LeNet-5 for 28×28 pixels: 61,706 weights."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ELU(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ELU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ELU(),
        nn.Linear(120, 84),
        nn.ELU(),
        nn.Linear(84, CLASSES),
    )


class Block(nn.Module):
    """A transformer's block, its normalisations first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.gather = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.think = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, length, width)."""
        batch, length, width = x.shape
        parts = self.attend(self.first(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
        x = x + self.gather((weights @ v).transpose(1, 2).reshape(batch, length, width))
        return x + self.think(self.second(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Six layers over 32 tokens, classified by their mean: 1,208,842 weights."""

    def __init__(self, layers: int = 6, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, width)
        self.place = nn.Parameter(0.02 * torch.randn(32, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits."""
        x = self.blocks(self.embed(tokens) + self.place)
        return self.head(x.mean(dim=1))  # type: ignore[no-any-return]


def resnet18() -> nn.Module:
    """Return torchvision's ResNet-18 with the stem for 32×32 pixels and GroupNorm."""
    resnet = torchvision_part("models").resnet
    model: nn.Module = resnet.ResNet(
        resnet.BasicBlock, [2, 2, 2, 2], CLASSES, norm_layer=partial(nn.GroupNorm, 32)
    )
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def on_noise(
    make: Callable[[], nn.Module], inputs: Callable[[int], Tensor], examples: int, batch_size: int
) -> Callable[[str | None, torch.device], BilevelProblem]:
    """Return a builder of a problem on random inputs: times do not depend on what is in them.

    Args:
        make: Makes the model.
        inputs: Draws so many inputs.
        examples: That train, and as many that validate. An outer step sees all of them.
        batch_size: Of the inner steps.
    """

    def build(_: str | None, device: torch.device) -> BilevelProblem:
        with RandomStream(0, torch.device("cpu")).aside():
            model = make().to(device)
            xs = inputs(2 * examples).to(device)
            ys = torch.randint(CLASSES, (2 * examples,)).to(device)
            hyper = WeightDecay(model, "weight", init=partial(nn.init.uniform_, a=-8.0, b=-6.0))
        train = Batches(xs[:examples], ys[:examples], batch_size=batch_size)
        whole = Batches(xs[:examples], ys[:examples])
        val = Batches(xs[examples:], ys[examples:])
        return ClassificationProblem(model, hyper, Splits(train, val, val, val, curvature=whole))

    return build


def _pixels(channels: int, side: int, examples: int) -> Tensor:
    return torch.randn(examples, channels, side, side)


def _tokens(examples: int) -> Tensor:
    return torch.randint(100, (examples, 32))


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting(
            "mnist-mlp",
            "MLP 784-784-10, 50 + 50 MNIST images, batch 32",
            mnist_mlp,
            inner_steps=50,
        ),
        Setting(
            "lenet",
            "LeNet-5, 64 + 64 images, batch 32",
            on_noise(lenet, partial(_pixels, 1, 28), 64, 32),
            inner_steps=20,
        ),
        Setting(
            "transformer",
            "transformer of 6 layers, 16 + 16 texts of 32 tokens, batch 16",
            on_noise(Transformer, _tokens, 16, 16),
            inner_steps=10,
        ),
        Setting(
            "resnet18",
            "ResNet-18 at 32×32, 4 + 4 images, batch 4",
            on_noise(resnet18, partial(_pixels, 3, 32), 4, 4),
            inner_steps=5,
        ),
    )
}
