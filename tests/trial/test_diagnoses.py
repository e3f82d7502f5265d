"""What a trial's rows say against its result: rows that have a fault, and rows that have none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from ift_tune import Budget, JointOptimizer, MetaConfig, Neumann, testing
from ift_tune.problem.problem import BilevelProblem
from ift_tune.trial.diagnoses import counted, diagnose, joined, split
from ift_tune.trial.session import run_single
from ift_tune.trial.tables import load_results

STEPS = 20
HEALTHY: dict[str, Any] = {
    "step": np.arange(1, STEPS + 1),
    "train_loss": np.linspace(1.0, 0.2, STEPS),
    "search_loss": np.linspace(2.0, 1.0, STEPS),
    "solve_status": ["truncated"] * STEPS,
    "alpha_lambda_max": [1.0] * STEPS,
    "skipped": [0.0] * STEPS,
    "hypergradient_norm": np.linspace(1.0, 0.5, STEPS),
    "hypergradient_agreement": [np.nan] + [0.7] * (STEPS - 1),
    "hypergradient_signal": [np.nan] * 4 + [2.0] + [np.nan] * 14 + [1.2],
    "memorised": [0.0] * STEPS,
    "hyper_change": np.linspace(0.1, 2.0, STEPS),
}
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "moved": ({"hyper_change": [0.29] * STEPS}, "λ hardly moved: by 0.29 in 20 steps"),
    "zero": (
        {
            "train_loss": np.geomspace(1, 1e-5, STEPS),
            "hypergradient_norm": np.geomspace(1, 1e-4, 20),
        },
        "the training loss is zero, so λ gets no signal",
    ),
    "memorised": (
        {"train_loss": np.geomspace(1, 1e-5, STEPS), "memorised": [0.0] * 12 + [1.0] * 8},
        "the training loss is zero, so λ gets no signal",
    ),
    "by heart": (
        {"train_error": [0.2] * 5 + [0.0] * 15, "val_error": np.linspace(0.25, 0.4, STEPS)},
        "every training label is fitted: train_error is 0 at the end, and val_error has risen from",
    ),
    "faint": (
        {"hypergradient_signal": [np.nan] * 4 + [2.0] + [np.nan] * 14 + [0.3]},
        "the hypergradient is below its noise: 0.3 times its standard error",
    ),
    "small": ({"alpha_lambda_max": [0.02] * STEPS}, "α·λ_max is tiny: 0.02 in the median"),
    "large": (
        {"alpha_lambda_max": [2.5] * 3 + [1.0] * 17},
        "α·λ_max is beyond 2: in 15% of the steps",
    ),
    "noise": ({"hypergradient_agreement": [0.1] * STEPS}, "the hypergradient is below its noise"),
    "skips": ({"skipped": [1.0] * 3 + [0.0] * 17}, "steps of λ were left out: 15%"),
    "negative": (
        {"solve_status": ["negative_curvature"] * 11 + ["converged"] * 9},
        "most solves met negative curvature (55 %): the Hessian",
    ),
    "singular": ({"solve_status": ["singular"] * STEPS}, "most solves met singular (100 %)"),
    "early": (
        {"search_loss": [*np.linspace(2.0, 0.5, 6), *np.linspace(0.6, 1.5, 14)]},
        "the best step was long before the last: search_loss was 0.5 at step 6 and 1.5 at step 20",
    ),
}


def table(**changes: Any) -> pd.DataFrame:
    return pd.DataFrame(HEALTHY | changes)


def test_nothing_is_said_against_a_healthy_trial() -> None:
    assert diagnose(table()) == []
    assert joined([]) == ""


@pytest.mark.parametrize("name", FAULTS)
def test_each_is_said_alone_and_names_a_mend(name: str) -> None:
    changes, expected = FAULTS[name]
    (sentence,) = diagnose(table(**changes))
    assert sentence.startswith(expected)
    settings = ("meta_lr", "inner", "alpha", "batches", "outer steps", "damping", "weight decay")
    assert any(word in sentence.rpartition(":")[2] for word in settings)


def test_a_few_steps_say_nothing() -> None:
    assert diagnose(table(hyper_change=[0.0] * STEPS)[:4]) == []


def test_a_small_training_loss_is_no_fault_while_the_hypergradient_is_there() -> None:
    assert diagnose(table(train_loss=np.geomspace(1.0, 1e-5, STEPS))) == []


def test_a_training_error_of_zero_is_no_fault_while_the_validation_error_falls() -> None:
    falls = {"train_error": [0.0] * STEPS, "val_error": np.linspace(0.4, 0.25, STEPS)}
    assert diagnose(pd.DataFrame({**HEALTHY, **falls})) == []


def test_the_best_step_is_best_in_the_direction_of_the_metric() -> None:
    rising = table(search_auc=[*np.linspace(0.5, 0.9, 6), *np.linspace(0.89, 0.6, 14)])
    (sentence,) = diagnose(rising, "search_auc", "max")
    assert "search_auc was 0.9 at step 6" in sentence
    assert diagnose(table(search_auc=np.linspace(0.5, 0.9, STEPS)), "search_auc", "max") == []


def test_an_entry_of_the_table_holds_all_sentences_and_trials_are_counted() -> None:
    both = diagnose(table(**(FAULTS["moved"][0] | FAULTS["small"][0])))
    assert split(joined(both)) == both
    assert split(np.nan) == []
    entries = pd.Series([joined(both), joined(both[:1]), None])
    assert counted(entries) == [
        "in 2 of 3 trials λ hardly moved",
        "in 1 of 3 trials α·λ_max is tiny",
    ]


def test_black_box_rows_have_no_hypergradient_to_speak_of() -> None:
    assert diagnose(table()[["step", "search_loss"]]) == []
    assert diagnose(pd.DataFrame({"step": range(9)}), "search_f1") == []


def make_problem(config: MetaConfig, device: torch.device, seed: int) -> BilevelProblem:
    return testing.Quadratic(seed=seed)


def test_a_run_says_it_in_its_table(tmp_path: Path) -> None:
    config = MetaConfig(inverse=Neumann(terms=2, alpha=1e-4), inner_steps=1, meta_lr=1e-6)
    run_single(make_problem, Budget(outer_steps=6, retrain=False), out=tmp_path, config=config)
    (entry,) = load_results(tmp_path).trials["diagnoses"]
    heads = [sentence.partition(":")[0] for sentence in split(entry)]
    assert heads == ["λ hardly moved", "α·λ_max is tiny"]


@pytest.mark.parametrize("optimizer", ["adam", "momentum", "sgd"])
def test_agreement_is_the_cosine_with_the_mean_of_earlier_hypergradients(optimizer: str) -> None:
    problem = testing.Quadratic(seed=0)
    config = MetaConfig(inner_steps=2, inner_lr=0.1, meta_lr=0.05, meta_optimizer=optimizer)
    grads: list[torch.Tensor] = []

    class Keep:
        def on_outer_step_begin(self, joint: JointOptimizer) -> None: ...
        def on_hypergradient(self, joint: JointOptimizer, result: Any) -> None:
            grads.append(torch.cat([g.flatten() for g in result.grads]).double())

        def on_outer_step_end(self, joint: JointOptimizer, metrics: dict[str, float]) -> None: ...

    start = [h.detach().clone() for h in problem.hypers()]
    joint = JointOptimizer(problem, config, callbacks=[Keep()])
    rows = [joint.step() for _ in range(4)]
    said = [row.get("hypergradient_agreement") for row in rows]
    if optimizer == "sgd":
        assert said == [None] * 4
    else:
        assert said[0] is None
        keep, mean = (0.9, torch.zeros_like(grads[0]))
        for gradient, value in zip(grads, said, strict=True):
            if value is not None:
                cosine = float(mean @ gradient / (mean.norm() * gradient.norm()))
                assert value == pytest.approx(cosine, rel=1e-5)
            mean = keep * mean + gradient
    moved = torch.cat(
        [(h.detach() - s).flatten() for h, s in zip(problem.hypers(), start, strict=True)]
    )
    spread = torch.cat([s.flatten() for s in start]).std(correction=0)
    scale = float(spread) if spread > 1e-6 else 1.0
    expected = float(moved.square().mean().sqrt()) / scale
    assert joint.hyper_change() == pytest.approx(expected, rel=1e-5)
