"""What a study is told of a trial, and whether it can take it: values, attributes, constraints."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import optuna
from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import BaseTrial, FrozenTrial

from ift_tune.base.direction import Direction
from ift_tune.base.errors import UsageError
from ift_tune.base.objectives import Objectives
from ift_tune.base.status import FEATURED, Outcome, StopReason

if TYPE_CHECKING:  # a report asks for importances without PyTorch
    from ift_tune.search.space import Space

IDENTITY = "ift_tune"
"""User attribute of a study: what its trials are."""

_log = logging.getLogger(__name__)

_HEEDING = tuple(  # Optuna's samplers that look at constraints
    getattr(optuna.samplers, name)
    for name in ("TPESampler", "GPSampler", "NSGAIISampler", "NSGAIIISampler")
)
_DELEGATING = (optuna.samplers.PartialFixedSampler,)
_KNOWN = ("optuna", "ift_tune")  # packages of whose samplers the above can be said


def featured(metric: str) -> list[str]:
    """Return which metrics are kept as user attributes of a study's trials."""
    measure = metric.removeprefix("search_")
    own = (f"search_{measure}", f"test_{measure}", f"retrained_test_{measure}")
    return list(dict.fromkeys([*FEATURED, *own]))


def note_outcome(trial: BaseTrial, outcome: Outcome, objectives: Objectives) -> None:
    """Set the user attributes that tell how a trial ended and what it measured; its constraints."""
    trial.set_user_attr("stop_reason", outcome.stop_reason.value)
    trial.set_user_attr("metric", outcome.metric)
    trial.set_user_attr("mode", outcome.mode)
    for name in dict.fromkeys([*featured(outcome.metric), *objectives.read_at_the_end]):
        if outcome.metrics.get(name) is not None:
            trial.set_user_attr(name, outcome.metrics[name])
    if objectives.constraints:
        _note_violations(trial, outcome, objectives)


def _note_violations(trial: BaseTrial, outcome: Outcome, objectives: Objectives) -> None:
    complete = outcome.stop_reason is StopReason.DONE
    for name, value in objectives.violations(outcome.metrics, complete=complete).items():
        # One that was killed before its end was told has them already, and keeps them.
        if name not in trial.constraints:
            trial.set_constraint(name, value)
    for constraint in objectives.constraints:
        if complete and constraint.violation(outcome.metrics) is None:
            _log.warning(
                "trial %d counts as one that violates %s: it has no finite %s",
                *(trial.number, constraint, constraint.column),
            )


def objectives_of(study: optuna.Study) -> Objectives:
    """Return the objectives that a study was begun with by this package."""
    return Objectives.of_run(study.user_attrs.get(IDENTITY))


def directions_of(study: optuna.Study) -> tuple[Direction, ...]:
    """Return the directions of a study."""
    ways = study.directions
    return tuple(Direction.MAX if w is StudyDirection.MAXIMIZE else Direction.MIN for w in ways)


def check_directions(study: optuna.Study, objectives: Objectives) -> None:
    """Raise a `UsageError` unless the study has as many values, and looks in their directions."""
    found, wanted = directions_of(study), objectives.directions
    create = f"directions={objectives.optuna}"
    if not objectives.several:
        create = f"direction={objectives.direction.optuna!r}"
    if len(found) != len(wanted):
        values = "one value" if len(wanted) == 1 else f"{len(wanted)} values, {objectives.words}"
        raise UsageError(
            f"a trial has {values}: create the study with {create}, or name as many metrics as it "
            f"has directions, got {len(found)} directions"
        )
    if found == wanted:
        return
    modes, others = ([way.value for way in ways] for ways in (wanted, found))
    mode, other = (modes, others) if objectives.several else (repr(modes[0]), repr(others[0]))
    raise UsageError(
        f"with mode={mode} the study has to {' and '.join(objectives.optuna)}: create it with "
        f"{create}, or give the metric of this study and mode={other}, got a study named "
        f"{study.study_name!r} that is to {' and '.join(way.optuna for way in found)}"
    )


def check_means(
    objectives: Objectives,
    make_sampler: Callable[[], BaseSampler],
    pruner: BasePruner,
    space: Space | None,
) -> None:
    """Look whether a sampler and a pruner can work towards objectives, before a study is made.

    Args:
        objectives: Those of the study.
        make_sampler: Called where it matters; a copy of what it returns is tried.
        pruner: No trial of several metrics is pruned.
        space: From which the sampler draws.

    Raises:
        UsageError: If one cannot, or Optuna is too old for constraints.
    """
    if not (objectives.several or objectives.constraints):
        return
    sampler = make_sampler()
    require_constraints(objectives)
    if objectives.constraints:
        _warn_of_heedless(objectives, sampler)
    if not objectives.several:
        return
    if not isinstance(pruner, NopPruner):
        raise UsageError(
            "Optuna prunes no trial of several metrics, of which none says by itself that another "
            f"trial does better: leave the pruner out (--pruner none), or name one metric, got "
            f"{type(pruner).__name__}"
        )
    study = quiet_study(objectives, copy.deepcopy(sampler))
    try:
        trial = study.ask()
        if space is not None:
            space.suggest(trial)
    except ValueError as error:
        raise UsageError(
            "the sampler cannot draw for several metrics: choose another one, such as 'tpe', "
            f"'random' or Optuna's NSGAIISampler, got {type(sampler).__name__} ({error})"
        ) from error


def require_constraints(objectives: Objectives) -> None:
    """Raise a `UsageError` if there are constraints and Optuna is too old for them."""
    if objectives.constraints and not hasattr(BaseTrial, "set_constraint"):
        raise UsageError(
            "constraints need Optuna 5 (pip install 'optuna>=5'), or leave them out, got Optuna "
            f"{optuna.__version__}"
        )


def _warn_of_heedless(objectives: Objectives, sampler: BaseSampler) -> None:
    """Say so if a sampler does not look at constraints."""
    known = type(sampler).__module__.partition(".")[0] in _KNOWN
    if known and not isinstance(sampler, (*_HEEDING, *_DELEGATING)):
        _log.warning(
            "%s does not look at constraints when it chooses a point: %s will only decide which "
            "trial is the best. TPE, GP and the two NSGA samplers avoid what violates them",
            type(sampler).__name__,
            ", ".join(map(str, objectives.constraints)),
        )


def quiet_study(objectives: Objectives, sampler: BaseSampler) -> optuna.Study:
    """Return an empty study in memory, of which Optuna does not tell on the terminal."""
    with optuna_quiet():
        return optuna.create_study(directions=objectives.optuna, sampler=sampler)


@contextlib.contextmanager
def optuna_quiet() -> Iterator[None]:
    """Let Optuna log warnings only, meanwhile."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def is_feasible(trial: FrozenTrial) -> bool:
    """Return whether a trial keeps all constraints that are noted on it."""
    noted: Mapping[str, Any] = getattr(trial, "constraints", {})  # Optuna 4 has none
    return all(value <= 0.0 for value in noted.values())
