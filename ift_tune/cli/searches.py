"""What ``ift-tune search`` means by a backend and its options: Optuna's processes or Ray Tune."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import pandas as pd

from ift_tune.base.errors import MissingDependencyError, UsageError, nearest
from ift_tune.search.ray.environment import prepare

BACKENDS = ("optuna", "ray")
SEARCHERS = ("optuna", "random")
_MODULES = {
    "optuna": "ift_tune.search.study",
    "ray": "ift_tune.search.ray",
    "compare": "ift_tune.compare.run",
}


class Found(NamedTuple):
    """What a search has come to.

    Attributes:
        best: The best complete trial as plain values, None if there is none.
        finished: How many trials are finished, those of other machines on the study included.
        trials: The table of this run directory.
    """

    best: dict[str, Any] | None
    finished: int
    trials: pd.DataFrame


def choose(
    backend: str,
    *,
    sampler: str,
    gpus_per_trial: float | None,
    optuna: Mapping[str, Any],
    ray: Mapping[str, Any],
) -> Callable[..., Found]:
    """Return a search, to be called with the arguments that `run_study` and `run_ray` share.

    Args:
        backend: ``"optuna"`` or ``"ray"``.
        sampler: Of the study.
        gpus_per_trial: For both.
        optuna: Options that only the one has, None where they were not given.
        ray: Those of the other.

    Raises:
        UsageError: If there is no such backend, or an option of the other one was given.
        MissingDependencyError: If its library is not installed.
    """
    given = options_of(backend, gpus_per_trial=gpus_per_trial, optuna=optuna, ray=ray)
    require(backend)
    from ift_tune.search import samplers as sampling
    from ift_tune.search.storage import quiet_optuna

    quiet_optuna()
    if backend == "ray":
        return _with_ray(sampler, given)
    pruner = sampling.make_pruner(given.pop("pruner", "none"))
    factory = sampling.sampler_factory(sampler)
    return partial(_search_optuna, arm=f"ift+{sampler}", sampler=factory, pruner=pruner, **given)


def options_of(
    backend: str,
    *,
    gpus_per_trial: float | None,
    optuna: Mapping[str, Any],
    ray: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the options that were given, and set what Ray must know before it is imported.

    Args:
        backend: ``"optuna"`` or ``"ray"``.
        gpus_per_trial: For both.
        optuna: Options that only the one has, None where they were not given.
        ray: Those of the other.

    Raises:
        UsageError: If there is no such backend, or an option of the other one was given.
    """
    options = {"optuna": optuna, "ray": ray}
    if backend not in options:
        raise UsageError(f"unknown backend {backend!r}{nearest(backend, BACKENDS)}")
    for owner, theirs in options.items():
        for name, value in theirs.items():
            if value is not None and owner != backend:
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{flag} belongs to --backend {owner}, not {backend}")
    given = {name: value for name, value in options[backend].items() if value is not None}
    if gpus_per_trial is not None:
        given["gpus_per_trial"] = gpus_per_trial
    prepare(local=backend == "ray" and "address" not in given)
    return given


def require(backend: str) -> None:
    """Import what a backend needs.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    try:
        importlib.import_module(_MODULES[backend])
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"this needs {error.name}: pip install 'ift_tune[{backend}]'"
        ) from error


def _with_ray(sampler: str, given: dict[str, Any]) -> Callable[..., Found]:
    from ift_tune.search.ray.settings import PBT
    from ift_tune.search.samplers import sampler_factory

    scheduler = given.get("scheduler", "none")
    searcher = given.pop("searcher", "random" if scheduler == PBT else "optuna")
    if searcher not in SEARCHERS:
        raise UsageError(f"unknown searcher {searcher!r}{nearest(searcher, SEARCHERS)}")
    if scheduler == PBT and searcher != "random":
        raise UsageError("pbt mutates a random population, so it takes --searcher random only")
    if searcher == "random":
        sampler = "random"
    parts = ["ift", sampler, scheduler] if scheduler != "none" else ["ift", sampler]
    return partial(_search_ray, arm="+".join(parts), sampler=sampler_factory(sampler), **given)


def _search_optuna(*arguments: Any, **options: Any) -> Found:
    from ift_tune.search.analysis import best_point
    from ift_tune.search.loop import FINISHED
    from ift_tune.search.study import run_study

    result = run_study(*arguments, **options)
    finished = result.study.get_trials(deepcopy=False, states=FINISHED)
    return Found(best_point(result.study), len(finished), result.trials)


def _search_ray(*arguments: Any, **options: Any) -> Found:
    from ift_tune.search.ray import run_ray

    result = run_ray(*arguments, **options)
    finished = result.trials["status"].isin(["complete", "pruned"]).sum()
    return Found(result.best, int(finished), result.trials)
