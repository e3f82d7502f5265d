"""Numbers of a split do not depend on how its batches are cut, and are numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ift_tune import Batches, BilevelProblem, JointOptimizer, MetaConfig, Splits, UsageError
from ift_tune.hyper import WeightDecay
from ift_tune.hyper.supervised import ClassificationProblem, RegressionProblem
from ift_tune.problem.batches import Batch
from ift_tune.problem.evaluation import as_numbers

torch.manual_seed(0)
INPUTS = torch.randn(12, 3, dtype=torch.float64)
LABELS = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 0, 1])
CUTS = [12, 6, 5, 1]


class F1:
    """The F1 score, with the methods of a torchmetrics object."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.hits = self.wrong = 0

    def update(self, said: Tensor, right: Tensor) -> None:
        self.hits += int((said & right).sum())
        self.wrong += int((said ^ right).sum())

    def compute(self) -> Tensor:
        return torch.tensor(2 * self.hits / max(1, 2 * self.hits + self.wrong))


class Scored(BilevelProblem):
    """A binary classifier that counts over the split by an object."""

    def __init__(self, loader: Any) -> None:
        torch.manual_seed(1)
        self.model = nn.Linear(3, 1).double()
        self.hyper: WeightDecay = WeightDecay(self.model, "tensor")
        self.splits = Splits(loader, loader, loader, loader)
        self.score = F1()

    def train_loss(self, batch: Batch) -> Tensor:
        self.score.update(batch[1] > 0, batch[1] > 0)  # what a training loop leaves behind
        return self.val_loss(batch)

    def val_loss(self, batch: Batch) -> Tensor:
        logits = self.model(batch[0]).flatten()
        return F.binary_cross_entropy_with_logits(logits, batch[1].double())

    def metrics(self, batch: Batch) -> Mapping[str, Any]:
        self.score.update(self.model(batch[0]).flatten() > 0, batch[1] > 0)
        return {"loss": self.val_loss(batch), "f1[/macro]": self.score}

    def penalty(self) -> Any:
        return self.hyper.penalty()


def cut(size: int, *tensors: Tensor) -> list[Batch]:
    return [tuple(t[i : i + size] for t in tensors) for i in range(0, len(tensors[0]), size)]


@pytest.mark.parametrize("size", CUTS)
def test_an_object_is_accumulated_over_the_split_and_reset(size: int) -> None:
    problem = Scored(cut(size, INPUTS, LABELS))
    joint = JointOptimizer(problem, MetaConfig(inner_steps=2))
    row = joint.step()
    assert "val_f1[/macro]" in row
    said, right = (problem.model(INPUTS).flatten() > 0).tolist(), (LABELS > 0).tolist()
    both = sum(a and b for a, b in zip(said, right, strict=True))
    expected = 2 * both / (sum(said) + sum(right))
    for _ in range(2):
        assert joint.evaluate("search")["search_f1[/macro]"] == pytest.approx(expected)
    assert problem.score.hits == problem.score.wrong == 0


class Whole(ClassificationProblem):
    """Looks at its split twice, in two passes."""

    def evaluate(self, batches: Iterable[Batch]) -> Mapping[str, Any]:
        assert not self.model.training
        assert not torch.is_grad_enabled()
        found = dict(super().evaluate(batches))
        logits = torch.cat([self.model(batch[0]) for batch in batches])
        return found | {"perplexity": math.exp(found["loss"]), "spread": logits.std().numpy()}


def whole(loader: Any) -> Whole:
    torch.manual_seed(1)
    model = nn.Linear(3, 2).double()
    return Whole(model, WeightDecay(model, "tensor"), Splits(loader, loader, loader, loader))


@pytest.mark.parametrize("size", CUTS)
def test_a_problem_measures_the_whole_split(size: int) -> None:
    problem = whole(Batches(INPUTS, LABELS, batch_size=size))
    joint = JointOptimizer(problem, MetaConfig(inner_steps=1))
    joint.step()
    before = joint.cost.example_passes
    with torch.no_grad():
        logits = problem.model(INPUTS)
    loss = float(F.cross_entropy(logits, LABELS))
    found = joint.evaluate("test", charge=True)
    expected = {"loss": loss, "perplexity": math.exp(loss), "spread": float(logits.std())}
    assert found == pytest.approx(
        {f"test_{name}": value for name, value in expected.items()}
        | {"test_error": float((logits.argmax(1) != LABELS).double().mean())}
    )
    assert joint.cost.example_passes - before == pytest.approx(12 / 3)


