"""One trial of the outer search: its steps, its budget, and how it ends."""

from __future__ import annotations

import contextlib
import copy
import enum
import gc
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, final

import torch

from ift_tune.base.arguments import require_instance, require_seed, require_text
from ift_tune.base.checkpoints import (
    fingerprint,
    load_checkpoint,
    save_checkpoint,
    taking_over,
)
from ift_tune.base.direction import default_metric, direction_of
from ift_tune.base.environment import resolve_device
from ift_tune.base.errors import CheckpointError, NonFiniteError
from ift_tune.base.exclusive import exclusive
from ift_tune.base.identity import require_same
from ift_tune.base.randomness import RandomStream
from ift_tune.base.spawning import check_importable
from ift_tune.base.status import (
    FAULT,
    HEALTH_COLUMNS,
    START_CHECK_COLUMNS,
    SolveStatus,
    StopReason,
)
from ift_tune.base.views import View
from ift_tune.joint.callbacks import Callback, joint_callbacks
from ift_tune.joint.config import Budget, MetaConfig
from ift_tune.joint.cost import Cost
from ift_tune.joint.joint import JointOptimizer
from ift_tune.joint.memory import OUT_OF_MEMORY as OUT_OF_MEMORY
from ift_tune.problem.begun_again import OtherBatchesError
from ift_tune.problem.factory import build_problem, require_factory
from ift_tune.problem.problem import BilevelProblem
from ift_tune.problem.returned import as_views
from ift_tune.trial.found import FoundProblem, holding, learned_columns, sharing
from ift_tune.trial.found import ProblemFactory as ProblemFactory
from ift_tune.trial.measuring import Measuring
from ift_tune.trial.meter import Meter
from ift_tune.trial.scored import BestEvaluation
from ift_tune.trial.selection import OF_THE_BEST, BestModel, Selection
from ift_tune.trial.team import Team, require_processes
from ift_tune.trial.training import (
    PRIOR_SECONDS,
    BaselineTraining,
    JointTraining,
    Limits,
    Training,
    constants,
)

ResultT = TypeVar("ResultT")


def require_trial(config: object, budget: object, metric: object) -> None:
    """Raise a `UsageError` unless these are what a trial takes."""
    require_instance("config", config, MetaConfig, "a configuration such as MetaConfig(meta_lr=.1)")
    require_instance("budget", budget, Budget, "a budget such as Budget(outer_steps=20)")
    if metric is not None:
        require_text("metric", metric)


class Half(enum.Enum):
    """What a trial's step consists of."""

    TRAIN = "train"  # inner steps and the outer step
    MEASURE = "measure"  # of the search and the test split


def finished(halves: Generator[Half, None, ResultT]) -> ResultT:
    """Return what comes of doing one half after the other."""
    while True:
        try:
            next(halves)
        except StopIteration as end:
            found: ResultT = end.value
            return found


MAX_SKIPS = 5  # unusable hypergradients in a row after which a trial counts as diverged


