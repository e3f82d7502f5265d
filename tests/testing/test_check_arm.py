"""The laws of arms: every arm of the package keeps them, and each law finds who breaks it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from ift_tune.base.errors import CheckFailedError
from ift_tune.compare.arms import ARMS, Arm, ArmSpace, Style
from ift_tune.compare.arms.standard import BaselineTrials, JointTrials
from ift_tune.compare.comparison import Comparison, SearchState
from ift_tune.joint.callbacks import Callback
from ift_tune.joint.config import Budget
from ift_tune.search.space import Float, Space
from ift_tune.testing.contracts import check_arm
from ift_tune.trial.selection import BestModel
from ift_tune.trial.trial import Trial

RANDOM = replace(
    ARMS["random"], name="mine", label="mine", phrase="my own", style=Style("#5b7f7a", (9,), "8")
)
ONE_TRAINING = replace(RANDOM, sampler=None)  # which is quicker


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_keeps_the_laws(name: str) -> None:
    check_arm(ARMS[name])


def test_an_arm_of_the_users_own_keeps_them_too() -> None:
    check_arm(ONE_TRAINING)


def broken(arm: Arm) -> str:
    with pytest.raises(CheckFailedError, match=f"the arm '{arm.name}' breaks laws") as caught:
        check_arm(arm)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "law"),
    [
        ({"name": "My Arm"}, "its name is to be small letters"),
        ({"label": ""}, "its label is to be a line of text"),
        ({"summary": "two\nlines"}, "its summary is to be a line of text"),
        ({"label": "TPE"}, "its label is that of 'tpe'"),
        ({"phrase": "grid search"}, "its phrase is that of 'grid'"),
        ({"style": Style("red", (9,), "8")}, "its colour is to be like"),
        ({"style": Style("#ffee88", (9,), "8")}, "its colour is not to be read on white"),
        ({"style": Style("#3f7fc4", (9,), "8")}, "its color is that of 'random'"),
        ({"style": Style("#5b7f7a", (1, 1), "8")}, "its dashes is that of 'gp'"),
        ({"style": Style("#5b7f7a", (9,), "o")}, "its marker is that of 'ift'"),
        ({"sampler": lambda seed, number: None}, "it cannot be pickled"),
    ],
)
def test_who_is_taken_for_another_or_cannot_travel(changes: dict[str, Any], law: str) -> None:
    assert law in broken(replace(RANDOM, **changes))


def test_all_broken_laws_are_listed() -> None:
    text = broken(replace(RANDOM, label="TPE", phrase="TPE", summary=""))
    assert text.count("\n- ") == 3


# Broken kinds of trials. They are module-level and frozen, so that they break one law alone.


@dataclass(frozen=True)
class Elsewhere(BaselineTrials):
    """Begins outside its space."""

    def space(self, comparison: Comparison, hyper: object) -> ArmSpace:
        return ArmSpace(Space({"inner_lr": Float(0.1, 1.0, log=True)}), {"inner_lr": 2.0})


@dataclass(frozen=True)
class Altered(BaselineTrials):
    """Makes trials of a changed comparison."""

    def change(self, comparison: Comparison, state: SearchState) -> tuple[Comparison, SearchState]:
        return comparison, state

    def trial(
        self,
        comparison: Comparison,
        point: Mapping[str, Any],
        search_state: SearchState,
        *,
        seed: int,
        device: str,
        callbacks: Sequence[Callback] = (),
    ) -> Trial:
        comparison, search_state = self.change(comparison, search_state)
        return super().trial(comparison, point, search_state, seed=seed, device=device)


@dataclass(frozen=True)
class Spendthrift(Altered):
    """Does not look at what has been spent."""

    def change(self, comparison: Comparison, state: SearchState) -> tuple[Comparison, SearchState]:
        return comparison, replace(state, spent=0.0)


@dataclass(frozen=True)
class Generous(Altered):
    """Takes a step whatever it costs."""

    def change(self, comparison: Comparison, state: SearchState) -> tuple[Comparison, SearchState]:
        return replace(comparison, budget=Budget(gradient_equivalents=30.0)), state


@dataclass(frozen=True)
class Peeking(Altered):
    """Stops early by the test split."""

    def change(self, comparison: Comparison, state: SearchState) -> tuple[Comparison, SearchState]:
        return replace(comparison, problem_factory=Swapped(comparison.problem_factory)), state


@dataclass(frozen=True)
class Swapped:
    """Makes problems whose search split holds the test examples."""

    factory: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        problem = self.factory(*arguments)
        problem.splits = replace(problem.splits, search=problem.splits.test)
        return problem


@dataclass(frozen=True)
class Secretive(Altered):
    """Trains on the validation examples without saying so."""

    def trial(self, *arguments: Any, **settings: Any) -> Trial:
        return BaselineTrials(train_on_val=True).trial(*arguments, **settings)


@dataclass(frozen=True)
class Boastful(Altered):
    """Says that it trains on the validation examples, and does not."""

    train_on_val: bool = True

    def trial(self, *arguments: Any, **settings: Any) -> Trial:
        return BaselineTrials().trial(*arguments, **settings)


_CALLS = iter(range(10**6))


@dataclass(frozen=True)
class Moody(Altered):
    """Trains otherwise each time."""

    def change(self, comparison: Comparison, state: SearchState) -> tuple[Comparison, SearchState]:
        lr = 0.01 * (1 + next(_CALLS))
        return replace(comparison, config=comparison.config.updated({"inner_lr": lr})), state


@dataclass(frozen=True)
class Reseeded(BaselineTrials):
    """Trains on other splits than its seed's."""

    def trial(self, *arguments: Any, **settings: Any) -> Trial:
        return super().trial(*arguments, **settings | {"seed": 1})


class Silent(BestModel):
    """Does not say which evaluation is the best."""

    def best_columns(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Unselective(JointTrials):
    """Keeps it to itself which evaluation counts."""

    whole_budget: bool = True

    def trial(
        self,
        comparison: Comparison,
        point: Mapping[str, Any],
        search_state: SearchState,
        *,
        seed: int,
        device: str,
        callbacks: Sequence[Callback] = (),
    ) -> Trial:
        return Trial(
            comparison.problem_factory,
            comparison.config.updated({"meta_lr": 3.0}),
            comparison.within(comparison.budget, search_state),
            seed=seed,
            device=device,
            metric=comparison.metric,
            selection=Silent(),
        )


@pytest.mark.parametrize(
    ("arm", "law"),
    [
        (replace(RANDOM, trials=Elsewhere()), "its first point lies outside its space: inner_lr"),
        (replace(RANDOM, trials=Spendthrift()), "which exceeds the budget"),
        (replace(ONE_TRAINING, trials=Generous()), "too small for one step buys nothing"),
        (replace(ONE_TRAINING, trials=Peeking()), "the test split decides something"),
        (replace(ONE_TRAINING, trials=Secretive()), "the val split decides something"),
        (replace(ONE_TRAINING, trials=Boastful()), "the validation examples change nothing"),
        (replace(ONE_TRAINING, trials=Moody()), "it does not repeat itself"),
        (replace(ONE_TRAINING, trials=Reseeded()), "problems with the seeds [1, 7], not 7"),
        (replace(ONE_TRAINING, trials=Unselective()), "has the value nan of step nan"),
    ],
    ids=lambda value: type(value.trials).__name__ if isinstance(value, Arm) else "",
)
def test_each_law_finds_who_breaks_it(arm: Arm, law: str) -> None:
    assert law in broken(arm)
