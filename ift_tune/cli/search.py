"""``ift-tune search``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ift_tune.base.direction import Direction
from ift_tune.base.errors import IFTTuneError, UsageError, nearest, require
from ift_tune.cli import values as known
from ift_tune.cli.options import (
    OPTUNA,
    RAY,
    Address,
    AsJson,
    BudgetGE,
    Constraints,
    CpusPerTrial,
    DataRoot,
    Device,
    Download,
    Embedded,
    GpusPerTrial,
    Metrics,
    Modes,
    NoBaseline,
    Out,
    OuterSteps,
    Pack,
    Patience,
    ProcessesPerTrial,
    Quiet,
    Resume,
    Seconds,
    Seed,
    Settings,
    TaskName,
    TaskOptions,
    Trust,
    Workers,
    find_job,
    pairs,
)
from ift_tune.cli.report import draw_front_of, print_baseline, print_diagnoses, print_files

if TYPE_CHECKING:
    import pandas as pd

    from ift_tune.base.objectives import Objectives
    from ift_tune.search.backends import Backend, Processes, RayTune
    from ift_tune.search.request import SearchRequest

_MOST_SHOWN = 20  # trials of a front
_SAMPLER = "tpe"  # where none is asked for
_HOMES = {"optuna": "ift_tune.search.study", "ray": "ift_tune.search.ray"}  # of each backend


def search(
    task: TaskName,
    backend: Annotated[
        str,
        typer.Option(
            help="what runs the trials: optuna or ray",
            autocompletion=known.words(*known.BACKENDS),
        ),
    ] = "optuna",
    n_trials: Annotated[int, typer.Option(help="finished trials in the end")] = 20,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=RANGE",
            help="KEY=LOW:HIGH, KEY=LOW:HIGH:log, KEY=LOW:HIGH:STEP or KEY=A,B; may be repeated; "
            "default: terms, alpha_scale, meta_lr, inner_steps",
            autocompletion=known.keys,
        ),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="tpe (the default), random, gp, cmaes, qmc, nsgaii, nsgaiii; grid or bruteforce, "
            "which end when each point was there",
            autocompletion=known.words(*known.SAMPLERS),
        ),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            help="sqlite:///F.db, journal://F, ...; default: in --out",
            envvar="IFT_TUNE_STORAGE",
            show_envvar=True,
        ),
    ] = None,
    study_name: Annotated[str | None, typer.Option(help="default: from the settings")] = None,
    gpus_per_trial: GpusPerTrial = None,
    processes_per_trial: ProcessesPerTrial = None,
    pruner: Annotated[
        str | None,
        typer.Option(
            help="optuna: none, median, hyperband or asha",
            rich_help_panel=OPTUNA,
            autocompletion=known.words(*known.PRUNERS),
        ),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="optuna: after which no further trial begins",
            rich_help_panel=OPTUNA,
        ),
    ] = None,
    fidelity: Annotated[
        str,
        typer.Option(
            help="what pruner or scheduler count: outer_steps, inner_steps, hvps or "
            "gradient_equivalents",
            autocompletion=known.words(*known.FIDELITIES),
        ),
    ] = "outer_steps",
    workers: Workers = None,
    pack: Pack = None,
    address: Address = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="ray: none, asha, hyperband or pbt",
            rich_help_panel=RAY,
            autocompletion=known.words(*known.SCHEDULERS),
        ),
    ] = None,
    searcher: Annotated[
        str | None,
        typer.Option(
            help="ray: optuna (with --sampler) or random",
            rich_help_panel=RAY,
            autocompletion=known.words(*known.SEARCHERS),
        ),
    ] = None,
    cpus_per_trial: CpusPerTrial = None,
    settings: Settings = None,
    outer_steps: OuterSteps = None,
    budget: BudgetGE = None,
    seconds: Seconds = None,
    patience: Patience = None,
    out: Out = None,
    data_root: DataRoot = None,
    download: Download = False,
    embedded: Embedded = False,
    options: TaskOptions = None,
    device: Device = "auto",
    seed: Seed = 0,
    metric: Metrics = None,
    mode: Modes = None,
    constraint: Constraints = None,
    no_baseline: NoBaseline = False,
    resume: Resume = False,
    trust: Trust = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Search meta-hyperparameters: each trial is an inner IFT optimisation."""
    from ift_tune.cli.progress import progress_unless, resumable
    from ift_tune.search.backends import processes_of, refuse_several_processes
    from ift_tune.search.plan import SearchPlan
    from ift_tune.search.request import SearchRequest
    from ift_tune.search.space import MetaSpace
    from ift_tune.trial.plan import TrialPlan

    refuse_options_of_others(
        backend,
        optuna={"--pruner": pruner, "--timeout": timeout, "--workers": workers, "--pack": pack},
        ray={
            "--address": address,
            "--scheduler": scheduler,
            "--searcher": searcher,
            "--cpus-per-trial": cpus_per_trial,
        },
    )
    require_backend(backend, address)
    from ift_tune.search.samplers import sampler_factory
    from ift_tune.search.work import quiet_optuna

    quiet_optuna()
    chosen: Backend
    shared_by = processes_of(processes_per_trial, gpus_per_trial)
    if backend == "ray":
        refuse_several_processes(shared_by, "Ray")
        scheduler = scheduler or "none"
        chosen = ray_backend(address, cpus_per_trial, gpus_per_trial, scheduler)
        sampler = _sampler_with_ray(sampler, searcher, scheduler)
        arm = "+".join(["ift", sampler] + ([] if scheduler == "none" else [scheduler]))
    else:
        chosen = processes(workers, gpus_per_trial, pruner, timeout, pack)
        sampler = sampler or _SAMPLER
        arm = f"ift+{sampler}"
    job = find_job(task, settings, data_root, download, embedded, options).limited_to(
        outer_steps, budget, seconds, patience
    )
    space = MetaSpace.parse(pairs("--vary", vary)) if vary else MetaSpace.default()
    factory = sampler_factory(sampler, space)
    twice = sorted({*pairs("--set", settings)} & {*space.distributions}) if vary else []
    if twice:
        raise UsageError(
            f"what --vary searches must not be fixed by --set as well, got {twice[0]} in both"
        )
    out = out or Path("runs", f"{job.name}-search-seed{seed}")
    progress = progress_unless(quiet or as_json)
    with resumable(out):
        trials = TrialPlan(
            job.factory,
            job.budget,
            job.config,
            seed,
            device,
            metric or None,
            mode or None,
            callbacks=[progress],
            constraints=constraint or (),
            processes=shared_by,
        )
        found = run_search(
            SearchRequest(
                SearchPlan(trials, space, fidelity),
                n_trials,
                out,
                task=job.name,
                arm=arm,
                sampler=factory,
                storage=storage,
                study_name=study_name,
                resume=resume,
                callbacks=[progress],
                baseline=not no_baseline,
                trust=trust,
            ),
            chosen,
        )
    if as_json:
        front = {} if found.front is None else {"front": _records(found.front)}
        facts = {"best": found.best, **front, "trials": len(found.trials), "out": str(out)}
        typer.echo(json.dumps(facts))
    elif not quiet:
        if found.front is not None:
            _print_front(found.front, trials.objectives, found.finished)
        if found.best is not None:
            _print_best(found.best)
            print_baseline(_measured(found), found.best["metric"], found.best.get("mode", "min"))
            print_diagnoses(out, found.best["trial"])
        if found.finished < n_trials:
            rest = "" if storage is None else "; others run the rest"
            typer.echo(f"{found.finished} of {n_trials} trials are finished{rest}")
        print_files(out, [] if found.front is None else draw_front_of(out, job.name))
    if found.failure is not None:
        raise IFTTuneError(f"{found.failure} in {out}")


