"""The experiments of Ray behind one search: restored, begun anew, until all trials are there."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.search.basic_variant import BasicVariantGenerator

from ift_tune.errors import IFTTuneError, RunExistsError, WorkerError
from ift_tune.search.loop import StudyPlan
from ift_tune.search.ray.mistakes import CandidTrainable, StopAtMistakes
from ift_tune.search.ray.recommended import recommended_run_config
from ift_tune.search.ray.schedulers import PBT, iterations, make_scheduler
from ift_tune.search.ray.searcher import StudySearcher
from ift_tune.search.ray.session import OBJECTIVE
from ift_tune.search.ray.tables import TablesCallback
from ift_tune.search.ray.trainable import IFTTrainable, bound
from ift_tune.search.runner import Interrupt, Interrupted
from ift_tune.search.space import MetaSpace
from ift_tune.tables import RunDirectory

_STATES = (  # of which a snapshot consists, beside tuner.pkl; the searcher's is ours, and JSON
    "experiment_state-*.json",
    "search_gen_state-*.json",
    "basic-variant-state-*.json",
    "searcher-state-*.pkl",
)


class Experiments:
    """As many of Ray's experiments, one after the other, as it takes to have all trials."""

    def __init__(
        self,
        plan: StudyPlan,
        run: RunDirectory,
        space: MetaSpace,
        scheduler: str,
        resources: dict[str, float],
    ) -> None:
        self._plan, self._run, self._space = plan, run, space
        self._population = scheduler == PBT
        self._scheduler = scheduler
        self._gpus = resources["gpu"]
        least = iterations(plan.trials.budget) if self._population else 0
        kind = bound(CandidTrainable, plan.trials, least)
        self._trainable: type[IFTTrainable] = tune.with_resources(kind, resources)

    def finish(self, interrupt: Interrupt, *, restore: bool) -> None:
        """Run until `n_trials` are finished: usually one experiment, restored if there is one."""
        while (missing := self._plan.n_trials - self._finished()) > 0:
            if interrupt.requested:
                raise Interrupted("interrupted between experiments")
            before = self._finished()
            restored = self._restored() if restore else None
            restore = False
            results = _fit(restored or self._new(missing))
            if interrupt.requested:
                raise Interrupted("interrupted and saved")
            if results.errors and restored is None:  # those of one restored are known
                raise WorkerError(
                    f"the processes of {results.num_errors} trials died too often; --resume tries "
                    f"others in their place. The first with:\n{results.errors[0]}"
                )
            if self._finished() == before and restored is None:  # one restored may be over
                raise WorkerError(f"no trial was finished; Ray's logs are in {self._run.path}")

    def _statuses(self) -> list[str | None]:
        return [record.facts().get("status") for record in self._run.records()]

    def _finished(self) -> int:
        return sum(status in ("complete", "pruned") for status in self._statuses())

    def _experiments(self) -> list[Path]:
        """Return the experiments so far, the latest last."""
        found = (p for p in self._run.path.glob("ray-*") if p.is_dir())
        return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))

    def _restored(self) -> tune.Tuner | None:
        """Return the latest experiment, to go on; None if it is over or was killed too early."""
        experiments = self._experiments()
        if not experiments or not intact(experiments[-1]):
            return None
        return tune.Tuner.restore(str(experiments[-1]), trainable=self._trainable)

    def _new(self, n_trials: int) -> tune.Tuner:
        experiments = self._experiments()
        if self._population and experiments:
            raise RunExistsError(
                f"{self._run.path} holds a population that cannot be gone on with: one is trained "
                "as a whole. Start a new run in another --out"
            )
        name = f"ray-{len(experiments)}"
        seed = self._plan.trials.seed
        facts = self._plan.facts
        return tune.Tuner(
            self._trainable,
            param_space=self._space.to_ray() if self._population else None,
            tune_config=tune.TuneConfig(
                metric=OBJECTIVE,
                mode="min",
                num_samples=n_trials,
                search_alg=BasicVariantGenerator(random_state=seed)
                if self._population
                else StudySearcher(self._plan, self._space),
                scheduler=make_scheduler(self._scheduler, self._space, self._plan.trials.budget),
                trial_dirname_creator=_directory_of,
                # Starting a process and importing PyTorch takes seconds; on a GPU, a process of
                # its own for each trial is what frees all memory.
                reuse_actors=not self._gpus,
            ),
            run_config=recommended_run_config(
                self._run.path,
                name,
                tables=TablesCallback(
                    "..", task=facts["task"], arm=facts["arm"], run_id=facts["run_id"]
                ),
                checkpoints_kept=4 if self._population else 1,
                callbacks=[StopAtMistakes()],
                verbose=0,
            ),
        )


def intact(experiment: Path) -> bool:
    """Return whether Ray's latest snapshot is whole: it is not written atomically."""
    pickled = experiment / "tuner.pkl"
    if not pickled.exists() or not pickled.read_bytes().endswith(pickle.STOP):
        return False
    for state in _STATES:
        found = sorted(experiment.glob(state))
        try:
            if found:
                json.loads(found[-1].read_bytes())
        except ValueError:
            return False
    return any(experiment.glob("experiment_state-*.json"))


def _fit(tuner: tune.Tuner) -> tune.ResultGrid:
    """Run to the end; what a callback raised is raised as it was, not in Ray's wrapping."""
    try:
        return tuner.fit()
    except tune.TuneError as error:
        inner: BaseException | None = error
        while inner is not None and not isinstance(inner, IFTTuneError):
            inner = inner.__cause__ or inner.__context__
        if inner is None:
            raise
        raise inner from None


def _directory_of(trial: Any) -> str:
    """Name a trial's folder: Ray's own names hold all parameters and grow too long."""
    return str(trial.trial_id)