def test_the_batches_of_a_step_go_the_same_way() -> None:
    row = JointOptimizer(whole(cut(4, INPUTS, LABELS)), MetaConfig(inner_steps=1)).step()
    assert row["val_perplexity"] == pytest.approx(math.exp(row["val_loss"]))


class Tokens(Scored):
    """Counts words: the rows of a batch are as long as its longest."""

    def metrics(self, batch: Batch) -> Mapping[str, Any]:
        return {"loss": self.val_loss(batch)}

    def batch_size(self, batch: Batch) -> float:
        return 7.5 * len(batch[1])


def test_a_batch_size_of_ones_own_weighs_and_counts() -> None:
    joint = JointOptimizer(Tokens(cut(5, INPUTS, LABELS)), MetaConfig(inner_steps=1))
    with torch.no_grad():
        expected = float(joint.problem.val_loss((INPUTS, LABELS)))
    assert joint.evaluate("val") == {"val_loss": pytest.approx(expected)}
    assert joint.count_examples("val") == 12 * 7.5
    joint.step()
    assert joint.cost.unit == 5 * 7.5


def test_series_of_unequal_lengths_are_weighed_by_their_targets() -> None:
    lengths = [2, 9, 4]
    loader = [(torch.ones(1, n), torch.arange(float(n))[None]) for n in lengths]
    model = nn.Sequential(nn.Unflatten(1, (-1, 1)), nn.Linear(1, 1), nn.Flatten(1))
    problem = RegressionProblem(model, WeightDecay(model, "tensor"), Splits(*[loader] * 4))
    with torch.no_grad():
        errors = torch.cat([(model(x) - y).square().flatten() for x, y in loader])
    found = JointOptimizer(problem, MetaConfig()).evaluate("search")["search_loss"]
    assert found == pytest.approx(float(errors.mean()))


def test_numbers_of_every_make_are_taken() -> None:
    values = {"a": 1, "b": np.float32(0.5), "c": torch.tensor(2.0), "d": np.array([3.0]), "e": 0.25}
    assert as_numbers(values, "evaluate") == {"a": 1.0, "b": 0.5, "c": 2.0, "d": 3.0, "e": 0.25}


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (torch.tensor(1.0), "dict"),
        (None, "got None"),
        ([0.5], "got a list"),
        ({"recall": torch.zeros(3)}, "'recall': take its mean"),
        ({"recall": np.zeros(3)}, "'recall': take its mean"),
        ({"recall": None}, "got None"),
        ({"recall": "0.5"}, "got a str"),
        ({"recall": 1j}, "got a complex"),
        ({1: 0.5}, "got 1"),
        ({"": 0.5}, "got ''"),
        ({"two\nlines": 0.5}, "one line"),
    ],
)
@pytest.mark.parametrize("method", ["metrics", "evaluate"])
def test_what_is_no_number_is_refused(values: Any, told: str, method: str) -> None:
    problem = Scored(cut(4, INPUTS, LABELS))
    setattr(problem, method, lambda _: values)
    joint = JointOptimizer(problem, MetaConfig())
    with pytest.raises(UsageError, match=told) as caught:
        joint.evaluate("search")
    assert str(caught.value).startswith(method)


def test_means_are_over_the_same_examples() -> None:
    problem = Tokens(cut(5, INPUTS, LABELS))
    replies = iter([{"loss": 1.0}, {"loss": 1.0, "rare": 2.0}])
    setattr(problem, "metrics", lambda _: next(replies))  # noqa: B010 - a method, to mypy
    with pytest.raises(UsageError, match="the same names for every batch"):
        JointOptimizer(problem, MetaConfig()).evaluate("search")


@pytest.mark.parametrize("name", ["metrics", "evaluate", "batch_size"])
def test_an_attribute_must_not_hide_a_method(name: str) -> None:
    problem = Scored(cut(4, INPUTS, LABELS))
    setattr(problem, name, 32)
    with pytest.raises(UsageError, match=f"`{name}` must stay a method.*got int"):
        JointOptimizer(problem, MetaConfig())


def test_a_split_without_examples_is_named() -> None:
    problem = Tokens(cut(4, INPUTS, LABELS))
    setattr(problem, "batch_size", lambda _: 0)  # noqa: B010 - a method, to mypy
    joint = JointOptimizer(problem, MetaConfig())
    with pytest.raises(UsageError, match="nothing is measured on the search split"):
        joint.evaluate("search")
    with pytest.raises(UsageError, match="first batch of the train split"):
        joint.first_batch("train")
