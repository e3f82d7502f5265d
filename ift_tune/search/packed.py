"""Trials of one process that advance together on its device, asked and told one by one."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from ift_tune.base.environment import resolve_device
from ift_tune.base.errors import UsageError
from ift_tune.joint.config import MetaConfig
from ift_tune.joint.flat import USER
from ift_tune.joint.packed import (
    Member,
    Pack,
    PackMismatch,
    require_packable,
    require_packable_config,
)
from ift_tune.problem.factory import build_problem
from ift_tune.search.distributions import Choice
from ift_tune.trial.plan import TrialPlan
from ift_tune.trial.trial import OUT_OF_MEMORY, Half, Trial

if TYPE_CHECKING:
    from ift_tune.search.space import Space

SMALL_PACK = 4
"""Up to so many trials a pack gains little: what it does beside the arithmetic (copies into the
stack and back, `vmap` itself) is shared by too few. On ``digits-weight-decay``, on a processor, a
trial of 4 took 1.1 to 1.3 times less CPU time than alone, one of 16 2.1 to 2.5 times less (see
docs/cluster.md)."""

_log = logging.getLogger(__name__)


def prepare_pack(
    trials: TrialPlan, space: Space | None, pack: int, device: torch.device, *, heartbeat: bool
) -> None:
    """Refuse a search whose trials cannot be packed, before anything is written.

    Args:
        trials: Its trials.
        space: What varies.
        pack: How many shall advance together.
        device: Where the problem is built, to look at it.
        heartbeat: Whether the study's storage looks for trials whose process is gone.

    Raises:
        UsageError: If something is in the way; it is named.
    """
    if trials.callbacks:
        kind = type(trials.callbacks[0]).__name__
        raise UsageError(
            f"{kind} has hooks of the optimisation, which cannot be packed: leave it out, or leave "
            "--pack off"
        )
    if heartbeat:
        raise UsageError(
            "a storage with heartbeats has one trial of a process alive, so that trials cannot be "
            "packed: leave heartbeat_interval out, or leave --pack off"
        )
    distributions = {} if space is None else dict(space.distributions)
    if own := [key for key in distributions if key.startswith(USER)]:
        raise UsageError(
            f"a space that varies {own[0]} gives each trial another problem, which cannot be "
            "packed: fix it, or leave --pack off"
        )
    for config in [trials.config, *_choices(trials.config, distributions)]:
        require_packable_config(config, trials.processes)
    pack_for(trials, device)
    if pack <= SMALL_PACK:
        _log.warning(
            "a pack of %d trials gains little over one by one: 16 or more are worth it",
            pack,
        )


def _choices(config: MetaConfig, distributions: dict[str, Any]) -> list[MetaConfig]:
    """Return the configuration with each option of each choice of the space."""
    return [
        config.updated({key: option})
        for key, each in distributions.items()
        if isinstance(each, Choice) and MetaConfig.applies(key, config.to_flat())
        for option in each.options
    ]


def pack_for(trials: TrialPlan, device: torch.device) -> Pack:
    """Return what takes the steps of a search's trials at once.

    Raises:
        UsageError: If the problem cannot be packed.
    """
    problem = build_problem(trials.problem_factory, trials.config, device, trials.seed)
    return Pack(problem, measures=require_packable(problem, trials.config))


@dataclass(eq=False)
class _Seat:
    """A trial of the pack.

    Attributes:
        trial: Optuna's.
        halves: What runs it, up to the next half of a step.
        made: What it runs, once that is made.
        next: The half that comes next.
        member: Its part in the pack, once it has been set up.
    """

    trial: optuna.Trial
    halves: Generator[Half, None, float | tuple[float, ...]]
    made: Trial | None = None
    next: Half = Half.TRAIN
    member: Member | None = None

    @property
    def runs(self) -> Trial:
        """What it runs: the trial, or its retraining."""
        if self.made is None:
            raise RuntimeError("a trial of the pack has not been made")
        return self.made.stepping

    def joined(self, pack: Pack) -> Member:
        """Return its part in the pack, which begins where the trial is."""
        runs = self.runs
        if self.member is None or self.member.joint is not runs.joint:
            pack.require_same(runs.joint.problem)
            self.member = Member(runs.joint, learns=runs.learns)
        return self.member


class PackedTrials:
    """Drives the trials of a pack: who ends leaves, and the next one asked for takes the place."""

    def __init__(
        self,
        trials: TrialPlan,
        size: int,
        study: optuna.Study,
        *,
        claim: Callable[[], optuna.Trial | None],
        halves: Callable[
            [optuna.Trial, Callable[[Trial], object]],
            Generator[Half, None, float | tuple[float, ...]],
        ],
        judging: Callable[[optuna.Trial], AbstractContextManager[None]],
        after: Callable[[optuna.Study, FrozenTrial], None],
        catch: tuple[type[Exception], ...],
        interrupt: Callable[[], None],
    ) -> None:
        """Take what is done with one trial.

        Args:
            trials: What they have in common.
            size: How many advance together.
            study: They are told to it.
            claim: Returns the next trial; None if no further one shall begin.
            halves: Runs a trial by halves, and calls back with what it has made.
            judging: Decides what the study is told where one ends by an exception.
            after: Called after each.
            catch: Exceptions after which the others go on.
            interrupt: Lets all trials save and stop at the end of their step.
        """
        self._size, self._study, self._claim = size, study, claim
        self._halves, self._judging, self._after = halves, judging, after
        self._catch, self._interrupt = catch, interrupt
        self._pack = pack_for(trials, resolve_device(trials.device))
        self._seats: list[_Seat] = []
        self._ended: BaseException | None = None
        self._apart = False  # trials take their steps by themselves

    def run(self, timeout: float | None) -> None:
        """Run trials until no further one shall begin and all have ended.

        Args:
            timeout: Seconds after which none begins.

        Raises:
            BaseException: What has ended the loop, after the others have been saved.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        more = True
        try:
            while True:
                try:
                    while more and self._ended is None and len(self._seats) < self._size:
                        late = deadline is not None and time.monotonic() >= deadline
                        trial = None if late else self._claim()
                        if trial is None:
                            more = False
                        else:
                            self._seat(trial)
                    if not self._seats:
                        break
                    self._advance(Half.TRAIN)
                    self._advance(Half.MEASURE)
                except KeyboardInterrupt:
                    raise
                except BaseException as error:  # noqa: BLE001  (raised below)
                    self._end(error)
        finally:
            for seat in self._seats:  # their records say that they run: they are taken up again
                seat.halves.close()
        if self._ended is not None:
            raise self._ended

    def _end(self, error: BaseException) -> None:
        """Let all trials save and stop at the end of their step, and raise the error then."""
        self._ended = self._ended or error
        self._interrupt()

    def _end_apart(self, error: UsageError) -> None:
        """Do the same, where the pack cannot be gone on with: each takes the step by itself."""
        self._apart = True
        self._end(error)

    def _seat(self, trial: optuna.Trial) -> None:
        seat = _Seat(trial, iter(()))  # type: ignore[arg-type]  # until it is known what runs it

        def note(made: Trial) -> None:
            seat.made = made

        seat.halves = self._halves(trial, note)
        self._seats.append(seat)
        self._next(seat)

    def _advance(self, half: Half) -> None:
        """Do a half of a step of all trials that are at it."""
        seats = [seat for seat in self._seats if seat.next is half]
        if not seats:
            return
        if not self._apart:
            self._compute(half, seats)
        first: BaseException | None = None
        for seat in seats:  # all of them: what was computed for a trial is used once
            try:
                self._next(seat)
            except BaseException as error:  # noqa: BLE001  (raised below)
                first = first or error
        if first is not None:
            raise first

    def _compute(self, half: Half, seats: Sequence[_Seat]) -> None:
        """Compute a half of a step of some trials; where that fails, the search will end."""
        started = time.perf_counter()
        try:
            members = [seat.joined(self._pack) for seat in seats]
            if half is Half.TRAIN:
                for group in _alike(members):
                    self._pack.advance(group)
            else:
                self._pack.measure(members, ("search", "test"))
        except PackMismatch as error:
            self._end_apart(UsageError(str(error)))
        except OUT_OF_MEMORY as error:
            traceback.clear_frames(error.__traceback__)  # which hold what was too large
            self._end_apart(
                UsageError(
                    "the pack's trials must fit into memory together: go on with a smaller --pack "
                    f"(--resume), got {len(seats)} trials"
                )
            )
        except Exception as error:  # noqa: BLE001  (raised when the others have been saved)
            wrong = UsageError(
                f"the losses could not be taken of several trials at once ({error}): go on with "
                "--resume and without --pack"
            )
            wrong.__cause__ = error
            self._end_apart(wrong)
        share = (time.perf_counter() - started) / len(seats)
        for seat in seats:
            seat.runs.charge(share)

    def _next(self, seat: _Seat) -> None:
        """Let a trial go on to its next half; one that ends leaves the pack."""
        trial, state = seat.trial, None
        values: float | tuple[float, ...] | None = None
        try:
            with self._judging(trial):
                try:
                    seat.next = next(seat.halves)
                    return
                except StopIteration as end:
                    values = end.value
        except optuna.TrialPruned:
            state = TrialState.PRUNED
        except PackMismatch as error:  # in the middle of a step: it is taken up from before that
            self._seats.remove(seat)
            self._end_apart(UsageError(f"trial {trial.number}: {error}"))
            return
        except self._catch:
            state = TrialState.FAIL
        except BaseException:
            self._seats.remove(seat)
            raise
        self._seats.remove(seat)
        self._study.tell(trial, values, state)
        self._after(self._study, self._study.get_trials(deepcopy=False)[trial.number])


def _alike(members: Sequence[Member]) -> list[list[Member]]:
    """Return the members in groups whose steps are of the same operations."""
    groups: dict[Any, list[Member]] = {}
    for member in members:
        config = member.config
        momentum = config.inner_momentum
        key = (config.inner_optimizer, momentum, config.accumulate, config.inverse.name)
        groups.setdefault(key, []).append(member)
    return list(groups.values())
