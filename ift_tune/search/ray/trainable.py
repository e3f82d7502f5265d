"""IFT trials as Ray Tune trainables: a class, a function, and one that reports its errors."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import ray
from ray import tune
from ray.tune import PlacementGroupFactory
from ray.tune.experiment import Trial

from ift_tune.base.direction import Direction
from ift_tune.base.errors import EnvironmentFaultError, UsageError, WorkerError
from ift_tune.base.faults import fault_of, surroundings
from ift_tune.base.objectives import Names
from ift_tune.base.status import StopReason
from ift_tune.joint.callbacks import Callback
from ift_tune.joint.config import Budget, MetaConfig
from ift_tune.search.plan import SearchPlan
from ift_tune.search.ray.points import NUMBER
from ift_tune.search.ray.resuming import GOES_ON
from ift_tune.search.ray.session import LATEST, OBJECTIVE, Session
from ift_tune.search.space import MetaSpace
from ift_tune.trial.plan import TrialPlan
from ift_tune.trial.trial import ProblemFactory

_BASE_CONFIG = "base_config"  # TrialPlan.config by another name: Ray has a `config` of its own
_COMMON = (
    *(_BASE_CONFIG if item.name == "config" else item.name for item in fields(TrialPlan)),
    "space",
)


class IFTTrainable(tune.Trainable):
    """A Ray Tune trainable that runs one inner IFT optimisation.

    Its configuration holds flat `MetaConfig` keys. What all trials have in common comes from
    `ray_trainable`, from ``tune.with_parameters(IFTTrainable, problem_factory=..., budget=...)``,
    or from the configuration itself under the same names: `problem_factory` and `budget`, and, if
    wanted, `space`, `base_config`, `seed`, `device`, `metric`, `mode`, `callbacks`; see
    `TrialPlan`.

    With `iterations` a trial ends with that training iteration, neither before nor after: a
    synchronous population, which waits for all members, would wait for ever for one that is gone.
    One that is over before (by its patience, another limit of the budget, or divergence) takes no
    more steps, but reports: its latest value, or the worst one if it has diverged. It goes on if it
    exploits another, and is retrained when it ends.

    One training iteration is a block of ``budget.eval_every`` outer steps. Every result holds
    ``objective``, which is better in the direction of `mode` (give the ``TuneConfig`` the same),
    and is finite; a trial that diverges ends with the worst one of that direction, 10⁹ or −10⁹, and
    says so in ``stop_reason``. It is that of the best evaluation so far; ``latest_objective`` is
    that of the latest, by which a population has to be compared.

    Example:
        >>> from ift_tune import Budget, IFTTrainable, testing
        >>> def problem(config, device, seed):
        ...     return testing.Quadratic(seed=seed)
        >>> common = {"problem_factory": problem, "budget": Budget(outer_steps=2)}
        >>> trial = IFTTrainable(common | {"meta_lr": 0.05})  # as Ray's processes make it
        >>> results = [trial.train() for _ in range(2)]
        >>> [(result["outer_step"], result["stop_reason"]) for result in results]
        [(1, ''), (2, 'done')]
        >>> trial.stop()
    """

    plan: ClassVar[SearchPlan | None] = None
    iterations: ClassVar[int] = 0

    def setup(self, config: dict[str, Any], **common: Any) -> None:
        """Build the problem on the device that Ray has allotted.

        Raises:
            UsageError: If something is missing, or a key or value is wrong.
        """
        self._common = common
        self._open(config)

    def _open(self, config: dict[str, Any]) -> None:
        common = self._common | {key: config[key] for key in config if key in _COMMON}
        point = {key: value for key, value in config.items() if key not in _COMMON}
        self._session = Session(_plan_of(type(self).plan, common), point, self.trial_id, _COMMON)
        self._goes_on: str | None = config.get(GOES_ON)

    @classmethod
    def session_of(cls, config: dict[str, Any], trial_id: str) -> Session:
        """Return the session of one of Ray's trials, outside of the process that it ran in."""
        session: Session = cls(config=config)._session
        session.trial_id = trial_id
        return session

    def step(self) -> dict[str, Any]:
        """Run one block of outer steps; see `Session.advance`."""
        if self._goes_on is not None:  # not before: Ray may have a later checkpoint to be loaded
            self._iteration = self._session.go_on(self._goes_on)  # as Ray's own restore() does
            self._goes_on = None
        left = self.iterations - self.iteration - 1 if self.iterations else None
        return self._session.advance(left)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Save weights, λ, both optimisers, positions and random states."""
        self._session.save(checkpoint_dir)

    def load_checkpoint(self, checkpoint_dir: str) -> None:  # type: ignore[override]
        """Go on from a checkpoint: exactly from one's own, with w and λ from another trial's."""
        self._goes_on = None
        self._session.load(checkpoint_dir)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Become another trial in the same process."""
        self._session.close()
        self._open(new_config)
        return True

    def cleanup(self) -> None:
        """Free the memory, on the GPU too."""
        if hasattr(self, "_session"):
            self._session.close()

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> PlacementGroupFactory:
        """Ask for one core; ``tune.with_resources`` changes that."""
        return PlacementGroupFactory([{"CPU": 1.0}])


