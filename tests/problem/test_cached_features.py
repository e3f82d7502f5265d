"""Features of a frozen part, kept: the same training as without, or a refusal that says why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import data

from ift_tune import (
    AdapterScale,
    Batches,
    ClassificationProblem,
    ExampleWeights,
    JointOptimizer,
    MetaConfig,
    Neumann,
    Splits,
    UsageError,
    WeightDecay,
    cached_features,
)
from ift_tune.hyper import Compose

CONFIG = MetaConfig(inner_steps=4, inner_lr=0.05, meta_lr=0.1, inverse=Neumann(2, 0.1))


def make_backbone() -> nn.Sequential:
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 5)
    )
    net.train()
    net(torch.randn(64, 6))  # BatchNorm has statistics of its own
    return net.requires_grad_(False).eval()


def make_rows(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator), torch.arange(count) % 3


def in_memory() -> Splits:
    inputs, targets = make_rows(40, 0)
    val, search, test = (
        Batches(*make_rows(24, seed), batch_size=8, seed=seed) for seed in (1, 2, 3)
    )
    return Splits(
        Batches(inputs, targets, torch.arange(40), batch_size=7, seed=5),
        val,
        search,
        test,
        curvature=Batches(inputs, targets, torch.arange(40), batch_size=20, seed=9),
    )


class Examples(data.Dataset[Any]):
    def __init__(self) -> None:
        self.inputs, self.targets = make_rows(40, 0)

    def __len__(self) -> int:
        return 40

    def __getitem__(self, place: int) -> Any:
        return self.inputs[place], self.targets[place], place


def by_loaders() -> Splits:
    weights = torch.rand(40, generator=torch.Generator().manual_seed(0))
    sampler = data.WeightedRandomSampler(weights.tolist(), 30)
    train: Any = data.DataLoader(Examples(), batch_size=10, sampler=sampler)
    val: Any = data.DataLoader(
        Examples(), batch_size=9, shuffle=True, generator=torch.Generator().manual_seed(4)
    )
    listed = [make_rows(12, 7), make_rows(5, 8)]
    return Splits(train, val, listed, listed)


def course(splits: Splits, model: nn.Module, head: nn.Module) -> list[dict[str, float]]:
    hyper = Compose({"decay": WeightDecay(head, "weight"), "weights": ExampleWeights(40)})
    joint = JointOptimizer(ClassificationProblem(model, hyper, splits), CONFIG, seed=2)
    rows = [joint.step() for _ in range(3)]
    return [*rows, joint.evaluate("search")]


@pytest.mark.parametrize("make", [in_memory, by_loaders])
def test_training_on_features_is_training_on_top_of_the_frozen_part(
    make: Callable[[], Splits],
) -> None:
    courses = []
    for cached in (False, True):
        backbone, splits = make_backbone(), make()
        head = nn.Linear(5, 3)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
        model: nn.Module = head
        if cached:
            splits = cached_features(backbone, splits, batch_size=11)
        else:
            model = nn.Sequential(backbone, head)
            backbone.eval()
        courses.append(course(splits, model, head))
    for plain, kept in zip(*courses, strict=True):
        assert plain.keys() == kept.keys()
        for name in ("train_loss", "val_loss", "hypergradient_norm", "search_loss"):
            if name in plain:
                assert kept[name] == pytest.approx(plain[name], rel=1e-3)


def test_nothing_of_the_caller_is_moved() -> None:
    backbone, splits = make_backbone(), in_memory()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    torch.manual_seed(11)
    wanted = torch.rand(())
    torch.manual_seed(11)
    found = cached_features(backbone, splits)
    assert torch.equal(torch.rand(()), wanted)
    assert all(torch.equal(before[name], t) for name, t in backbone.state_dict().items())
    orders = [[batch[2].tolist() for batch in each.train] for each in (splits, found)]
    assert orders[0] == orders[1]
    assert not next(iter(found.val))[0].requires_grad


class Encoder(nn.Module):
    """Takes names, returns an object with a hidden state, as transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        hidden = self.embedding(input_ids) * attention_mask.unsqueeze(-1)
        return {"last_hidden_state": hidden, "past": None}


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 2)

    def forward(self, features: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Any]:
        mean = features.sum(1) / attention_mask.sum(1, keepdim=True)
        logits = self.last(mean)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def named_splits() -> Splits:
    ids = torch.arange(120).reshape(20, 6) % 9
    mask = (torch.arange(6) < torch.arange(20).unsqueeze(1) % 5 + 1).float()
    rows = {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(20) % 2}
    return Splits.from_arrays(rows, batch_size=5, index=True, sizes=(8, 4, 4, 4))


