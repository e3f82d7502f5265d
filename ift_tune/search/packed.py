"""Trials of one process that advance together on its device, asked and told one by one."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from ift_tune.base.errors import UsageError
from ift_tune.joint.config import MetaConfig
from ift_tune.joint.flat import USER
from ift_tune.joint.joint import JointOptimizer
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
trial of 4 took 1.5 times less CPU time than alone, one of 16 2.8 to 3.0 times less (see
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
        raise UsageError(_hooks_of(trials.callbacks[0]))
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
    warn_of_a_small_pack(pack)


def warn_of_a_small_pack(pack: int) -> None:
    """Say of a pack of so many trials that it gains little, if it does."""
    if pack <= SMALL_PACK:
        _log.warning(
            "a pack of %d trials gains little over one by one: 16 or more are worth it", pack
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


@dataclass(frozen=True, eq=False)
class Lane:
    """A search whose trials take seats in a pack.

    Attributes:
        study: Its trials are told to it.
        halves: Runs a trial by halves, and calls back with what it has made.
        judging: Decides what the study is told where one ends by an exception.
        after: Called after each.
        catch: Exceptions after which the others go on.
    """

    study: optuna.Study
    halves: Callable[
        [optuna.Trial, Callable[[Trial], object]],
        Generator[Half, None, float | tuple[float, ...]],
    ]
    judging: Callable[[optuna.Trial], AbstractContextManager[None]]
    after: Callable[[optuna.Study, FrozenTrial], None]
    catch: tuple[type[Exception], ...] = ()


Claimed: TypeAlias = tuple[Lane, optuna.Trial]
"""A search and its trial that is to run next."""


@dataclass(eq=False)
class _Seat:
    """A trial of the pack.

    Attributes:
        lane: Its search.
        trial: Optuna's.
        halves: What runs it, up to the next half of a step.
        made: What it runs, once that is made.
        next: The half that comes next.
        members: The parts in the pack of what it runs, once they have been set up.
        alone: Whether it takes its steps by itself.
    """

    lane: Lane
    trial: optuna.Trial
    halves: Generator[Half, None, float | tuple[float, ...]]
    made: Trial | None = None
    next: Half = Half.TRAIN
    members: dict[JointOptimizer, Member] = field(default_factory=dict)
    alone: bool = False

    @property
    def runs(self) -> Trial:
        """What it runs: the trial, or its retraining."""
        if self.made is None:
            raise RuntimeError("a trial of the pack has not been made")
        return self.made.stepping

    def joined(self, pack: Pack) -> Member:
        """Return its part in the pack, which begins where the trial is.

        Raises:
            UsageError: If it cannot be packed for its settings.
            PackMismatch: If it cannot for its problem.
        """
        runs = self.runs
        if runs.joint not in self.members:
            _require_packable_trial(runs)
            share, scale = runs.shares
            member = Member(
                runs.joint,
                learns=runs.learns,
                val_share=share,
                penalty_scale=scale,
                ground=pack.ground(runs.joint.problem),
            )
            # A retraining on the way is over when the next one begins; the trial goes on.
            own = {j: m for j, m in self.members.items() if self.made and j is self.made.joint}
            self.members = own | {runs.joint: member}
        return self.members[runs.joint]


class PackedTrials:
    """Drives the trials of a pack: who ends leaves, and the next one asked for takes the place."""

    def __init__(
        self,
        pack: Pack,
        size: int,
        *,
        following: Callable[[Sequence[Lane]], Claimed | None],
        interrupt: Callable[[], None],
        left_alone: Callable[[Lane, str], object] | None = None,
    ) -> None:
        """Take what is done with one trial.

        Args:
            pack: Computes their steps.
            size: How many advance together.
            following: Returns the next trial and its search, given those that trials of the pack
                are of; None if none can begin now.
            interrupt: Lets all trials save and stop at the end of their step.
            left_alone: Told of a trial that cannot be packed, and why: it goes on by itself. None:
                such a trial ends all.
        """
        self._pack, self._size, self._following = pack, size, following
        self._interrupt, self._left_alone = interrupt, left_alone
        self._seats: list[_Seat] = []
        self._ended: BaseException | None = None
        self._apart = False  # trials take their steps by themselves

    def run(self) -> None:
        """Run trials until no further one begins and all have ended.

        Raises:
            BaseException: What has ended the loop, after the others have been saved.
        """
        try:
            while True:
                try:
                    self._fill()
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

    def _fill(self) -> None:
        """Let trials begin while there is room."""
        while self._ended is None and len(self._seats) < self._size:
            found = self._following([seat.lane for seat in self._seats])
            if found is None:
                return
            self._seat(*found)

    def _end(self, error: BaseException) -> None:
        """Let all trials save and stop at the end of their step, and raise the error then."""
        self._ended = self._ended or error
        self._interrupt()

    def _end_apart(self, error: UsageError) -> None:
        """Do the same, where the pack cannot be gone on with: each takes the step by itself."""
        self._apart = True
        self._end(error)

    def _seat(self, lane: Lane, trial: optuna.Trial, *, alone: bool = False) -> None:
        seat = _Seat(lane, trial, iter(()), alone=alone)  # type: ignore[arg-type]  # known below

        def note(made: Trial) -> None:
            seat.made = made

        seat.halves = lane.halves(trial, note)
        self._seats.append(seat)
        self._next(seat)

    def _advance(self, half: Half) -> None:
        """Do a half of a step of all trials that are at it."""
        seats = [seat for seat in self._seats if seat.next is half]
        packed = [seat for seat in seats if not (seat.alone or self._apart) and self._joins(seat)]
        if packed and not self._apart:
            self._compute(half, packed)
        first: BaseException | None = None
        for seat in seats:  # all of them: what was computed for a trial is used once
            try:
                self._next(seat)
            except BaseException as error:  # noqa: BLE001  (raised below)
                first = first or error
        if first is not None:
            raise first

    def _joins(self, seat: _Seat) -> bool:
        """Return whether a trial is a member of the pack, or has become one."""
        try:
            seat.joined(self._pack)
        except (PackMismatch, UsageError) as error:
            self._leave(seat, str(error))
        except OUT_OF_MEMORY as error:
            self._end_apart(_too_large(error, len(self._seats)))
        else:
            return True
        return False

    def _leave(self, seat: _Seat, why: str) -> None:
        """Let a trial that cannot be packed take its steps by itself, or end all."""
        if self._left_alone is None:
            self._end_apart(UsageError(why))
            return
        seat.alone = True
        self._left_alone(seat.lane, why)

    def _compute(self, half: Half, seats: Sequence[_Seat]) -> None:
        """Compute a half of a step of some trials; where that fails, the search will end."""
        started = time.perf_counter()
        members = {seat.joined(self._pack): seat for seat in seats}
        try:
            if half is Half.TRAIN:
                for group in _alike(list(members)):
                    self._advanced(group, members)
            else:
                self._pack.measure(list(members), ("search", "test"))
        except PackMismatch as error:
            self._end_apart(UsageError(str(error)))
        except OUT_OF_MEMORY as error:
            self._end_apart(_too_large(error, len(seats)))
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

    def _advanced(self, members: list[Member], seats: Mapping[Member, _Seat]) -> None:
        """Compute the next step of some members, without those that turn out to be none."""
        while members:
            try:
                self._pack.advance(members)
            except PackMismatch as error:
                if self._left_alone is None or error.member is None:
                    raise
                self._leave(seats[error.member], str(error))
                members = [member for member in members if member is not error.member]
            else:
                return

    def _next(self, seat: _Seat) -> None:
        """Let a trial go on to its next half; one that ends leaves the pack."""
        lane, trial, state = seat.lane, seat.trial, None
        values: float | tuple[float, ...] | None = None
        try:
            with lane.judging(trial):
                try:
                    seat.next = next(seat.halves)
                    return
                except StopIteration as end:
                    values = end.value
        except optuna.TrialPruned:
            state = TrialState.PRUNED
        except PackMismatch as error:  # in the middle of a step: it is taken up from before that
            self._seats.remove(seat)
            self._leave(seat, f"trial {trial.number}: {error}")
            if seat.alone and seat.made is not None:
                seat.made.cleanup()
                self._seat(lane, trial, alone=True)
            return
        except lane.catch:
            state = TrialState.FAIL
        except BaseException:
            self._seats.remove(seat)
            raise
        self._seats.remove(seat)
        lane.study.tell(trial, values, state)
        lane.after(lane.study, lane.study.get_trials(deepcopy=False)[trial.number])


def _too_large(error: BaseException, trials: int) -> UsageError:
    traceback.clear_frames(error.__traceback__)  # which hold what was too large
    return UsageError(
        "the pack's trials must fit into memory together: go on with a smaller --pack "
        f"(--resume), got {trials} trials"
    )


def _require_packable_trial(trial: Trial) -> None:
    """Refuse a trial that has to take its steps by itself; what is wrong is named.

    Raises:
        UsageError: If it is one.
    """
    require_packable_config(trial.config, trial.processes, learns=trial.learns)
    if trial.learns and trial.callbacks:
        raise UsageError(_hooks_of(trial.callbacks[0]))


def _hooks_of(callback: object) -> str:
    return (
        f"{type(callback).__name__} has hooks of the optimisation, which cannot be packed: leave "
        "it out, or leave --pack off"
    )


def _alike(members: Sequence[Member]) -> list[list[Member]]:
    """Return the members in groups whose inner steps are of the same operations."""
    groups: dict[Any, list[Member]] = {}
    for member in members:
        config = member.config
        momentum = config.inner_momentum
        key = (config.inner_optimizer, momentum, config.accumulate, member.trained_splits)
        groups.setdefault(key, []).append(member)
    return list(groups.values())
