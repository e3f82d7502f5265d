"""What decides over a trial: its metric in its direction, on the search split, and nothing else."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_problems import CONFIG, make_tiny
from torch import Tensor

from ift_tune import Budget, MetaConfig, UsageError, load_results
from ift_tune.base.status import StopReason
from ift_tune.hyper.supervised import ClassificationProblem
from ift_tune.problem.batches import Batch
from ift_tune.trial.scored import BestEvaluation
from ift_tune.trial.session import run_single
from ift_tune.trial.trial import Trial

# Steps so large that the values go up and down.
WILD = MetaConfig(meta_lr=0.1, inner_steps=3, inner_lr=0.3, inner_optimizer="sgd")


class Scored(ClassificationProblem):
    """Measures the share of right answers, and how sure they are; no error, no loss."""

    def metrics(self, batch: Batch) -> dict[str, Tensor]:
        logits = self.model(batch[0])
        right = logits.softmax(1).gather(1, batch[1][:, None])
        share = (logits.argmax(1) == batch[1]).double().mean()
        return {"accuracy": share, "sureness": right.mean()}


class BadTest(ClassificationProblem):
    """What it measures is NaN on the test split from some evaluation on."""

    good = 0
    seen = 0

    def metrics(self, batch: Batch) -> dict[str, Tensor]:
        found = super().metrics(batch)
        if batch[0].data_ptr() not in self._test():
            return found
        self.seen += 1
        return found if self.seen <= self.good else {k: v * math.nan for k, v in found.items()}

    def _test(self) -> set[int]:
        return {batch[0].data_ptr() for batch in self.splits.test}


def make(
    config: MetaConfig,
    device: torch.device,
    seed: int,
    *,
    kind: type[ClassificationProblem],
    good: int = 0,
) -> ClassificationProblem:
    tiny = make_tiny(config, device, seed)
    problem = kind(tiny.model, tiny.hyper, tiny.splits)
    if isinstance(problem, BadTest):
        problem.good = good
    return problem


make_scored = functools.partial(make, kind=Scored)


def to_the_end(trial: Trial) -> list[dict[str, Any]]:
    trial.setup()
    rows = []
    while trial.stop_reason is None:
        row = trial.step()
        assert row is not None
        rows.append(row)
    return rows


@pytest.mark.parametrize(("mode", "best_of"), [("min", min), ("max", max)])
def test_the_best_evaluation_is_best_in_the_metrics_direction(mode: str, best_of: Any) -> None:
    trial = Trial(
        make_scored,
        WILD,
        Budget(outer_steps=8),
        device="cpu",
        metric="search_sureness",
        mode=mode,
        selection=BestEvaluation(),
    )
    rows = to_the_end(trial)
    values = [row["search_sureness"] for row in rows]
    assert len(set(values)) > 1
    for number, row in enumerate(rows, 1):
        assert row["best_value"] == best_of(values[:number])
    best = best_of(values)
    assert trial.value == best
    assert rows[-1]["best_step"] == values.index(best) + 1


@pytest.mark.parametrize(
    ("incumbent", "retrained"), [(0.0, True), (1.0, False), (-math.inf, True), (None, True)]
)
def test_only_what_beats_the_incumbent_is_retrained(
    incumbent: float | None, retrained: bool
) -> None:
    trial = Trial(
        make_scored,
        CONFIG,
        Budget(outer_steps=2),
        device="cpu",
        metric="search_sureness",
        mode="max",
        selection=BestEvaluation(
            retraining=lambda _: {"retrained_test_sureness": 0.5}, incumbent=incumbent
        ),
    )
    rows = to_the_end(trial)
    scored = rows[-1] | trial.finish()
    assert scored["retrained_test_sureness"] == (0.5 if retrained else None)


def test_early_stopping_waits_for_a_higher_value_of_what_is_maximised() -> None:
    def steps(mode: str) -> int:
        selection = BestEvaluation(patience=2)
        trial = Trial(
            make_scored,
            MetaConfig(meta_lr=1e-3, inner_steps=5, inner_lr=0.01),
            Budget(outer_steps=12),
            device="cpu",
            metric="search_sureness",
            mode=mode,
            selection=selection,
        )
        return len(to_the_end(trial))

    # As the training goes on, the right answers become surer.
    assert steps("min") < steps("max")


@pytest.mark.parametrize("metric", [None, "search_auc", "test_accuracy"])
def test_a_missing_metric_is_an_error_at_the_first_evaluation(metric: str | None) -> None:
    mode = None if metric is None else "max"
    budget = Budget(outer_steps=4, eval_every=2)
    trial = Trial(make_scored, CONFIG, budget, device="cpu", metric=metric, mode=mode)
    trial.setup()
    trial.step()
    with pytest.raises(UsageError, match="choose a metric from search_accuracy, search_sureness"):
        trial.step()


def test_metric_and_mode_stand_in_the_run(tmp_path: Path) -> None:
    outcome = run_single(
        make_scored,
        Budget(outer_steps=2, retrain=False),
        out=tmp_path / "run",
        config=CONFIG,
        device="cpu",
        metric="search_accuracy",
        mode="max",
    )
    assert (outcome.metric, outcome.mode) == ("search_accuracy", "max")
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (run["metric"], run["mode"]) == ("search_accuracy", "max")
    assert load_results(tmp_path / "run").trials.attrs["run"]["mode"] == "max"
    with pytest.raises(UsageError, match="another mode"):
        run_single(
            make_scored,
            Budget(outer_steps=2, retrain=False),
            out=tmp_path / "run",
            config=CONFIG,
            device="cpu",
            metric="search_accuracy",
            mode="min",
            resume=True,
        )


@pytest.mark.parametrize("good", [0, 2])
def test_a_test_split_that_is_not_finite_decides_nothing(
    good: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(name: str, kind: type[ClassificationProblem], **more: Any) -> Any:
        factory = functools.partial(make, kind=kind, **more)
        out = tmp_path / name
        outcome = run_single(factory, Budget(outer_steps=4), out=out, config=CONFIG, device="cpu")
        return outcome, load_results(out)

    outcome, bad = run("bad", BadTest, good=good)
    assert "test_loss is nan, test_error is nan: what is not finite is left empty" in caplog.text
    _, right = run("right", ClassificationProblem)
    assert outcome.stop_reason is StopReason.DONE
    assert bad.trials["status"].tolist() == ["complete"]
    decided = [c for c in right.steps if c.startswith(("train_", "val_l", "val_e", "search_"))]
    assert bad.steps[decided].equals(right.steps[decided])
    # The last evaluation's value is missing: an earlier one does not stand in its place.
    for column in ("test_loss", "test_error"):
        assert bad.steps[column].notna().tolist() == [True] * good + [False] * (4 - good)
        assert bad.trials[column].isna().all()
    # The retrained weights measure NaN too, as the factory is the same.
    assert good or bad.trials["retrained_test_error"].isna().all()


def test_a_baselines_own_score_is_left_empty_with_its_test_split() -> None:
    trial = Trial(
        functools.partial(make, kind=BadTest, good=1),
        CONFIG,
        Budget(outer_steps=3),
        device="cpu",
        selection=BestEvaluation(),
    )
    rows = to_the_end(trial)
    later = [row for row in rows if row["best_step"] > 1]
    assert later  # a better evaluation came, whose test value is not known
    assert all(row["retrained_test_loss"] is None for row in later)
    assert trial.finish()["retrained_test_loss"] is None