def test_batches_with_names_keep_labels_index_and_what_is_asked_for() -> None:
    encoder = Encoder().requires_grad_(False)
    splits = cached_features(encoder, named_splits(), keep=["attention_mask"])
    assert set(next(iter(splits.train))) == {"features", "labels", "index", "attention_mask"}
    assert set(next(iter(splits.test))) == {"features", "labels", "attention_mask"}
    head = Head()
    problem = ClassificationProblem(head, WeightDecay(head, "tensor"), splits)
    assert JointOptimizer(problem, CONFIG).step()["val_loss"] > 0.0
    with pytest.raises(UsageError, match=r"keep must name entries.*got 'mask'"):
        cached_features(encoder, named_splits(), keep="mask")
    renamed = cached_features(encoder, named_splits(), name="hidden")
    assert next(iter(renamed.val))["hidden"].shape == (4, 6, 4)


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Learned(nn.Module):
    """Depends on something that is learned, which is no parameter of it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = [torch.ones((), requires_grad=True)]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale[0]


class Two(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"first": x, "second": 2 * x}


def scaled() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 3))
    AdapterScale(net, "0")
    return net.requires_grad_(False)


@pytest.mark.parametrize(
    ("backbone", "told"),
    [
        (nn.Linear(6, 3), r"requires_grad_\(False\).*got 2 trained tensors such as weight"),
        (nn.Sequential(nn.Tanh(), nn.Dropout(0.1)), r"backbone\.eval\(\), got dropout in 1"),
        (nn.BatchNorm1d(6).requires_grad_(False), "got statistics of the batch in it"),
        (Noisy(), "must be the same at each call"),
        (Centred(), "other features of an example in another batch"),
        (Learned(), "must not depend on anything that is learned"),
        (scaled(), "must not depend on anything that is learned"),
        (Two(), "must return its features as one tensor"),
        (nn.Flatten(0), "must return a row for each example"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_does_not_stay_is_not_kept(backbone: nn.Module, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        cached_features(backbone, in_memory())


def test_what_passes_none_the_less() -> None:
    """Modes that do not matter, under no_grad, and a part without tensors."""
    quiet = nn.Sequential(nn.Dropout(0.0), nn.Tanh())
    splits = cached_features(quiet, in_memory())
    assert torch.equal(next(splits.val.in_order())[0], make_rows(24, 1)[0][:8].tanh())  # type: ignore[attr-defined]
    with torch.no_grad(), pytest.raises(UsageError, match="anything that is learned"):
        cached_features(Learned(), in_memory())


class Stream(data.IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from zip(*make_rows(8, 0), strict=True)


def test_loaders_that_cannot_be_read_by_position_are_refused() -> None:
    rows = Batches(*make_rows(8, 0))
    stream: Any = data.DataLoader(Stream(), batch_size=4)
    for loader, told in ((stream, "got a DataLoader"), (Wrapper(), "got a Wrapper")):
        with pytest.raises(UsageError, match=rf"Splits\.val must be read by position.*{told}"):
            cached_features(nn.Identity(), Splits(rows, loader, rows, rows))
    empty: Any = data.DataLoader([], batch_size=2)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="must have batches"):
        cached_features(nn.Identity(), Splits(rows, empty, rows, rows))
    lengths: Any = [(torch.ones(n), 0) for n in (3, 3, 4, 4)]
    ragged: Any = data.DataLoader(lengths, batch_size=2)
    with pytest.raises(UsageError, match=r"one shape to be kept.*pad"):
        cached_features(nn.Identity(), Splits(ragged, rows, rows, rows))
    for wrong in ({"batch_size": 0}, {"splits": [rows]}, {"backbone": torch.tanh}):
        given: dict[str, Any] = {"backbone": nn.Identity(), "splits": Splits(*[rows] * 4)} | wrong
        with pytest.raises(UsageError, match="got"):
            cached_features(**given)


class Wrapper:
    def __iter__(self) -> Iterator[Any]:
        yield make_rows(8, 0)