def _print_front(front: pd.DataFrame, objectives: Objectives, finished: int) -> None:
    """Show the Pareto front of a search of several metrics, a line a trial."""
    typer.echo(f"Pareto front: {len(front)} of {finished} trials by {objectives.words}")
    for row in _records(front.head(_MOST_SHOWN)):
        values = "  ".join(f"{name} {row[name]:.4g}" for name in map(str, objectives.metrics))
        point = {k: v for k, v in row.items() if k not in ("trial", *objectives.metrics)}
        typer.echo(f"  trial {row['trial']:<4} {values}  {_in_short(point)}")
    if len(front) > _MOST_SHOWN:
        typer.echo(f"  and {len(front) - _MOST_SHOWN} more: the column pareto of the trials")


def _records(front: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows as plain values, without parameters that a trial does not have."""
    rows = front.to_dict("records")
    return [{str(k): v for k, v in row.items() if v is not None and v == v} for row in rows]


def _in_short(point: Mapping[str, Any]) -> str:
    known = {k: v for k, v in point.items() if v is not None and v == v}  # not every trial has all
    return "  ".join(
        f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in known.items()
    )


def _print_best(best: Mapping[str, Any]) -> None:
    """Name the best trial of a search and its meta-hyperparameters."""
    point = _in_short(best["params"])
    kind = str(best["metric"]).removeprefix("search_")
    shown = [k for k in (f"test_{kind}", f"retrained_test_{kind}") if k in best]
    measured = "  ".join(f"{k} {best[k]:.4g}" for k in shown)
    words = Direction(best.get("mode", "min")).words
    by = f" by {best['metric']}" if "values" in best else ""
    typer.echo(
        f"best{by}: trial {best['trial']}, {best['metric']} {best['value']:.4g} ({words})  "
        f"{measured}"
    )
    typer.echo(f"best meta-hyperparameters: {point}")


def _measured(found: Found) -> dict[str, Any]:
    """Return what the table has of the best trial, which may be another run directory's."""
    mine = found.trials[found.trials["trial"] == (found.best or {}).get("trial")]
    return {str(k): v for k, v in mine.iloc[0].dropna().items()} if len(mine) else {}


class Found(NamedTuple):
    """What a search has come to.

    Attributes:
        best: The best complete trial as plain values, None if there is none.
        failure: Why there is none, in a sentence.
        finished: How many trials are finished, those of other machines on the study included.
        trials: The table of this run directory.
        front: The Pareto front; None of a single metric.
    """

    best: dict[str, Any] | None
    failure: str | None
    finished: int
    trials: pd.DataFrame
    front: pd.DataFrame | None


def run_search(request: SearchRequest, backend: Backend) -> Found:
    """Run a search on a backend."""
    from ift_tune.base.status import TrialStatus
    from ift_tune.search.backends import RayTune

    several = request.plan.objectives.several
    if isinstance(backend, RayTune):
        from ift_tune.search.ray.run import search_with_ray

        with_ray = search_with_ray(request, backend)
        over = [TrialStatus.COMPLETE.value, TrialStatus.PRUNED.value]
        finished = int(with_ray.trials["status"].isin(over).sum())
        front = with_ray.front if several else None
        return Found(with_ray.best, with_ray.failure, finished, with_ray.trials, front)
    from ift_tune.search.loop import FINISHED
    from ift_tune.search.study import search_in_processes

    result = search_in_processes(request, backend)
    finished = len(result.study.get_trials(deepcopy=False, states=FINISHED))
    front = result.front if several else None
    return Found(result.best, result.failure, finished, result.trials, front)


def refuse_options_of_others(
    backend: str, *, optuna: Mapping[str, object], ray: Mapping[str, object]
) -> None:
    """Refuse what the chosen backend has not.

    Args:
        backend: ``"optuna"`` or ``"ray"``.
        optuna: Options that only the one has, None where they were not given.
        ray: Those of the other.

    Raises:
        UsageError: If there is no such backend, or an option of the other one was given.
    """
    options = {"optuna": optuna, "ray": ray}
    if backend not in options:
        raise UsageError(f"unknown backend {backend!r}{nearest(backend, options)}")
    for owner, theirs in options.items():
        for flag, value in theirs.items():
            if value is not None and owner != backend:
                raise UsageError(f"{flag} belongs to --backend {owner}, not {backend}")


def require_backend(backend: str, address: str | None) -> None:
    """Import what a backend needs, Ray with its variables set.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    from ift_tune.search.backends import prepare_ray

    if backend == "ray":
        prepare_ray(local=address is None)
    require(_HOMES[backend], extra=backend, what=f"--backend {backend}")


def processes(
    workers: int | None,
    gpus_per_trial: float | None,
    pruner: str | None = None,
    timeout: float | None = None,
    pack: int | None = None,
) -> Processes:
    """Return the backend that the options of ``--backend optuna`` describe."""
    from ift_tune.search.backends import Processes
    from ift_tune.search.pruners import make_pruner

    made = make_pruner(pruner or "none")
    count = 1 if workers is None else workers
    return Processes(count, gpus_per_trial, made, timeout, pack=1 if pack is None else pack)


def ray_backend(
    address: str | None,
    cpus_per_trial: float | None,
    gpus_per_trial: float | None,
    scheduler: str = "none",
) -> RayTune:
    """Return the backend that the options of ``--backend ray`` describe."""
    from ift_tune.search.backends import RayTune

    cpus = 1.0 if cpus_per_trial is None else cpus_per_trial
    return RayTune(address, cpus, gpus_per_trial or 0.0, scheduler)


def _sampler_with_ray(sampler: str | None, searcher: str | None, scheduler: str) -> str:
    """Return the name of the sampler behind Ray's searcher."""
    from ift_tune.search.backends import PBT

    searcher = searcher or ("random" if scheduler == PBT else "optuna")
    if searcher not in known.SEARCHERS:
        raise UsageError(f"unknown searcher {searcher!r}{nearest(searcher, known.SEARCHERS)}")
    if scheduler == PBT and searcher != "random":
        raise UsageError("pbt mutates a random population, so it takes --searcher random only")
    if searcher == "random":
        if sampler not in (None, "random"):
            who = "pbt" if scheduler == PBT else "--searcher random"
            raise UsageError(f"{who} draws at random: leave --sampler out, got {sampler}")
        return "random"
    if sampler in ("grid", "bruteforce"):
        raise UsageError(
            f"Ray's experiments do not end when every point was there: use --backend optuna, or "
            f"another sampler, got --sampler {sampler}"
        )
    return sampler or _SAMPLER
