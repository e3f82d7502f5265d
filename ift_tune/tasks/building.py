"""Pieces the tasks share: cutting splits, spoiling labels, small networks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ift_tune.base.errors import UsageError
from ift_tune.base.randomness import derive_seed
from ift_tune.problem.batches import Batches
from ift_tune.problem.problem import Splits
from ift_tune.tasks.base import CLASSES
from ift_tune.tasks.datasets import Images, Text
from ift_tune.tasks.vision import torchvision_part

_STAGES = 4
_BLOCKS = 2  # in a stage of ResNet-18

Examples: TypeAlias = tuple[Tensor, Tensor]
"""Inputs (n, ...) and their targets (n,)."""

FourSplits: TypeAlias = tuple[Examples, Examples, Examples, Examples]
"""Train, val, search and test."""


def corrupt(targets: Tensor, fraction: float, seed: int) -> Tensor:
    """Return labels of which a random `fraction` is redrawn uniformly over all classes."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "labels"))
    chosen = torch.randperm(len(targets), generator=generator)[: round(fraction * len(targets))]
    spoiled = targets.clone()
    spoiled[chosen] = torch.randint(CLASSES, (len(chosen),), generator=generator)
    return spoiled


def permutation(size: int, seed: int) -> Tensor:
    """Return a random order of `size` examples."""
    return torch.randperm(
        size, generator=torch.Generator().manual_seed(derive_seed(seed, "splits"))
    )