def ray_trainable(
    problem_factory: ProblemFactory,
    space: MetaSpace,
    budget: Budget,
    *,
    config: MetaConfig | None = None,
    seed: int = 0,
    device: str = "auto",
    metric: Names = None,
    mode: Names = None,
    iterations: int = 0,
    callbacks: Sequence[Callback] = (),
) -> type[IFTTrainable]:
    """Return a trainable for a problem, to be tuned with ``param_space=space.to_ray()``.

    Args:
        problem_factory: ``factory(config, device, seed)``, importable on every node.
        space: What varies. Of the keys that Ray draws, those that the drawn inverse does not have
            are left out.
        budget: Length of each trial.
        config: What does not vary. Default: ``MetaConfig()``.
        seed: Of every trial's problem.
        device: ``"auto"``: what Ray allots.
        metric: The search metric behind ``objective``; see `Trial`. Of several it is the first; a
            searcher of several metrics finds the others in the results under their names.
        mode: ``"min"`` or ``"max"``: its direction, and the mode for the ``TuneConfig``; for
            several metrics, one for each.
        iterations: Training iterations that each trial has, no fewer and no more: as many as the
            budget allows, under population based training with ``synch=True``. 0: its budget ends
            it.
        callbacks: Their hooks of the optimisation run in the trials' processes, each of which has a
            copy. Those of the search are called by `run_ray` alone: a Tuner has Ray's own.

    Raises:
        UsageError: If the corners of the space are no valid configurations, or metric and mode do
            not go together.

    Example:
        >>> from ift_tune import Budget, Float, MetaSpace, ray_trainable, testing
        >>> def problem(config, device, seed):
        ...     return testing.Quadratic(seed=seed)
        >>> space = MetaSpace({"meta_lr": Float(0.01, 0.1, log=True)})
        >>> trainable = ray_trainable(problem, space, Budget(outer_steps=4, eval_every=2))
        >>> trial = trainable({"meta_lr": 0.05})  # as Ray's processes do
        >>> result = trial.train()
        >>> result["outer_step"], result["metric"], result["done"]
        (2, 'search_loss', False)
        >>> trial.stop()
    """
    trials = TrialPlan(
        problem_factory, budget, config or MetaConfig(), seed, device, metric, mode, callbacks
    )
    return bound(IFTTrainable, SearchPlan(trials, space), iterations)


def bound(kind: type[IFTTrainable], plan: SearchPlan, iterations: int = 0) -> type[IFTTrainable]:
    """Return the trainable with its plan and its number of iterations.

    Its name says that it cannot be imported, so that Ray sends the class and not the name.
    """
    name = IFTTrainable.__name__
    local = f"bound.<locals>.{name}"
    return type(name, (kind,), {"plan": plan, "iterations": iterations, "__qualname__": local})


def ray_function(
    problem_factory: ProblemFactory,
    space: MetaSpace,
    budget: Budget,
    *,
    config: MetaConfig | None = None,
    seed: int = 0,
    device: str = "auto",
    metric: Names = None,
    mode: Names = None,
    checkpoint_every: int = 1,
    callbacks: Sequence[Callback] = (),
) -> Callable[[dict[str, Any]], None]:
    """Return the same as a function trainable; see `ray_trainable`.

    Args:
        problem_factory: As there, and so the others.
        space: What varies.
        budget: Length of each trial.
        config: What does not vary.
        seed: Of every trial's problem.
        device: What Ray allots.
        metric: The search metric.
        mode: Its direction, as there.
        checkpoint_every: Results between checkpoints; the last result has one too.
        callbacks: As there.

    Example:
        >>> from ray import tune
        >>> from ift_tune import Budget, Float, MetaSpace, ray_function, testing
        >>> def problem(config, device, seed):
        ...     return testing.Quadratic(seed=seed)
        >>> space = MetaSpace({"meta_lr": Float(0.01, 0.1, log=True)})
        >>> function = ray_function(problem, space, Budget(outer_steps=4))
        >>> tuner = tune.Tuner(function, param_space=space.to_ray())  # tuner.fit() starts Ray
    """
    trials = TrialPlan(
        problem_factory, budget, config or MetaConfig(), seed, device, metric, mode, callbacks
    )
    plan = SearchPlan(trials, space)

    class OfFunction:
        """What Ray makes of the function inherits this."""

        @classmethod
        def session_of(cls, config: dict[str, Any], trial_id: str) -> Session:
            """Return the session of one of Ray's trials, as `IFTTrainable.session_of`."""
            return Session(plan, config, trial_id)

    def ift_function(config: dict[str, Any]) -> None:
        session = Session(plan, config, str(tune.get_context().get_trial_id()))
        if (checkpoint := tune.get_checkpoint()) is not None:
            with checkpoint.as_directory() as directory:
                session.load(directory)
        results = 0
        while True:
            result = session.advance()
            results += 1
            if not result["done"] and results % checkpoint_every:
                tune.report(result)
                continue
            with tempfile.TemporaryDirectory() as directory:
                session.save(directory)
                tune.report(result, checkpoint=tune.Checkpoint.from_directory(directory))
            if result["done"]:
                return

    # Ray's protocol for what a function cannot say itself; its own wrappers keep it.
    ift_function.__mixins__ = (OfFunction,)  # type: ignore[attr-defined]
    return ift_function


