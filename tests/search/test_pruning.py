"""Hyperband and successive halving: Optuna's decisions, and the same again after a kill."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

import optuna
import pytest
from optuna.pruners import BasePruner, HyperbandPruner, PatientPruner, SuccessiveHalvingPruner
from optuna.trial import TrialState
from small_problems import CONFIG, SPACE, make_nothing

from ift_tune import Budget
from ift_tune.search.plan import SearchPlan
from ift_tune.search.pruners import RepeatableHalving, RepeatableHyperband, repeatable
from ift_tune.trial.plan import TrialPlan

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


# Pruners whose settings come from what the study has seen


def steps_of_trials(
    make: Callable[[], BasePruner], lengths: Sequence[int], *, anew: bool = False
) -> list[int]:
    """Return how far trials come that have these lengths.

    Args:
        make: Makes the pruner.
        lengths: Steps of each trial that is not pruned.
        anew: Whether each decision is another process's, which has a pruner of its own.
    """
    draw, found = random.Random(0), []
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(pruner=make(), sampler=sampler, study_name="one")
    for length in lengths:
        trial = study.ask()
        for step in range(1, length + 1):
            trial.report(draw.random(), step)
            if anew:
                study.pruner = make()
            if trial.should_prune():
                break
        pruned = step < length
        study.tell(trial, None if pruned else 1.0, TrialState.PRUNED if pruned else None)
        found.append(step)
    return found


LENGTHS = [10, *random.Random(1).choices((10, 30, 250), k=60)]
AUTO: dict[str, Callable[[], BasePruner]] = {
    "hyperband": HyperbandPruner,
    "halving": SuccessiveHalvingPruner,
    "patient": lambda: PatientPruner(HyperbandPruner(), patience=0),
}


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("name", AUTO)
@pytest.mark.parametrize("longest", [None, 250])
def test_another_process_decides_as_the_one_before(name: str, longest: int | None) -> None:
    given = AUTO[name]()
    before = copy.deepcopy(vars(given))
    one, other = (
        steps_of_trials(lambda: repeatable(given, longest), LENGTHS, anew=anew)
        for anew in (False, True)
    )
    assert one == other
    assert one != LENGTHS
    if name != "patient":
        assert vars(given) == before  # it stays as it is


def test_optunas_hyperband_depends_on_when_it_is_first_asked() -> None:
    one, other = (steps_of_trials(HyperbandPruner, LENGTHS, anew=anew) for anew in (False, True))
    assert one != other


def hyperband(**settings: Any) -> Callable[[], BasePruner]:
    return functools.partial(HyperbandPruner, **settings)


def halving(**settings: Any) -> Callable[[], BasePruner]:
    return functools.partial(SuccessiveHalvingPruner, **settings)


@pytest.mark.parametrize(
    ("given", "longest", "as_optunas"),
    [
        (hyperband(), 250, hyperband(max_resource=250)),
        (hyperband(max_resource=27), 250, hyperband(max_resource=27)),
        (hyperband(), None, hyperband()),
        (halving(), None, halving()),
        (
            hyperband(min_resource=2, max_resource=30, reduction_factor=2, bootstrap_count=2),
            None,
            hyperband(min_resource=2, max_resource=30, reduction_factor=2, bootstrap_count=2),
        ),
        (halving(), 250, halving(min_resource=2)),
        (halving(min_resource=3), 250, halving(min_resource=3)),
        (
            halving(min_early_stopping_rate=1, bootstrap_count=2, min_resource=1),
            None,
            halving(min_early_stopping_rate=1, bootstrap_count=2, min_resource=1),
        ),
    ],
)  # fmt: skip
def test_objects_decide_as_optunas_do_with_the_numbers_that_auto_stands_for(
    given: Callable[[], BasePruner], longest: int | None, as_optunas: Callable[[], BasePruner]
) -> None:
    expected = steps_of_trials(as_optunas, LENGTHS)
    assert steps_of_trials(lambda: repeatable(given(), longest), LENGTHS) == expected
    assert expected != LENGTHS


def test_brackets_are_known_before_the_first_decision() -> None:
    """For samplers draw a point from the trials of its bracket."""
    study = optuna.create_study(study_name="one")
    trials = [study.ask() for _ in range(20)]
    one, other = RepeatableHyperband(1, 27, 3), HyperbandPruner(1, 27, 3)
    other.prune(study, study.trials[0])
    brackets = [[p._get_bracket_id(study, t) for t in study.trials] for p in (one, other)]
    assert len(trials) == len(brackets[0])
    assert brackets[0] == brackets[1]
    assert set(brackets[0]) == {0, 1, 2, 3}


def test_a_class_of_ones_own_is_left_alone() -> None:
    class Own(HyperbandPruner):
        pass

    for pruner in (Own(), optuna.pruners.MedianPruner(), RepeatableHalving(2, 3)):
        assert repeatable(pruner) is pruner


@pytest.mark.parametrize(
    ("budget", "fidelity", "longest"),
    [
        (Budget(outer_steps=9), "outer_steps", 9),
        (Budget(outer_steps=9), "inner_steps", 27),
        (Budget(gradient_equivalents=80.0), "gradient_equivalents", 80),
        (Budget(gradient_equivalents=80.0), "outer_steps", None),
        (Budget(outer_steps=9), "gradient_equivalents", None),
        (Budget(seconds=9.0), "hvps", None),
    ],
)
def test_the_longest_trial_is_what_the_budget_allows(
    budget: Budget, fidelity: str, longest: int | None
) -> None:
    assert SearchPlan(TrialPlan(make_nothing, budget, CONFIG), SPACE, fidelity).longest == longest
