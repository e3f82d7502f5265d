"""Problems that meet their fate in chosen trials, and what they should have come to without Ray."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from ray import tune
from small_problems import BUDGET, CONFIG, make_eventful, make_faulty, make_tiny

from ift_tune import Budget, MetaConfig, load_results
from ift_tune.base.checkpoints import load_checkpoint
from ift_tune.hyper.supervised import ClassificationProblem
from ift_tune.joint.callbacks import Callback
from ift_tune.search.ray import IFTTrainable, recommended_run_config
from ift_tune.trial.plan import TrialPlan
from ift_tune.trial.runner import run_trial
from ift_tune.trial.tables import MEASURED_COLUMNS, RunDirectory
from ift_tune.trial.trial import ProblemFactory

AT = {"meta_lr": 0.05}  # a point


def make_eventful_at(
    config: MetaConfig,
    device: torch.device,
    seed: int,
    *,
    events: Mapping[float, Callable[[], None]],
    after: int = 7,
) -> ClassificationProblem:
    """Return the tiny problem, with an event in the trials of some `meta_lr`.

    By default it comes in the third outer step of `CONFIG`.
    """
    event = events.get(config.meta_lr)
    return make_eventful(config, device, seed, event=event, meta_lr=config.meta_lr, after=after)


def make_faulty_at(
    config: MetaConfig, device: torch.device, seed: int, *, faults: Mapping[float, str]
) -> ClassificationProblem:
    """Return the tiny problem, which goes wrong in the third step of trials of some `meta_lr`."""
    fault = faults.get(config.meta_lr)
    if fault is None:
        return make_tiny(config, device, seed)
    return make_faulty(config, device, seed, fault=fault, after=6)


def make_met_noting(
    config: MetaConfig, device: torch.device, seed: int, *, notes: Path, processes: int
) -> ClassificationProblem:
    """Return the tiny problem, when so many processes are there; each notes which GPUs it sees."""
    note = notes / f"{os.getpid()}"
    if not note.exists():
        note.write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
    deadline = time.monotonic() + 60.0
    while len(list(notes.iterdir())) < processes and time.monotonic() < deadline:
        time.sleep(0.01)
    return make_tiny(config, device, seed)


def run_out_of_memory() -> None:
    """Be a machine that is too small."""
    raise MemoryError("this machine is full now")


def raise_once(marker: Path) -> None:
    """Raise, unless somebody has at this marker before."""
    if not marker.exists():
        marker.touch()
        raise RuntimeError("something that passes")


class Noting(IFTTrainable):
    """Notes the hash of its weights and λ at every saving and loading."""

    notes: ClassVar[Path]

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        super().save_checkpoint(checkpoint_dir)
        self._note("save")

    def load_checkpoint(self, checkpoint_dir: str) -> None:  # type: ignore[override]
        super().load_checkpoint(checkpoint_dir)
        stored = load_checkpoint(Path(checkpoint_dir) / "checkpoint.pt")
        self._note(
            "load",
            owner=(Path(checkpoint_dir) / "owner.txt").read_text(),
            stored=stored["fingerprint"],
            meta_lr=self._session.trial.config.meta_lr,
            optimizer_states=len(
                self._session.trial.joint.state_dict()["outer_optimizer"]["state"]
            ),
        )

    def _note(self, event: str, **more: Any) -> None:
        trial = self._session.trial
        note = {
            "event": event,
            "trial": self.trial_id,
            "step": trial.joint.outer_steps,
            "fingerprint": trial.fingerprint(),
        }
        with (self.notes / f"{self.trial_id}.jsonl").open("a") as file:
            file.write(json.dumps(note | more) + "\n")


def read_notes(notes: Path) -> list[dict[str, Any]]:
    """Return what `Noting` noted."""
    texts = (path.read_text() for path in sorted(notes.iterdir()))
    return [json.loads(line) for text in texts for line in text.splitlines()]


def fit(
    trainable: Any,
    path: Path,
    param_space: Mapping[str, Any] | None = None,
    *,
    run: Mapping[str, Any] | None = None,
    **settings: Any,
) -> tune.ResultGrid:
    """Run a Tuner of the user's own with its tables in ``path / "ray"``."""
    return tune.Tuner(
        trainable,
        param_space=None if param_space is None else dict(param_space),
        tune_config=tune.TuneConfig(**{"metric": "objective", "mode": "min", **settings}),
        run_config=recommended_run_config(path, verbose=0, **(run or {})),
    ).fit()


def metrics_of(results: tune.ResultGrid) -> list[dict[str, Any]]:
    """Return the last result of each trial."""
    return [dict(results[n].metrics or {}) for n in range(len(results))]


def alone(trainable: Any) -> Any:
    """Let one trial run at a time: starting a process takes longer than all tiny trials."""
    return tune.with_resources(trainable, {"cpu": 2})


def without_ray(
    path: Path,
    meta_lrs: Sequence[float],
    factory: ProblemFactory = make_tiny,
    budget: Budget = BUDGET,
    callbacks: Sequence[Callback] = (),
) -> Path:
    """Run trials in this process, and return the directory of their tables."""
    plan = TrialPlan(factory, budget, CONFIG, device="cpu", callbacks=callbacks)
    run = RunDirectory(path)
    for number, meta_lr in enumerate(meta_lrs):
        trial = plan.trial({"meta_lr": meta_lr})
        run_trial(trial, number, record=run.trial(number), facts={"trial": number})
    return path


def rows_at(path: Path, meta_lr: float, table: str = "steps") -> pd.DataFrame:
    """Return what the rows of one trial have in common with those of any run of it."""
    found: pd.DataFrame = getattr(load_results(path), table)
    rows = found[found["meta_lr"] == meta_lr].reset_index(drop=True)
    return rows.drop(columns=["run_id", "task", "arm", "trial", *MEASURED_COLUMNS])


def assert_same_rows(one: Path, other: Path, *meta_lrs: float) -> None:
    """Compare trials in both tables of two runs, to the bit."""
    for meta_lr in meta_lrs:
        for table in ("trials", "steps"):
            mine, theirs = (rows_at(path, meta_lr, table) for path in (one, other))
            assert len(mine) > 0
            pd.testing.assert_frame_equal(mine, theirs, check_exact=True, check_like=True)


faulty = functools.partial(make_faulty_at, faults={0.06: "nan", 0.07: "oom", 0.08: "bug"})
