"""Batches in pieces: micro-batches and means are those of the whole, however much counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence

from ift_tune import (
    Batches,
    BilevelProblem,
    ClassificationProblem,
    ClassWeights,
    Dense,
    ExampleScorer,
    Splits,
    UsageError,
    WeightDecay,
)
from ift_tune.implicit.hypergradient import solve
from ift_tune.implicit.vectors import relative_error
from ift_tune.joint.memory import separable_losses
from ift_tune.problem.losses import linearise_problem
from ift_tune.problem.micro_batches import MicroBatch, parts_of, random_parts

ROWS, PLACES, CLASSES = 32, 5, 3


def tagged(alike: int) -> tuple[Tensor, Tensor]:
    """Return texts and the tags of their tokens: all of the first texts, some of the others."""
    generator = torch.Generator().manual_seed(alike)
    texts = torch.randn(ROWS, PLACES, 4, generator=generator, dtype=torch.float64)
    tags = torch.randint(CLASSES, (ROWS, PLACES), generator=generator)
    absent = torch.rand(ROWS, PLACES, generator=generator) < torch.rand(
        ROWS, 1, generator=generator
    )
    absent[:alike] = False
    return texts, tags.masked_fill(absent, -100)


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, CLASSES, dtype=torch.float64)

    def forward(self, texts: Tensor) -> Tensor:
        outputs: Tensor = self.layer(texts).transpose(1, 2)
        return outputs


def ready_made(data: Batches) -> BilevelProblem:
    return ClassificationProblem(Tagger(), ClassWeights(CLASSES).double(), Splits(*[data] * 4))


def scored(data: Batches) -> BilevelProblem:
    scorer = ExampleScorer(sees="loss", hidden=2).double()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in scorer.parameters():
            parameter.add_(torch.randn_like(parameter))
    return ClassificationProblem(Tagger(), scorer, Splits(*[data] * 4))


class Handmade(BilevelProblem):
    """A loss of the user's own that leaves padding out, and does not say so."""

    def __init__(self, data: Batches) -> None:
        self.model, self.splits = Tagger(), Splits(*[data] * 4)
        self.hyper = ClassWeights(CLASSES).double()

    def train_loss(self, batch: Any) -> Tensor:
        texts, tags = batch
        loss: Tensor = F.cross_entropy(self.model(texts), tags) * self.hyper().mean()
        return loss

    def val_loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])


class Counting(Handmade):
    def loss_size(self, batch: Any) -> float | Tensor:
        counted: Tensor = (batch[1] != -100).sum()
        return counted


@pytest.mark.parametrize("make", [ready_made, scored, Counting])
@pytest.mark.parametrize("alike", [0, 8, 20])
@pytest.mark.parametrize("sizes", [MicroBatch(8, 8), MicroBatch(5, 1), MicroBatch(None, 31)])
def test_micro_batches_give_the_hypergradient_of_the_whole_whatever_counts(
    make: Any, alike: int, sizes: MicroBatch
) -> None:
    batch = tagged(alike)
    problem = make(Batches(*batch))
    assert separable_losses(problem, batch, batch) == (True, True)
    inverse = Dense(damping=0.1)
    whole = linearise_problem(problem, batch, batch)
    parts = linearise_problem(problem, batch, batch, micro_batch=sizes)
    for one, other in ((parts.train_loss, whole.train_loss), (parts.val_loss, whole.val_loss)):
        assert float(one) == pytest.approx(float(other), rel=1e-12)
    exact = solve(whole, inverse, absent=set()).grads
    assert relative_error(solve(parts, inverse, absent=set()).grads, exact) < 1e-9


def test_a_loss_that_leaves_something_out_and_does_not_say_so_is_taken_whole() -> None:
    batch = tagged(8)  # so that the first ones, which are alike, do not tell
    assert separable_losses(Handmade(Batches(*batch)), batch, batch) == (False, False)


