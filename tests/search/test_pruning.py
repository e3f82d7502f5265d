"""Successive halving: Optuna's decisions, and the same when a killed trial is asked again."""

from __future__ import annotations

import random

import optuna
import pytest
from optuna.pruners import SuccessiveHalvingPruner
from optuna.trial import TrialState

from ift_tune.search.samplers import RepeatableHalving

STEPS = 18


def decisions(pruner: optuna.pruners.BasePruner, seed: int, *, ask_twice: bool) -> list[list[bool]]:
    """Return what is decided after each step of 30 random trials, up to the first True."""
    draw = random.Random(seed)
    study = optuna.create_study(pruner=pruner, sampler=optuna.samplers.RandomSampler(seed=0))
    found = []
    for _ in range(30):
        values = [draw.random() for _ in range(STEPS)]
        trial, said = study.ask(), []
        for step, value in enumerate(values, start=1):
            trial.report(value, step)
            said.append(trial.should_prune())
            if ask_twice:
                assert trial.should_prune() == said[-1]
            if said[-1]:
                break
        study.tell(trial, state=TrialState.PRUNED)
        found.append(said)
    return found


@pytest.mark.parametrize("seed", range(4))
def test_it_decides_as_optuna_does_however_often_it_is_asked(seed: int) -> None:
    expected = decisions(
        SuccessiveHalvingPruner(min_resource=2, reduction_factor=3), seed, ask_twice=False
    )
    assert {len(said) for said in expected} == {2, 6, STEPS}
    for ask_twice in (False, True):
        pruner = RepeatableHalving(first_rung=2, factor=3)
        assert decisions(pruner, seed, ask_twice=ask_twice) == expected


def test_optunas_own_does_not_repeat_itself() -> None:
    pruner = SuccessiveHalvingPruner(min_resource=2, reduction_factor=3)
    with pytest.raises(AssertionError):
        decisions(pruner, 0, ask_twice=True)


def test_a_trial_that_has_reported_nothing_goes_on() -> None:
    study = optuna.create_study(pruner=RepeatableHalving(first_rung=2, factor=3))
    assert not study.ask().should_prune()