def shares(sizes: Sequence[int], available: int) -> list[int]:
    """Return the sizes, all smaller by one factor where they are more than there is."""
    wanted = sum(sizes)
    return list(sizes) if wanted <= available else [n * available // wanted for n in sizes]


def cut(images: Images, train: int, val: int, search: int, test: int, seed: int) -> FourSplits:
    """Return four disjoint random splits: images (n, C, H, W) in [−1, 1] with their classes.

    Test examples are the first of the data set's own test part where it has one. Where there are
    too few images, as in embedded data, every split shrinks by the same factor.
    """
    order = permutation(len(images.pixels), seed)
    own_test = len(images.test_pixels) > 0
    wanted = (train, val, search) if own_test else (train, val, search, test)
    sizes = shares(wanted, len(order))
    first, second, third, *rest = (
        images.train(part) for part in torch.split(order[: sum(sizes)], sizes)
    )
    return first, second, third, images.test(slice(test)) if own_test else rest[0]


def cut_classes(
    images: Images, train: Sequence[int], val: int, search: int, test: int, seed: int
) -> FourSplits:
    """Return four disjoint random splits with given numbers of each class, as `cut` otherwise.

    Args:
        images: The data set.
        train: Training examples of each class.
        val: Validation examples of every class; likewise `search` and `test`.
        search: See `val`.
        test: See `val`; the first of the data set's own test part where it has one.
        seed: Of the choice.

    Raises:
        UsageError: If there are not so many of a class.
    """
    order = permutation(len(images.pixels), seed)
    own_test = len(images.test_pixels) > 0
    places: list[list[Tensor]] = []
    for label, count in enumerate(train):
        sizes = [count, val, search] if own_test else [count, val, search, test]
        here = order[images.targets[order] == label]
        if len(here) < sum(sizes):
            raise UsageError(
                f"{sum(sizes)} images of class {label} are needed, and there are {len(here)}: "
                f"lower one of train, val, search and test, got {sizes}"
            )
        places.append(list(torch.split(here[: sum(sizes)], sizes)))
        if own_test:
            there = (images.test_targets == label).nonzero().flatten()
            if len(there) < test:
                raise UsageError(
                    f"{test} test images of class {label} are needed, and there are "
                    f"{len(there)}: lower test"
                )
            places[-1].append(there[:test])
    first, second, third, fourth = (torch.cat(parts) for parts in zip(*places, strict=True))
    held_out = images.test(fourth) if own_test else images.train(fourth)
    return images.train(first), images.train(second), images.train(third), held_out


def first_of_each(examples: Examples, count: int) -> Examples:
    """Return the first `count` examples of every class: the first of each, then the second ...

    So a row of ten images shows every class once.

    Raises:
        UsageError: If a class has fewer.
    """
    inputs, targets = examples
    places = [(targets == label).nonzero().flatten()[:count] for label in range(CLASSES)]
    fewest = min(len(place) for place in places)
    if fewest < count:
        raise UsageError(
            f"{count} images of each class are needed, and of one there are {fewest} among "
            f"{len(targets)}: lower per_class"
        )
    chosen = torch.stack(places, dim=1).flatten()
    return inputs[chosen], targets[chosen]


def windows(text: Text, length: int, sizes: tuple[int, int, int, int], seed: int) -> FourSplits:
    """Return four disjoint stretches of a text, one after the other, cut into windows.

    The targets of a window are its characters' successors: inputs and targets are (n, length).
    Where the text is too short, every split shrinks by the same factor.

    Args:
        text: The text.
        length: Characters of a window.
        sizes: Windows of each split.
        seed: Decides where the first stretch begins.
    """
    train, val, search, test = stretches(text.characters, length, sizes, seed)
    return train, val, search, test


def stretches(characters: Tensor, length: int, sizes: Sequence[int], seed: int) -> list[Examples]:
    """Return disjoint stretches of a text as `windows` does, any number of them."""
    counts = shares(sizes, (len(characters) - len(sizes)) // length)
    needed = [n * length + 1 for n in counts]  # one more: the last window's last target
    free = len(characters) - sum(needed)
    generator = torch.Generator().manual_seed(derive_seed(seed, "text"))
    start = int(torch.randint(free + 1, (), generator=generator))
    parts = torch.split(characters[start : start + sum(needed)], needed)
    return [(part[:-1].view(-1, length), part[1:].view(-1, length)) for part in parts]


def flat(splits: FourSplits) -> FourSplits:
    """Return the splits with the images as rows of pixels, (n, C·H·W)."""
    train, val, search, test = ((inputs.flatten(1), targets) for inputs, targets in splits)
    return train, val, search, test


def make_splits(
    train: Examples,
    val: Examples,
    search: Examples,
    test: Examples,
    *,
    batch_size: int | None,
    device: torch.device,
    seed: int,
    largest: int | None = None,
    curvature: int | None = None,
) -> Splits:
    """Return in-memory loaders on `device`, `train` with an index.

    Args:
        train: Comes in mini-batches of `batch_size` at most, and whole for the outer step.
        val: Comes whole.
        search: Likewise.
        test: Likewise.
        batch_size: Of the inner steps; None takes all.
        device: Where the data lies.
        seed: Of the order of batches.
        largest: For nets that cannot take a split whole: no batch is larger than this, and each
            outer step then sees one random batch of `train` and one of `val`.
        curvature: Examples of `train` that an outer step sees, where `largest` would be too many.
    """

    def batches(name: str, *tensors: Tensor, at_most: int | None) -> Batches:
        on_device = [tensor.to(device) for tensor in tensors]
        size = None if at_most is None else min(at_most, len(tensors[0]))
        return Batches(*on_device, batch_size=size, seed=derive_seed(seed, name))

    # Each loader has a seed of its own: how often one is walked does not change another's order.
    rows = (*train, torch.arange(len(train[0])))
    return Splits(
        train=batches("batches", *rows, at_most=batch_size),
        val=batches("val", *val, at_most=largest),
        search=batches("search", *search, at_most=largest),
        test=batches("test", *test, at_most=largest),
        curvature=batches("curvature", *rows, at_most=curvature or largest),
    )


def mlp(pixels: int, hidden: int) -> nn.Module:
    """Return one hidden ELU layer: twice differentiable, as the implicit function theorem asks."""
    return nn.Sequential(nn.Linear(pixels, hidden), nn.ELU(), nn.Linear(hidden, CLASSES))


def small_cnn(shape: tuple[int, int, int], classes: int = 10, width: int = 8) -> nn.Sequential:
    """Return two 5×5 convolutions of stride 2 and a linear layer: a batch takes milliseconds.

    Args:
        shape: Channels, height and width of the images.
        classes: Number of classes.
        width: Channels after the first convolution; the second doubles them.

    Returns:
        A network from images (B, C, H, W) to logits (B, `classes`), without batch normalisation.
    """
    channels, height, across = shape
    places = -(-height // 4) * -(-across // 4)  # each stride halves and rounds up
    return nn.Sequential(
        nn.Conv2d(channels, width, kernel_size=5, stride=2, padding=2),
        nn.SiLU(),
        nn.Conv2d(width, 2 * width, kernel_size=5, stride=2, padding=2),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(2 * width * places, classes),
    )


class CharLSTM(nn.Module):
    """Embedding, two LSTM layers, linear decoder: what comes after each character.

    Each layer is an `nn.LSTM` of its own, so that dropout can act between them.
    """

    def __init__(self, characters: int, embedding: int, hidden: int) -> None:
        """Take the sizes: of the alphabet, of an embedded character, of each layer's state."""
        super().__init__()
        self.embedding = nn.Embedding(characters, embedding)
        self.layer1 = nn.LSTM(embedding, hidden, batch_first=True)
        self.layer2 = nn.LSTM(hidden, hidden, batch_first=True)
        self.decoder = nn.Linear(hidden, characters)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (B, characters, T) of the next characters, for inputs (B, T).

        Every window starts from a state of zeros.
        """
        states, _ = self.layer1(self.embedding(inputs))
        states, _ = self.layer2(states)
        logits: Tensor = self.decoder(states)
        return logits.movedim(-1, 1)


class CharConvolution(nn.Module):
    """What comes after each character, from those right before it: a convolution and a layer."""

    def __init__(self, characters: int, embedding: int, hidden: int, width: int) -> None:
        """Take the sizes: of the alphabet, of an embedded character, hidden, of the context."""
        super().__init__()
        self.embedding = nn.Embedding(characters, embedding)
        self.context = nn.ConstantPad1d((width - 1, 0), 0.0)  # nothing comes before the first one
        self.hidden = nn.Conv1d(embedding, hidden, width)
        self.decoder = nn.Conv1d(hidden, characters, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (B, characters, T) of the next characters, for inputs (B, T)."""
        known = self.context(self.embedding(inputs).movedim(-1, 1))
        logits: Tensor = self.decoder(torch.tanh(self.hidden(known)))
        return logits


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