@final
class Trial:
    """`setup`, then `step` until `stop_reason` is set, then `finish`.

    Two policies make it what it is: what a step does (`training`), and which evaluation of the
    search split is the result (`selection`).

    Example:
        >>> from ift_tune import Budget, MetaConfig, Trial, testing
        >>> def problem(config, device, seed):
        ...     return testing.Quadratic(seed=seed)
        >>> trial = Trial(problem, MetaConfig(inner_lr=0.1), Budget(outer_steps=3), device="cpu")
        >>> trial.setup()
        >>> while trial.stop_reason is None:
        ...     row = trial.step()
        >>> row["step"], trial.metric, trial.stop_reason.value
        (3, 'search_loss', 'done')

    Attributes:
        config: The meta-hyperparameters.
        budget: When to stop, and what to measure.
        seed: Of the problem and of the run.
        device: Where it runs.
        direction: In which the metric is better.
        callbacks: What `setup` gives the optimiser.
        joint: The optimiser, after `setup`.
        metrics: The latest value of everything measured.
        stop_reason: Why the trial ended; None while it runs.
        fault: In words, what was not finite, where that has ended it.
        stepping: What takes the present steps: the trial, or its retraining.
        taken_back: The row of the step that it has gone on after, as it is where the trial does not
            end there; None where nothing has been taken back.
    """

    def __init__(
        self,
        problem_factory: ProblemFactory,
        config: MetaConfig,
        budget: Budget,
        *,
        seed: int = 0,
        device: str | torch.device = "auto",
        metric: str | None = None,
        mode: str | None = None,
        callbacks: Sequence[Callback] = (),
        training: Training = JointTraining(),  # noqa: B008 (frozen)
        selection: Selection | None = None,
        processes: int = 1,
        further: Sequence[str] = (),
    ) -> None:
        """Describe the trial; nothing is built before `setup`.

        Args:
            problem_factory: Builds the problem on a device.
            config: The meta-hyperparameters.
            budget: The length.
            seed: The same seed gives the same trial, to the bit on the CPU.
            device: ``"auto"``, ``"cpu"``, ``"cuda:0"``, ...
            metric: The search metric that decides; default: ``search_error`` where the problem
                measures an error, else ``search_loss``.
            mode: ``"min"`` or ``"max"``: the direction in which the metric is better. Default:
                ``"min"``, but a metric whose name says that higher is better, such as
                ``search_accuracy``, needs it said.
            callbacks: Their hooks of the optimisation are called; those of the search belong to
                what drives trials, such as `run_study`.
            training: What a step does.
            selection: Which evaluation counts; a copy is taken. Default: the best, with the
                budget's patience.
            processes: How many share the examples of each batch, this one among them; the numbers
                are those of one, to rounding. On GPUs each has its own, from `device` on.
            further: Metrics that the search optimises besides: an evaluation of which one is not
                finite does not count, and a trial without one that counts has no value.

        Raises:
            UsageError: If metric and mode do not go together.
        """
        require_factory(problem_factory)
        require_trial(config, budget, metric)
        self._factory = problem_factory
        self._training, self._policy = training, selection or BestModel(budget.patience)
        self.config, self.budget = training.config(config), budget
        self.seed = require_seed(seed)
        self.device = resolve_device(device)
        self._metric, self.direction = metric, direction_of(metric, mode)
        self._splits, self._further = Measuring(metric), further
        self.callbacks: Sequence[Callback] = joint_callbacks(callbacks)
        require_processes(processes, self.device)
        if processes > 1:
            check_importable(problem_factory, what="trial")
        self.processes = processes
        self._team: Team | None = None
        self._borrowed = False  # from the trial that this one is a retraining of
        self._begin()

    def _begin(self) -> None:
        self._selection = copy.copy(self._policy)
        self.metrics: dict[str, Any] = {}
        self.stop_reason: StopReason | None = None
        self.fault = ""
        self.stepping: Trial = self
        self._measuring = False  # in the second half of the present step
        self._unmeasured: dict[str, Any] | None = None  # before an evaluation for the end alone
        self.taken_back: dict[str, Any] | None = None

    def setup(self) -> None:
        """Build the problem and the optimiser; what cannot pay its first step may be over."""
        self._begin()
        self._meter = Meter(self.device)
        problem = build_problem(self._factory, self.config, self.device, self.seed)
        self._meter.charge(float(getattr(problem, PRIOR_SECONDS, 0.0)))
        self.joint = self._optimizer(problem)
        self.joint.total_steps = self._training.total_steps(self.budget, self.joint)
        self._limits = Limits(self.budget, self._training, self.joint)
        if not self._selection.first_step_free and not self._limits.affords_a_step(self.joint):
            self.stop_reason = StopReason.PRUNED

    def _optimizer(self, problem: BilevelProblem) -> JointOptimizer:
        if self.processes == 1:
            return JointOptimizer(
                problem,
                self.config,
                seed=self.seed,
                callbacks=self.callbacks,
                problem_factory=self._factory,
            )
        self._team = self._team or Team(self.processes, self.device)
        return self._team.optimizer(problem, self._factory, self.config, self.seed, self.callbacks)

    def step(self) -> dict[str, Any] | None:
        """Take one outer step, evaluate if it is time, and decide whether the trial is over.

        Returns:
            A row of the `steps` table; None if the step could not be completed, in which case
            `stop_reason` says why.

        Raises:
            UsageError: If the problem does not measure the metric.
        """
        return finished(self.halves())

    def halves(self) -> Generator[Half, None, dict[str, Any] | None]:
        """Take the same step by halves, for whoever computes a part of several trials' at once.

        Yields:
            What comes next, before each half. Whatever happens meanwhile is not on the trial's
            clock, see `charge`.

        Returns:
            What `step` does.
        """
        row: dict[str, Any] = {"step": self.joint.outer_steps + 1}
        # Before anything of the step is computed elsewhere, for it is computed at these weights.
        if self.learns and not self._attempt(self.joint.begin_anew):
            return None
        yield Half.TRAIN
        if not self._attempt(lambda: self._train(row)):
            return None
        if self._measuring:
            self._unmeasured = None if self._is_due() else self._as_if_it_went_on(row)
            yield Half.MEASURE
            if not self._attempt(lambda: self._measure(row)):
                return None
        return (yield from self._completed(row))

    def charge(self, seconds: float) -> None:
        """Add to the trial's time what was computed for it elsewhere."""
        self._meter.charge(seconds)

    def _attempt(self, half: Callable[[], object]) -> bool:
        """Do a half of a step; return False where it could not be completed."""
        with exclusive():  # before the clock starts: a trial does not pay for another thread's
            try:
                with self._meter.running():
                    half()
            except NonFiniteError as error:
                self.stop_reason, self.fault = StopReason.NONFINITE, str(error)
                return False
            except OUT_OF_MEMORY:
                self.stop_reason = StopReason.OOM
                return False
        return True

    def _train(self, row: dict[str, Any]) -> None:
        row |= self._training.step(self.joint)
        due = self._is_due()
        if self.joint.skips >= MAX_SKIPS:
            nonfinite = self.joint.status is SolveStatus.NONFINITE
            self.stop_reason = StopReason.NONFINITE if nonfinite else StopReason.DIVERGED
        elif self.joint.exhausted or self._limits.reached(self.joint, self._meter.seconds, due=due):
            self.stop_reason = StopReason.DONE
        self._measuring = due or self.stop_reason is not None

    def _is_due(self) -> bool:
        """Return whether the search split is evaluated after this step, be it the last or not."""
        return self.joint.outer_steps % self.budget.eval_every == 0

    def _as_if_it_went_on(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return what an evaluation is about to change, which a larger budget has not here."""
        told = {**row, **self._told()}
        return {
            "row": dict.fromkeys(HEALTH_COLUMNS) | told,
            "metrics": self.metrics | told,
            "cost": asdict(self.joint.cost),
            "selection": self._selection.state_dict(),
        }

    def _measure(self, row: dict[str, Any]) -> None:
        row |= self._splits.evaluate(self.joint, row)
        if "hypergradient_norm" in row:  # of a plain training, λ stands still
            row["hyper_change"] = self.joint.hyper_change()
        row["gradient_equivalents"] = self.joint.cost.gradient_equivalents

    def _completed(self, row: dict[str, Any]) -> Generator[Half, None, dict[str, Any]]:
        row |= self._told()
        self.metrics |= row
        row = dict.fromkeys(HEALTH_COLUMNS) | row
        if self.metric in row:
            self._note(row)
            yield from self.halves_of_retraining(row)
            row |= self._selection.columns(self, row)
        if self.stop_reason is None and self._waited_enough(row):
            self.stop_reason = StopReason.DONE
        return row

    def _told(self) -> dict[str, Any]:
        """Return what every row has of the trial itself."""
        row: dict[str, Any] = {}
        row["solve_status"] = self.joint.status.value if self.joint.status else None
        if (check := self.joint.start_check) is not None:
            row |= dict(zip(START_CHECK_COLUMNS, (check.status, check.gradients), strict=True))
        row["wall_seconds"] = self._meter.seconds
        row["peak_memory_bytes"] = self._meter.peak(self.metrics.get("peak_memory_bytes"))
        return row

    def _note(self, row: Mapping[str, Any]) -> None:
        """Let an evaluation count, unless something that the search optimises is missing there."""
        if not (missing := [name for name in self._further if name in row and row[name] is None]):
            self._selection.note(self, row)
        elif self.stop_reason is StopReason.DONE and self.value is None:
            self.stop_reason = StopReason.NONFINITE
            self.fault = f"no evaluation has a finite {' and '.join(missing)}"

    def _waited_enough(self, row: Mapping[str, Any]) -> bool:
        # Between two evaluations nobody knows, and the last step of a trial is always evaluated.
        return self.metric in row and self._selection.stops_early(row["step"])

    @property
    def learns(self) -> bool:
        """Whether its steps move λ."""
        return isinstance(self._training, JointTraining)

    @property
    def shares(self) -> tuple[float, float]:
        """What its inner steps minimise; see `JointOptimizer.shares`."""
        return self._training.shares(self.joint)

    @property
    def ready(self) -> bool:
        """Whether `setup` has been called, and `cleanup` not yet."""
        return hasattr(self, "joint")

    @property
    def metric(self) -> str:
        """The column that decides. Whether it is measured shows at the first evaluation."""
        return self._metric or default_metric(self.metrics)

    @property
    def value(self) -> float | None:
        """The best value of `metric` so far; None before the first evaluation."""
        return self._selection.value

    @property
    def retrains(self) -> bool:
        """Whether `finish` will train again."""
        return self._selection.retrains(self)

    @property
    def keeps(self) -> bool:
        """Whether what it has found is to be kept, now that it is over."""
        if self._selection.keeps_broken and self.stop_reason is not StopReason.INTERRUPTED:
            return self._selection.model() is not None
        return self.stop_reason is StopReason.DONE

    def found(self) -> dict[str, Any]:
        """Return the state of the hyperparameters that the trial has found."""
        return self._selection.found(self)

    def kept(self) -> dict[str, Any] | None:
        """Return the model and λ that count with what they are of; None if they are not kept."""
        model = self._selection.model()
        if model is None:
            return None
        return {
            "model": model,
            "hyper": self.found(),
            "config": self.config.to_flat(),
            "seed": self.seed,
            "metric": self.metric,
            "mode": self.direction.value,
            "inner_steps": self.joint.inner_steps,
            "patience": self.budget.patience,
            **self._selection.best_columns(),
        }

    def as_found(self) -> AbstractContextManager[BilevelProblem]:
        """Let the problem hold what counts, and go back to the latest step afterwards."""
        return holding(self.joint.problem, self.found(), self._selection.model())

    def views(self) -> list[View]:
        """Return pictures of the hyperparameters that `found` returns."""
        with self.as_found() as problem, RandomStream(self.seed, self.device).aside():
            return as_views(problem.views())

    def constants(self) -> dict[str, Any]:
        """Return what is the same in all rows of the trial."""
        return self._training.constants(constants(self.config, self.seed, str(self.device)))

    def totals(self) -> dict[str, Any]:
        """Return what has been spent so far, by a step that could not be completed too.

        And why that could not be completed.
        """
        spent: dict[str, Any] = {}
        if self.ready:
            spent["gradient_equivalents"] = self.joint.cost.gradient_equivalents
            spent["hvps"] = float(self.joint.cost.hvps)
            spent["wall_seconds"] = self._meter.seconds
        if self.fault:
            spent[FAULT] = self.fault
        return spent | self._selection.totals()

    def finish(self) -> dict[str, Any]:
        """Return what is measured once, at the end: what was learned, and the retrained score.

        Nothing is measured of a trial that has no result.
        """
        return self._selection.finish(self)

    def learned(self) -> dict[str, Any]:
        """Return what λ has become: finite numbers and a sentence, as ``learned_<name>``."""
        with self.as_found() as problem, RandomStream(self.seed, self.device).aside():
            return learned_columns(problem)

    def retrain(self) -> dict[str, float]:
        """Train afresh, from the same initial weights, with λ frozen as found.

        The weights of the joint run followed λ's whole path and may remember the validation data
        (Vicol et al., ICML 2022); these have only the λ that came out.

        Returns:
            Metrics as ``retrained_test_error``, ``retrained_search_loss``, ..., at the best
            evaluation of the training. None if it is not finite or out of memory.
        """
        try:
            return self._selection.retrain(self)
        except (NonFiniteError, *OUT_OF_MEMORY):
            return {}

    def train_plainly(self, training: BaselineTraining, patience: int | None) -> Trial:
        """Train afresh with λ frozen as found, and return that training when it is over.

        Args:
            training: How long.
            patience: Evaluations without a better one after which it ends; None: it goes on.
        """
        if (plain := self.stepping) is not self and plain.stop_reason is not None:
            self.stepping = self  # it has been trained by halves
            return plain
        plain = self._plain(training, patience)
        plain.setup()
        with contextlib.closing(plain.joint):
            while plain.stop_reason is None:
                plain.step()
        return plain

    def halves_of_retraining(
        self, row: Mapping[str, Any] | None = None
    ) -> Generator[Half, None, None]:
        """Train afresh by halves, if `finish` would train: it then has this training's score.

        Args:
            row: The evaluation of the latest step, whose score is asked for in place of `finish`'s.
        """
        if (wanted := self._selection.retraining(self, row)) is None:
            return
        try:
            plain = self._plain(*wanted)
            plain.setup()
        except (NonFiniteError, *OUT_OF_MEMORY):
            return  # what asks for the score comes to the same, and says so
        self.stepping = plain
        with contextlib.closing(plain.joint):
            while plain.stop_reason is None:
                yield from plain.halves()

    def _plain(self, training: BaselineTraining, patience: int | None) -> Trial:
        plain = Trial(
            FoundProblem(self._factory, self.found()),
            self.config,
            training.length,
            seed=self.seed,
            device=self.device,
            metric=self.metric,
            mode=self.direction.value,
            training=training,
            selection=BestEvaluation(patience=patience),
            processes=self.processes,
        )
        plain._team, plain._borrowed = self._team, True
        plain._splits = self._splits  # what it has said of a split need not be said again
        return plain

    def rebuild(self, config: MetaConfig, device: torch.device, seed: int) -> BilevelProblem:
        """Return the problem built anew, with λ as found: the factory of a retraining."""
        return FoundProblem(self._factory, self.found())(config, device, seed)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        generations: bool = False,
        rows: str | None = None,
    ) -> None:
        """Save everything that `load` needs to go on, atomically.

        Args:
            path: The file.
            generations: Whether the one before is kept beside it.
            rows: By what the rows so far are known, see `TrialRecord.rows_digest`.
        """
        joint = self.joint.state_dict()
        if (kept := self._selection.model()) is not None:
            joint["model"] = sharing(joint["model"], kept, self.joint.problem.model)
        state = {
            "joint": joint,
            "metrics": self.metrics,
            "seconds": self._meter.seconds,
            "config": self.config.to_flat(),
            "fingerprint": self.fingerprint(),
            "identity": self._identity(),
            "mode": self.direction.value,
            "budget": self.budget.to_plain(),
            "stop_reason": None if self.stop_reason is None else self.stop_reason.value,
            "rows": rows,
            "unmeasured": self._unmeasured if self.stop_reason is StopReason.DONE else None,
        }
        save_checkpoint(path, state | self._selection.state_dict(), generations=generations)

    def load(self, path: str | os.PathLike[str], *, inherit: bool = False) -> str | None:
        """Go on from a checkpoint, after `setup`.

        Args:
            path: What `save` wrote.
            inherit: Whether it is another trial's, whose weights, λ, progress and cost this one
                takes over; see `JointOptimizer.inherit`. What is best begins anew: the other's
                best evaluation is none of this trial's settings.

        Returns:
            By what the rows up to there are known; None where that was not saved.

        Raises:
            CheckpointError: If it cannot be read, is of another problem or configuration, or does
                not hold what was saved.
            UsageError: If its trial has another seed or metric.
            OtherBatchesError: If a loader does not begin its pass as it did.
        """
        state = load_checkpoint(path)
        try:
            with taking_over(path):
                self._load(state, path, inherit=inherit)
        except OtherBatchesError as error:
            folder = str(Path(path).parent)
            raise OtherBatchesError(
                f"{error}. What this trial had come to is kept: load_best({folder!r}, "
                "make_problem) returns its best evaluation, and at='last' its last step"
            ) from error
        rows: str | None = state.get("rows")
        return rows

    def _load(
        self, state: Mapping[str, Any], path: str | os.PathLike[str], *, inherit: bool
    ) -> None:
        require_same(
            f"the trial in {path}",
            state.get("identity", {}),
            self._identity() if "identity" in state else {},
            mend="load it with the same, or begin a new trial",
        )
        if inherit:
            self.joint.inherit(state["joint"])
        elif MetaConfig.from_flat(state["config"]) == self.config:  # older ones have fewer keys
            self.joint.load_state_dict(state["joint"])
        else:
            raise CheckpointError(f"{path} is of a trial with other meta-hyperparameters")
        if self.fingerprint() != state["fingerprint"]:
            raise CheckpointError(f"{path} does not hold the weights that were saved")
        self._meter.resume(state["seconds"])
        if inherit:
            # The best, and why it ended, are of the other's settings: value, model and settings
            # that belong together come with this trial's own first evaluation.
            self._begin()
            kept = {k: v for k, v in state["metrics"].items() if not k.startswith(OF_THE_BEST)}
            self.metrics = kept
            return
        self.metrics = state["metrics"]
        reason = state["stop_reason"]
        self.stop_reason = None if reason is None else StopReason(reason)
        self._selection.load_state_dict(state)
        if self.stop_reason is StopReason.DONE:
            self._unmeasured = state.get("unmeasured")
            self._go_on_if_the_budget_has_grown()

    def _go_on_if_the_budget_has_grown(self) -> None:
        """Go on, without the evaluation that only the end of the smaller budget has asked for."""
        as_it_was = self.metrics, self._selection, self.joint.cost
        if (before := self._unmeasured) is not None:
            self.metrics, self.joint.cost = before["metrics"], Cost(**before["cost"])
            self._selection = copy.copy(self._selection)
            self._selection.load_state_dict(before["selection"])
        if self._is_over():
            self.metrics, self._selection, self.joint.cost = as_it_was
            return
        self.stop_reason = None
        if before is not None:
            self.taken_back, self._unmeasured = before["row"], None

    def _is_over(self) -> bool:
        over = self.joint.exhausted
        over = over or self._limits.reached(self.joint, self._meter.seconds, due=False)
        waits = self._unmeasured is None  # between two evaluations nobody knows
        return over or (waits and self._selection.stops_early(self.joint.outer_steps))

    def _identity(self) -> dict[str, Any]:
        """Return what decides the splits and what is the best; the budget may grow."""
        return {"seed": self.seed, "metric": self._metric}

    def fingerprint(self) -> str:
        """Return a hash of the weights and of λ."""
        problem = self.joint.problem
        return fingerprint([*problem.weights(), *problem.hypers()])

    def cleanup(self) -> None:
        """Free the problem's memory, on the GPU too."""
        if self.ready:
            self.joint.close()
            del self.joint
        if self._team is not None and not self._borrowed:
            self._team.close()
        self._team = None
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
