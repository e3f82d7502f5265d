"""What a kind's network is given: one tensor, with a name or without, in the network's type."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ift_tune
from ift_tune.hyper import AugmentationNetwork, Compose, ExampleScorer, HyperKind, WeightDecay
from ift_tune.testing import check_hypergradient

ROWS = 12


class Pixels(nn.Module):
    """Takes its one input by name."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(16, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.last(pixels.flatten(1))
        return logits


def moved(kind: HyperKind) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in kind.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return kind


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    inputs = torch.randn(ROWS, 1, 4, 4, dtype=dtype)
    return inputs, torch.randint(3, (ROWS,)), torch.arange(ROWS)


def made(kind: HyperKind, batch: Any, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    splits = ift_tune.Splits(*[[batch]] * 4)
    return ift_tune.ClassificationProblem(Pixels().to(dtype), kind, splits)


ARRAY = np.random.default_rng(0).random((ROWS, 5))  # in double precision
KINDS: dict[str, Any] = {
    "inputs": lambda: ExampleScorer(16, hidden=3),
    "loss": lambda: ExampleScorer(sees="loss", hidden=3),
    "array": lambda: ExampleScorer(features=torch.as_tensor(ARRAY)),
    "function": lambda: ExampleScorer(4, features=lambda x: x.flatten(2).mean(1)[:, :4], hidden=3),
    "module": lambda: ExampleScorer(4, features=nn.Sequential(nn.Flatten(), nn.Linear(16, 4))),
    "augment": lambda: AugmentationNetwork(1, width=2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", KINDS)
def test_kinds_take_data_of_either_precision(name: str, dtype: torch.dtype) -> None:
    batch = data(dtype)
    torch.manual_seed(5)
    problem = made(moved(KINDS[name]()), batch, dtype)
    torch.manual_seed(6)
    loss = problem.train_loss(batch)
    assert loss.dtype == dtype
    grads = torch.autograd.grad(loss, problem.hypers())
    assert all(g.dtype == torch.float32 for g in grads)
    torch.manual_seed(5)
    single = made(moved(KINDS[name]()), data(), torch.float32)
    single.model.load_state_dict(problem.model.state_dict())
    torch.manual_seed(6)
    expected = single.train_loss(tuple(t.float() if t.is_floating_point() else t for t in batch))
    torch.testing.assert_close(loss.float(), expected, rtol=1e-5, atol=1e-6)
    joint = ift_tune.JointOptimizer(problem, ift_tune.MetaConfig(inner_steps=1))
    joint.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_changed_images_stay_in_their_precision(dtype: torch.dtype) -> None:
    images = torch.randn(2, 1, 4, 4, dtype=dtype)
    assert AugmentationNetwork(1).inputs(images, None).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_encoder_sees_its_own_precision(dtype: torch.dtype) -> None:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 4)).to(dtype)
    kind, inputs = moved(ExampleScorer(4, features=encoder)), data()[0]
    features = encoder(inputs.to(dtype)).detach().float()
    torch.testing.assert_close(kind.scores(inputs), kind(features).detach())
    assert encoder[1].weight.dtype == dtype


WEIGHTS = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "features",
    [nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), lambda x: x.flatten(1) @ WEIGHTS],
    ids=["module", "function"],
)
def test_the_hypergradient_of_a_scorer_with_an_encoder_can_be_checked(features: Any) -> None:
    scorer = moved(ExampleScorer(4, features=features, hidden=2))
    problem = made(scorer, data()[:2])
    problem.hyper = Compose({"scorer": scorer, "decay": WeightDecay(problem.model, init=0.1)})
    assert check_hypergradient(problem).passed


def test_a_functions_own_errors_are_its_own() -> None:
    calls = []

    def wrong(inputs: Tensor) -> Tensor:
        calls.append(inputs.dtype)
        raise RuntimeError("no such thing")

    with pytest.raises(RuntimeError, match="no such thing"):
        ExampleScorer(4, features=wrong).scores(data()[0])
    assert calls == [torch.float32]


@pytest.mark.parametrize("name", KINDS)
def test_one_input_with_a_name_is_as_one_without(name: str) -> None:
    inputs, targets, index = data()
    losses = []
    for batch in ((inputs, targets, index), {"pixels": inputs, "labels": targets, "index": index}):
        torch.manual_seed(5)
        problem = made(moved(KINDS[name]()), batch)
        torch.manual_seed(6)
        losses.append(problem.train_loss(batch))
    assert torch.equal(losses[0], losses[1])


def test_scores_take_what_the_loader_gives() -> None:
    inputs, scorer = data()[0], moved(ExampleScorer(16, hidden=3))
    assert torch.equal(scorer.scores({"pixels": inputs}), scorer.scores(inputs))
    own = ExampleScorer(nn.Sequential(nn.Flatten(), nn.Linear(16, 1)))
    found = own.weigh_seen(torch.ones(ROWS), {"pixels": inputs}, None)
    torch.testing.assert_close(found, own(inputs))
