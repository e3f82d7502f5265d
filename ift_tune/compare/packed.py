"""The searches of a comparison that advance together: at any time a trial of each is in a pack.

A search asks for a trial when the one before has ended, and each trial has what the earlier ones
have left of the budget. So its trials come one after the other as ever, and its table stays what it
is; the trials that advance together are of other arms and of other seeds.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from ift_tune.base.errors import UsageError
from ift_tune.base.interrupt import Interrupt
from ift_tune.compare.comparison import Comparison
from ift_tune.joint.packed import Pack, require_packable, require_packable_config
from ift_tune.problem.factory import build_problem
from ift_tune.search.loop import Leave, StudyLoop
from ift_tune.search.packed import Claimed, Lane, PackedTrials
from ift_tune.search.storage_faults import using_storage

_log = logging.getLogger(__name__)


def pack_of(comparison: Comparison, seeds: Sequence[int], device: torch.device) -> Pack:
    """Return what takes the steps of a comparison's trials at once.

    Args:
        comparison: The task and its settings.
        seeds: Of the searches, one for each.
        device: Where they run.

    Raises:
        UsageError: If they cannot be packed.
    """
    if comparison.budget.seconds is not None or comparison.trial_budget.seconds is not None:
        raise UsageError(
            "a budget in seconds cannot be packed, for nobody knows what the time of a pack was "
            "spent on: give it in gradient_equivalents (--budget), or leave --pack off"
        )
    config, factory = comparison.config, comparison.problem_factory
    require_packable_config(config, learns=False)  # whether IFT trials can be, each of them shows
    first, *others = [
        build_problem(factory, config, device, seed) for seed in sorted(set(seeds))[:2]
    ]
    measures = require_packable(first, config, *others)
    return Pack(first, measures=measures, several=True)


@dataclass(eq=False)
class _Search:
    """A search that has begun.

    Attributes:
        number: Which.
        loop: Runs its trials.
        lane: The same, as the pack sees it.
        held: What is let go when it is left.
    """

    number: int
    loop: StudyLoop
    lane: Lane
    held: contextlib.ExitStack


class PackedSearches:
    """Runs searches in one process, as many at a time as a pack has room for."""

    def __init__(
        self,
        pack: Pack,
        size: int,
        numbers: Sequence[int],
        *,
        begun: Callable[[int], AbstractContextManager[StudyLoop | None]],
        finish: Callable[[int], None],
        on_done: Callable[[int], None],
        name_of: Callable[[int], str],
        interrupt: Interrupt,
    ) -> None:
        """Take the searches.

        Args:
            pack: Computes their trials' steps.
            size: How many at a time.
            numbers: Which.
            begun: Holds a search and returns what runs its trials; None if another process does.
            finish: Called with each that is finished, while it is held.
            on_done: Called afterwards.
            name_of: Returns what messages call one.
            interrupt: Looked at between outer steps.
        """
        self._pack, self._size, self._waiting = pack, size, deque(numbers)
        self._begun, self._finish, self._on_done = begun, finish, on_done
        self._name_of, self._interrupt = name_of, interrupt
        self._open: list[_Search] = []
        self._told: set[str] = set()

    def run(self) -> None:
        """Run them until none is left that nobody else is at.

        Raises:
            Interrupted: If the user asked to stop.
            Exception: Whatever a problem raises.
        """
        trials = PackedTrials(
            self._pack,
            self._size,
            following=self._following,
            interrupt=self._stop,
            left_alone=self._left_alone,
        )
        ended: BaseException | None = None
        try:
            with using_storage():  # what trials and callbacks raise does not pass here
                trials.run()
        except Leave as end:
            ended = end.__cause__
        finally:
            for search in self._open:
                search.held.close()
        if ended is not None:
            raise ended

    def _stop(self) -> None:
        self._interrupt.requested = True

    def _following(self, busy: Sequence[Lane]) -> Claimed | None:
        """Return the next trial: of a search that has begun, or of the next one that is free."""
        for search in list(self._open):
            if search.lane not in busy and (found := self._next_of(search)) is not None:
                return found
        while self._waiting:
            begun = self._begin(self._waiting.popleft())
            if begun is not None and (found := self._next_of(begun)) is not None:
                return found
        return None

    def _begin(self, number: int) -> _Search | None:
        with contextlib.ExitStack() as stack:
            loop = stack.enter_context(self._begun(number))
            if loop is None:
                return None
            stack.enter_context(loop.open())
            search = _Search(number, loop, loop.lane(), stack.pop_all())
        self._open.append(search)
        return search

    def _next_of(self, search: _Search) -> Claimed | None:
        """Return its next trial; a search that has none any more is finished."""
        trial = search.loop.claim()
        if trial is not None:
            return search.lane, trial
        self._finish(search.number)
        self._open.remove(search)
        search.held.close()
        self._on_done(search.number)
        return None

    def _left_alone(self, lane: Lane, why: str) -> None:
        """Say once of each arm why trials of it take their steps by themselves."""
        number = next(search.number for search in self._open if search.lane is lane)
        arm = self._name_of(number).partition(" with ")[0]
        if arm not in self._told:
            self._told.add(arm)
            _log.warning("trials of %s take their steps by themselves, not packed: %s", arm, why)
