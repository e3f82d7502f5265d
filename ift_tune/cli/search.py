"""``ift-tune search``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ift_tune.base.errors import UsageError, nearest
from ift_tune.base.imports import require
from ift_tune.cli.options import (
    OPTUNA,
    RAY,
    Address,
    AsJson,
    BudgetGE,
    CpusPerTrial,
    DataRoot,
    Device,
    Download,
    Embedded,
    GpusPerTrial,
    Metric,
    Out,
    OuterSteps,
    Quiet,
    Resume,
    Seconds,
    Seed,
    Settings,
    TaskName,
    TaskOptions,
    Workers,
    find_job,
    pairs,
)
from ift_tune.cli.report import print_files

if TYPE_CHECKING:
    import pandas as pd

SEARCHERS = ("optuna", "random")
_HOMES = {"optuna": "ift_tune.search.study", "ray": "ift_tune.search.ray"}  # of each backend


def search(
    task: TaskName,
    backend: Annotated[str, typer.Option(help="what runs the trials: optuna or ray")] = "optuna",
    n_trials: Annotated[int, typer.Option(help="finished trials in the end")] = 20,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=RANGE",
            help="KEY=LOW:HIGH, KEY=LOW:HIGH:log or KEY=A,B; may be repeated; "
            "default: terms, alpha, meta_lr, inner_steps",
        ),
    ] = None,
    sampler: Annotated[str, typer.Option(help="tpe or random")] = "tpe",
    storage: Annotated[
        str | None, typer.Option(help="sqlite:///F.db, journal://F, ...; default: in --out")
    ] = None,
    study_name: Annotated[str | None, typer.Option(help="default: from the settings")] = None,
    gpus_per_trial: GpusPerTrial = None,
    pruner: Annotated[
        str | None, typer.Option(help="optuna: none, median or hyperband", rich_help_panel=OPTUNA)
    ] = None,
    workers: Workers = None,
    address: Address = None,
    scheduler: Annotated[
        str | None, typer.Option(help="ray: none, asha, hyperband or pbt", rich_help_panel=RAY)
    ] = None,
    searcher: Annotated[
        str | None,
        typer.Option(help="ray: optuna (with --sampler) or random", rich_help_panel=RAY),
    ] = None,
    cpus_per_trial: CpusPerTrial = None,
    settings: Settings = None,
    outer_steps: OuterSteps = None,
    budget: BudgetGE = None,
    seconds: Seconds = None,
    out: Out = None,
    data_root: DataRoot = None,
    download: Download = False,
    embedded: Embedded = False,
    options: TaskOptions = None,
    device: Device = "auto",
    seed: Seed = 0,
    metric: Metric = None,
    resume: Resume = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Search meta-hyperparameters: each trial is an inner IFT optimisation."""
    from ift_tune.cli.progress import TrialProgress, open_console, resumable
    from ift_tune.search.space import MetaSpace

    run_search = choose_search(
        backend,
        sampler=sampler,
        gpus_per_trial=gpus_per_trial,
        optuna={"pruner": pruner, "workers": workers},
        ray={
            "address": address,
            "scheduler": scheduler,
            "searcher": searcher,
            "cpus_per_trial": cpus_per_trial,
        },
    )
    job = find_job(task, settings, data_root, download, embedded, options).limited_to(
        outer_steps, budget, seconds
    )
    space = MetaSpace.parse(pairs("--vary", vary)) if vary else MetaSpace.default()
    out = out or Path("runs", f"{job.name}-search-seed{seed}")
    console = open_console(quiet or as_json)
    with (
        TrialProgress(console, job.budget, tuple(space.distributions)) as progress,
        resumable(out),
    ):
        found = run_search(
            job.factory,
            space,
            job.budget,
            n_trials=n_trials,
            out=out,
            task=job.name,
            config=job.config,
            seed=seed,
            device=device,
            metric=metric,
            storage=storage,
            study_name=study_name,
            resume=resume,
            callbacks=[progress],
        )
    if as_json:
        typer.echo(json.dumps({"best": found.best, "trials": len(found.trials), "out": str(out)}))
    elif not quiet:
        _print_best(found.best)
        if found.finished < n_trials:
            typer.echo(f"{found.finished} of {n_trials} trials are finished; others run the rest")
        print_files(out)


def _print_best(best: Mapping[str, Any] | None) -> None:
    """Name the best trial of a search and its meta-hyperparameters."""
    if best is None:
        typer.echo("no trial was completed: every one diverged or was pruned; see stop_reason")
        return
    point = "  ".join(
        f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in best["params"].items()
    )
    kind = "error" if "test_error" in best else "loss"
    shown = [k for k in (f"test_{kind}", f"retrained_test_{kind}") if k in best]
    measured = "  ".join(f"{k} {best[k]:.4g}" for k in shown)
    typer.echo(f"best: trial {best['trial']}, {best['metric']} {best['value']:.4g}  {measured}")
    typer.echo(f"best meta-hyperparameters: {point}")


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


def choose_search(
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
    require_backend(backend)
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
    from ift_tune.search.ray_environment import prepare

    options = {"optuna": optuna, "ray": ray}
    if backend not in options:
        raise UsageError(f"unknown backend {backend!r}{nearest(backend, options)}")
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


def require_backend(backend: str) -> None:
    """Import what a backend needs.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    require(_HOMES[backend], extra=backend, what=f"--backend {backend}")


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