def test_parts_that_count_nothing_are_left_out() -> None:
    texts, tags = tagged(0)
    tags[:16] = -100
    (part, share), *others = parts_of(ready_made(Batches(texts, tags)), (texts, tags), 16)
    assert (share, others) == (1.0, [])
    assert torch.equal(part[1], tags[16:])


@pytest.mark.parametrize(
    "cut", [lambda p, b: parts_of(p, b, 1), lambda p, b: random_parts(b, 2, 0)]
)
@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (pack_sequence([torch.ones(3, 2), torch.ones(2, 2)]), "got a PackedSequence"),
        ((torch.eye(3).to_sparse(), torch.ones(3)), "layout torch.sparse_coo"),
        ((torch.ones(4), torch.ones(3)), "got tensors with 3 and 4 rows"),
    ],
)
def test_what_cannot_be_cut_is_refused(cut: Any, batch: Any, message: str) -> None:
    with pytest.raises(UsageError, match=f"micro-batches only if.*{message}"):
        cut(ready_made(Batches(*tagged(0))), batch)


def test_a_number_for_the_whole_batch_belongs_to_each_part() -> None:
    batch = {"texts": torch.ones(6, 2), "scale": torch.tensor(0.5)}
    for part in random_parts(batch, 3, 0):
        assert part["texts"].shape == (2, 2)
        assert float(part["scale"]) == 0.5


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("kind", ["chances", "numbers", "probabilities"])
def test_means_over_a_split_do_not_depend_on_how_it_is_cut(kind: str, many: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    torch.manual_seed(1)
    single = kind == "chances"
    columns = 1 if single else 2
    places = 3 if many else 1  # answers to an example
    model = nn.Sequential(
        nn.Linear(4, places * columns), nn.Unflatten(1, (columns, places))
    ).double()
    targets = torch.randint(2, (12, places), generator=generator)
    if kind == "probabilities":
        targets = F.one_hot(targets, 2).transpose(1, 2).double()
    else:
        targets[torch.rand(12, places, generator=generator) < 0.4] = -100
        targets = targets.double() if single else targets
    found = []
    for size in (12, 5, 1):
        data = Batches(inputs, targets, batch_size=size, shuffle=False)
        problem = ClassificationProblem(model, WeightDecay(model, "tensor"), Splits(*[data] * 4))
        found.append(problem.measure("test"))
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[0] == pytest.approx(found[2], rel=1e-6)
    with torch.no_grad():
        logits = model(inputs)
    if single:
        logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
    right = targets if kind == "probabilities" else targets.long()
    assert found[0]["loss"] == pytest.approx(float(F.cross_entropy(logits, right)), rel=1e-6)


class Successors(nn.Module):
    """Computes its own loss, of each token's successor; its logits may be all alike."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.words = nn.Embedding(7, 7)
        self.scale = scale

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.scale * self.words(ids)
        if labels is None:
            return {"logits": logits}
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"logits": logits, "loss": loss}


def continued(model: Successors, size: int) -> ClassificationProblem:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(7, (8, 12), generator=generator)
    labels = ids.clone()
    labels[:4, 3:] = -100
    data = Batches({"ids": ids, "labels": labels}, batch_size=size, shuffle=False)
    return ClassificationProblem(model, WeightDecay(model, "tensor"), Splits(*[data] * 4))


def test_of_a_loss_of_successors_the_first_target_does_not_count() -> None:
    model = Successors(1.0)
    state = torch.random.get_rng_state()
    found = [continued(model, size).measure("test") for size in (8, 4, 2)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[0] == pytest.approx(found[2], rel=1e-6)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_whoever_predicts_all_alike_is_asked_again() -> None:
    model = Successors(0.0)
    problem = continued(model, 4)
    problem.measure("test")
    model.scale = 1.0
    whole = continued(model, 8).measure("test")
    assert problem.measure("test") == pytest.approx(whole, rel=1e-6)
