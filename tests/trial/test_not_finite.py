"""A number that is not finite: it ends a trial where it decides, and is left empty elsewhere."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_problems import CONFIG, make_faulty, make_nothing, make_rare

from ift_tune import (
    Budget,
    ClassificationProblem,
    MetaConfig,
    UsageError,
    load_best,
    load_results,
    refit,
    run_single,
)
from ift_tune.base.status import Outcome, StopReason
from ift_tune.problem.batches import Batch
from ift_tune.trial.scored import BestEvaluation
from ift_tune.trial.training import BaselineTraining
from ift_tune.trial.trial import Trial

QUICK = replace(CONFIG, inner_lr=0.05)
BUDGET = Budget(outer_steps=6)


class Spoiled(ClassificationProblem):
    """Measures the search split well a few times, before the run too, and then a metric no more."""

    good = 3
    seen = 0
    metric = "loss"
    value = math.nan

    def evaluate(self, batches: Iterable[Batch]) -> Mapping[str, Any]:
        found = {**super().evaluate(batches), "accuracy": 0.5}
        if len(torch.cat([y for _, y in batches])) != 48:  # another split's, or one batch
            return found
        self.seen += 1
        return found if self.seen <= self.good else {**found, self.metric: self.value}


def make_spoiled(
    config: MetaConfig, device: torch.device, seed: int, **attributes: Any
) -> ClassificationProblem:
    plain = make_rare(config, device, seed)
    problem = Spoiled(plain.model, plain.hyper, plain.splits)
    vars(problem).update(attributes)
    return problem


def single(out: Path, factory: Any = make_rare, budget: Budget = BUDGET, **changes: Any) -> Outcome:
    settings: dict[str, Any] = {"config": QUICK, "device": "cpu"}
    return run_single(factory, budget, out=out, **(settings | changes))


def test_a_metric_that_is_only_reported_may_be_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outcome = single(tmp_path / "run", baseline=True)
    trials, steps = load_results(tmp_path / "run")
    assert outcome.stop_reason is StopReason.DONE
    assert steps["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert steps["search_precision"].isna().tolist() == [True] * 2 + [False] * 4
    assert steps["test_precision"].isna().tolist() == [True] + [False] * 5
    assert steps["test_loss"].notna().all()
    assert steps["val_test_gap"].notna().all()
    assert trials["retrained_search_precision"].notna().all()
    assert trials["baseline_test_precision"].notna().all()
    assert caplog.text.count("search_precision is nan, test_precision is nan:") == 2  # baseline too
    assert refit(tmp_path / "run", make_rare, data="train+val", device="cpu")


def test_what_decides_is_as_without_that_metric(tmp_path: Path) -> None:
    def plain(config: MetaConfig, device: torch.device, seed: int) -> ClassificationProblem:
        rare = make_rare(config, device, seed)
        return ClassificationProblem(rare.model, rare.hyper, rare.splits)

    single(tmp_path / "run")
    single(tmp_path / "plain", plain)
    with_it, without = (load_results(tmp_path / name) for name in ("run", "plain"))
    for one, other in zip(with_it, without, strict=True):
        same = [name for name in other if name not in ("run_id", "wall_seconds")]
        assert one[same].equals(other[same])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_earlier_number_does_not_stand_for_one_that_is_missing(
    value: float, tmp_path: Path
) -> None:
    factory = functools.partial(make_spoiled, metric="accuracy", value=value, good=2)
    first = single(tmp_path, factory)
    assert first.metrics["best_step"] > 1
    assert first.metrics["search_accuracy"] is None
    trials, steps = load_results(tmp_path)
    assert steps["search_accuracy"].notna().tolist() == [True] + [False] * 5
    assert trials["search_accuracy"].isna().all()
    again = single(tmp_path, make_nothing, resume=True)
    assert again.metrics.get("search_accuracy") is None


def test_what_is_missing_at_the_best_evaluation_is_not_taken_from_the_last(tmp_path: Path) -> None:
    factory = functools.partial(make_rare, bias=-3.0)
    budget = Budget(outer_steps=8)
    first = single(tmp_path, factory, budget, config=CONFIG)
    assert first.metrics["search_precision"] is None
    steps = load_results(tmp_path).steps.set_index("step")["search_precision"]
    assert math.isnan(steps[first.metrics["best_step"]])
    assert steps[8] == 1.0
    again = single(tmp_path, make_nothing, budget, config=CONFIG, resume=True)
    assert again.metrics.get("search_precision") is None


@pytest.mark.parametrize(
    ("metric", "mode", "spoiled"),
    [(None, None, "error"), ("search_loss", None, "loss"), ("search_accuracy", "max", "accuracy")],
)
def test_where_it_decides_the_trial_ends_and_says_why(
    metric: str | None,
    mode: str | None,
    spoiled: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    factory = functools.partial(make_spoiled, metric=spoiled)
    outcome = single(tmp_path, factory, metric=metric, mode=mode)
    assert outcome.stop_reason is StopReason.NONFINITE
    assert outcome.metrics["step"] == 2
    assert outcome.fault.startswith(f"search_{spoiled} is nan, and it decides: ")
    assert f"the run ended nonfinite. search_{spoiled} is nan, and it decides: " in caplog.text
    assert f"search_{spoiled} is nan" in repr(outcome)
    assert load_results(tmp_path).trials["fault"].tolist() == [outcome.fault]
    assert single(tmp_path, factory, metric=metric, mode=mode, resume=True).fault == outcome.fault


def test_the_model_of_the_best_evaluation_before_is_named_and_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outcome = single(tmp_path, make_spoiled, metric="search_loss")
    folder = str(tmp_path / "trial-00000")
    assert f"load_best({folder!r}, make_problem)" in caplog.text
    with pytest.raises(UsageError) as refused:
        load_best(tmp_path, make_spoiled, device="cpu")
    assert f"load_best({folder!r}, make_problem)" in str(refused.value)
    best = load_best(folder, make_spoiled, device="cpu")
    assert best.measure("search")["loss"] == pytest.approx(outcome.value)


def test_lost_weights_end_a_plain_training_whose_error_is_still_a_number() -> None:
    trial = Trial(
        functools.partial(make_faulty, fault="nan", after=3),
        QUICK,
        Budget(outer_steps=10),
        device="cpu",
        training=BaselineTraining(20),
        selection=BestEvaluation(),
    )
    trial.setup()
    while trial.stop_reason is None:
        trial.step()
    assert trial.stop_reason is StopReason.NONFINITE
    assert trial.joint.outer_steps == 4
    assert trial.fault.startswith("search_loss is nan")
    assert math.isfinite(trial.joint.evaluate("search", finite=False)["search_error"])
