"""A run that goes on to a larger budget has the numbers of one that was so long from the start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from small_problems import CONFIG, StopAt, comparable, make_rare, make_tiny

from ift_tune import Budget, load_best, load_results, run_single
from ift_tune.base.errors import Interrupted
from ift_tune.base.status import Outcome, StopReason

WILD = replace(CONFIG, inner_lr=0.3, meta_lr=0.2)  # whose values go up and down
COST = "gradient_equivalents"


def single(out: Path, budget: Budget, factory: Any = make_tiny, **changes: Any) -> Outcome:
    settings: dict[str, Any] = {"config": WILD, "device": "cpu", "metric": "search_loss"}
    return run_single(factory, budget, out=out, **(settings | changes))


def assert_same_runs(one: Path, other: Path, factory: Any = make_tiny) -> None:
    for a, b in zip(load_results(one), load_results(other), strict=True):
        kept, expected = (comparable(table).drop(columns="run_id") for table in (a, b))
        pd.testing.assert_frame_equal(kept, expected, check_exact=True)
    mine, theirs = (load_best(path, factory, device="cpu") for path in (one, other))
    for w, other_w in zip(mine.weights(), theirs.weights(), strict=True):
        assert torch.equal(w, other_w)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("first", [2, 7, 10])
def test_where_the_earlier_budget_ended_between_two_evaluations(
    first: int, seed: int, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = single(whole, Budget(outer_steps=16, eval_every=5), seed=seed, baseline=True)
    for steps in (first, 16):
        found = single(
            parts,
            Budget(outer_steps=steps, eval_every=5),
            seed=seed,
            baseline=True,
            resume=steps > first,
        )
    assert found.value == expected.value
    assert_same_runs(whole, parts)


def test_it_may_go_on_twice_and_is_interrupted_at_once(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    single(whole, Budget(outer_steps=12, eval_every=5))
    for steps in (3, 8):
        single(parts, Budget(outer_steps=steps, eval_every=5), resume=steps > 3)
    with pytest.raises(Interrupted):
        single(parts, Budget(outer_steps=12, eval_every=5), resume=True, callbacks=[StopAt(9)])
    single(parts, Budget(outer_steps=12, eval_every=5), resume=True)
    assert_same_runs(whole, parts)


@pytest.mark.parametrize("patience", [2, 6])
def test_patience_counts_from_the_evaluations_that_are_left(patience: int, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    single(whole, Budget(outer_steps=20, eval_every=5, patience=patience))
    for steps in (8, 20):
        budget = Budget(outer_steps=steps, eval_every=5, patience=patience)
        single(parts, budget, resume=steps > 8)
    assert_same_runs(whole, parts)


def test_a_counted_budget_pays_for_what_is_left(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    single(whole, Budget(gradient_equivalents=300.0, eval_every=4), make_rare)
    for cost in (130.0, 300.0):
        budget = Budget(gradient_equivalents=cost, eval_every=4)
        found = single(parts, budget, make_rare, resume=cost > 130.0)
        assert found.metrics["step"] % 4  # else nothing is taken back
    assert_same_runs(whole, parts, make_rare)


def test_a_run_that_cannot_go_on_stays_as_it_was(tmp_path: Path) -> None:
    first = single(tmp_path, Budget(gradient_equivalents=130.0, eval_every=4))
    assert first.metrics["step"] % 4
    again = single(tmp_path, Budget(gradient_equivalents=130.5, eval_every=4), resume=True)
    assert again.stop_reason is StopReason.DONE
    for name in ("step", "best_value", "best_step", COST, "retrained_test_loss"):
        assert again.metrics[name] == first.metrics[name]
