"""Arms that mix the sources of the training data as nobody has learned to."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from ift_tune import (
    Batches,
    Budget,
    ClassificationProblem,
    Comparison,
    Compose,
    DomainWeights,
    ExampleWeights,
    MetaConfig,
    Neumann,
    Splits,
    UsageError,
    WeightDecay,
    run_comparison,
)
from ift_tune.compare.arms import ARMS
from ift_tune.compare.comparison import SearchState
from ift_tune.hyper import kinds_in

SOURCES = ["code"] * 9 + ["web"] * 3
FRESH = SearchState(spent=0.0, best=math.inf, trials=0, exhausted=False)


def make(
    config: MetaConfig, device: torch.device, seed: int, cap: float | None = None
) -> ClassificationProblem:
    """Two sources of unequal size, learned proportions and a decay."""
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int) -> tuple[Tensor, Tensor]:
        inputs = torch.randn(size, 3, generator=generator)
        return inputs, (inputs[:, 0] > 0).long()

    splits = Splits(
        train=Batches(*draw(12), torch.arange(12), batch_size=4, seed=seed),
        val=Batches(*draw(6)),
        search=Batches(*draw(6)),
        test=Batches(*draw(6)),
    )
    model = nn.Linear(3, 2)
    mixture = DomainWeights(SOURCES, init={"code": 0.6, "web": 0.4}, max_repetition=cap)
    decay = WeightDecay(model, "model", init=0.1)
    return ClassificationProblem(model, Compose({"mix": mixture, "decay": decay}), splits)


def make_capped(config: MetaConfig, device: torch.device, seed: int) -> ClassificationProblem:
    return make(config, device, seed, cap=1.9)  # "web" is a quarter: uniform takes it twice


COMPARISON = Comparison(
    make,
    Budget(gradient_equivalents=60.0),
    config=MetaConfig(inverse=Neumann(terms=1), inner_steps=2, meta_lr=0.1),
    trial_budget=Budget(outer_steps=3),
    training_steps=5,
    device="cpu",
)


@pytest.mark.parametrize(
    ("arm", "expected"), [("uniform", [0.5, 0.5]), ("proportional", [0.75, 0.25])]
)
def test_every_training_has_the_proportions_and_the_point_sets_the_rest(
    arm: str, expected: list[float]
) -> None:
    hyper = make(COMPARISON.config, torch.device("cpu"), 0).hyper
    search = ARMS[arm].search(COMPARISON, hyper)
    assert search.space is not None
    assert set(search.space.distributions) == {"decay.decay", "inner_lr"}
    assert search.first is not None
    for point in (search.first, {"decay.decay": 0.5, "inner_lr": 1e-2}):
        trial = ARMS[arm].trials.trial(COMPARISON, point, FRESH, seed=3, device="cpu")
        trial.setup()
        learned = trial.joint.problem.hyper
        (mixture,) = kinds_in(learned, DomainWeights)
        assert mixture().tolist() == pytest.approx(expected)
        assert isinstance(learned, Compose)
        assert learned["decay"].coarse_space()["decay"].start == pytest.approx(point["decay.decay"])


def test_they_run_beside_ift_and_are_among_the_usual_arms(tmp_path: Path) -> None:
    found = run_comparison(COMPARISON, out=tmp_path / "run", seeds=1).trials
    assert {"uniform", "proportional", "ift", "random"} <= set(found["arm"])
    assert "loss-ranking" not in set(found["arm"])


def test_a_task_without_sources_or_whose_bounds_forbid_it_is_none_for_them() -> None:
    trials = ARMS["uniform"].trials
    assert "no DomainWeights" in str(trials.refusal(ExampleWeights(4)))
    hyper = make_capped(COMPARISON.config, torch.device("cpu"), 0).hyper
    before = hyper.state_dict()["kinds.mix.raw"].clone()
    assert "out of bounds" in str(trials.refusal(hyper))
    assert ARMS["proportional"].trials.refusal(hyper) is None
    assert torch.equal(hyper.state_dict()["kinds.mix.raw"], before)


@pytest.mark.parametrize("start", ["proportional", "uniform"])
@pytest.mark.parametrize(("floor", "cap"), [(0.0, None), (0.05, None), (0.05, 2.5)])
def test_proportions_that_are_set_are_the_proportions(
    start: Literal["proportional", "uniform"], floor: float, cap: float | None
) -> None:
    kind = DomainWeights(SOURCES, floor=floor, max_repetition=cap, init={"code": 0.7, "web": 0.3})
    fresh = DomainWeights(SOURCES, floor=floor, max_repetition=cap, init=start)
    kind.set_proportions(start)
    torch.testing.assert_close(kind(), fresh())
    with pytest.raises(UsageError, match="init must"):
        kind.set_proportions({"code": 1.5, "web": -0.5})
    torch.testing.assert_close(kind(), fresh())


def test_a_kind_none_of_whose_parameters_are_given_stays_as_it_is() -> None:
    model = nn.Linear(2, 2)
    hyper = Compose({name: WeightDecay(model, "model", init=0.25) for name in ("a", "ab")})
    hyper.set_coarse({"ab.decay": 0.5})
    assert hyper["a"].coarse_space()["decay"].start == pytest.approx(0.25)
    assert hyper["ab"].coarse_space()["decay"].start == pytest.approx(0.5)