def _plan_of(plan: SearchPlan | None, common: dict[str, Any]) -> SearchPlan:
    """Return the plan, with what Ray's parameters or configuration hold in place of its own."""
    common = dict(common)
    if _BASE_CONFIG in common:
        common["config"] = common.pop(_BASE_CONFIG)
    space = common.pop("space", None if plan is None else plan.space)
    if plan is not None:
        return SearchPlan(replace(plan.trials, **common), space)
    missing = [name for name in ("problem_factory", "budget") if name not in common]
    if missing:
        raise UsageError(
            f"IFTTrainable lacks {' and '.join(missing)}: use ray_trainable(problem_factory, "
            "space, budget), or tune.with_parameters(IFTTrainable, ...)"
        )
    return SearchPlan(TrialPlan(**common), space)


_MISTAKE, _USAGE, _FAULT = "mistake", "usage_mistake", "fault"


class ErrorReportingTrainable(IFTTrainable):
    """Reports an exception as a result, so that the driver raises it as it was.

    Ray restarts a trial that raises, which no mistake of the user's is mended by, and wraps what it
    raises in errors of its own.
    """

    _mistake: dict[str, Any] | None = None

    def setup(self, config: dict[str, Any], **common: Any) -> None:
        """Keep an exception for the first step."""
        self._try(super().setup, config, **common)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Keep an exception for the next step."""
        self._mistake = None
        self._try(super().reset_config, new_config)
        return True

    def load_checkpoint(self, checkpoint_dir: str) -> None:  # type: ignore[override]
        """Keep an exception for the next step."""
        if self._mistake is None:
            self._try(super().load_checkpoint, checkpoint_dir)

    def step(self) -> dict[str, Any]:
        """Run a block, or report what has gone wrong."""
        direction = Direction.MIN if self.plan is None else self.plan.direction
        result = None if self._mistake else self._try(super().step)
        return result or {
            OBJECTIVE: direction.penalty,
            LATEST: direction.penalty,
            "metric": OBJECTIVE,
            "mode": direction.value,
            "outer_step": 0,
            "done": True,
            "stop_reason": StopReason.FAILED.value,
            **(self._mistake or {}),
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Save what can be gone on with."""
        if self._mistake is None:
            super().save_checkpoint(checkpoint_dir)

    def _try(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            with surroundings(f"trial {self.config.get(NUMBER, self.trial_id)}"):
                return function(*arguments, **options)
        except UsageError as error:
            self._mistake = {_USAGE: str(error)}
        except EnvironmentFaultError as fault:
            self._mistake = {_FAULT: str(fault), "stop_reason": StopReason.INTERRUPTED.value}
        except Exception:  # noqa: BLE001  (it is raised again by the driver)
            self._mistake = {_MISTAKE: traceback.format_exc()}
        return None


class Faulty(Protocol):
    """Whoever keeps a fault of the environment until it can be raised."""

    fault: EnvironmentFaultError | None


class StopOnError(tune.Callback):
    """Ends the search when a trial tells of an exception.

    An exception in a callback is how one ends ``Tuner.fit`` at once, the other trials as they are.
    Where Ray would make a failure of the trial out of one, it is raised a moment later.
    """

    def __init__(self, faults: Sequence[Faulty] = ()) -> None:
        """Take whose faults of the environment are raised too."""
        self._faults = faults
        self._fault: EnvironmentFaultError | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_faults": (), "_fault": None}  # in Ray's snapshots, which nobody goes on from

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Raise what a trial could not."""
        if _USAGE in result:
            raise UsageError(result[_USAGE])
        if _FAULT in result:
            raise EnvironmentFaultError(result[_FAULT])
        if _MISTAKE in result:
            raise WorkerError(f"a trial failed; --resume tries it again:\n{result[_MISTAKE]}")

    def on_trial_recover(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Look whether a call of Ray's has met a fault of the environment in the process."""
        if (error := _raised_in(trial)) is not None:
            name = f"trial {trial.config.get(NUMBER, trial.trial_id)}"
            self._fault = self._fault or fault_of(name, error)

    on_trial_error = on_trial_recover

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Raise a fault that somebody has kept."""
        for fault in (self._fault, *(kept.fault for kept in self._faults)):
            if fault is not None:
                raise fault


def _raised_in(trial: Trial) -> BaseException | None:
    """Return what a trial's process has raised, None if it died; Ray has just written it."""
    if trial.pickled_error_file is None:
        return None
    error: BaseException = ray.cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    return getattr(error, "cause", None) or error
