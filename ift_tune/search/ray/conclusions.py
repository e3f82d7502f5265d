"""What a trial that a stop criterion has ended comes to: worked out by a task of Ray's."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import ray
from ray import tune
from ray.tune.experiment import Trial

from ift_tune.search.ray.cluster import pack, unpack
from ift_tune.trial.record import TrialRecord, take_found

_MARK = "concludes_after"  # file in a trial's folder meanwhile: the outer step it was ended after
_OPTIONS = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}

_log = logging.getLogger(__name__)

T = TypeVar("T")


class Conclusion(NamedTuple):
    """What a trial has found, as if its budget had ended it.

    Attributes:
        found: Constant columns of the tables; empty if it could not be measured.
        retrained: Inner steps of the retraining; None if there was none.
        files: An archive of what `save_found` writes.
    """

    found: dict[str, Any]
    retrained: int | None
    files: bytes


_Reference: TypeAlias = "ray.ObjectRef[Conclusion]"


class Conclusions(Generic[T]):
    """Those that are being worked out, each for somebody who is told when it is there.

    A driver that is killed leaves marks, by which a restored experiment begins them again.
    """

    def __init__(self) -> None:
        self._begun: dict[_Reference, tuple[TrialRecord, T]] = {}

    def begin(self, trial: Trial, step: int | None, record: TrialRecord, whose: T) -> None:
        """Start to work out what a trial has found, where there is room for it.

        Args:
            trial: It has a checkpoint.
            step: The outer step after which it was ended; None: the one that was marked.
            record: Where files are written.
            whose: Who is told.
        """
        mark = record.path / _MARK
        if step is None:
            step = int(mark.read_text())
        record.write(_MARK, str(step).encode())
        self._begun[_begin(trial, step)] = (record, whose)

    def finished(self, *, wait: bool) -> Iterator[tuple[T, Conclusion]]:
        """Return each that is there, after its files are written; with `wait` all of them."""
        while self._begun:
            done, _ = ray.wait(list(self._begun), timeout=None if wait else 0)
            if not done:
                return
            for reference in done:
                record, whose = self._begun.pop(reference)
                yield whose, _take(reference, record)
                (record.path / _MARK).unlink(missing_ok=True)

    def forget(self, record: TrialRecord) -> None:
        """Take the mark away of a trial that runs again: Ray's snapshot was older than its end."""
        (record.path / _MARK).unlink(missing_ok=True)

    def left_behind(self, records: list[TrialRecord]) -> list[TrialRecord]:
        """Return those of the records that are marked, though nobody is at work for them."""
        at_work = {record.number for record, _ in self._begun.values()}
        marked = [record for record in records if (record.path / _MARK).exists()]
        return [record for record in marked if record.number not in at_work]


def _begin(trial: Trial, step: int) -> _Reference:
    """Give a trial's latest checkpoint to a process with the same resources.

    The one that it ran in is told nothing of its end, a function's not even that there is one.
    """
    factory = trial.placement_group_factory
    needed: Mapping[str, float] = {} if factory is None else factory.bundles[0]
    options: dict[str, Any] = {"num_cpus": 0.0}
    options |= {_OPTIONS[name]: value for name, value in needed.items() if name in _OPTIONS}
    own = {name: value for name, value in needed.items() if name not in _OPTIONS}
    remote: Any = ray.remote(_conclude).options(**options, resources=own)
    reference: _Reference = remote.remote(
        trial.get_trainable_cls(), dict(trial.config), trial.trial_id, trial.checkpoint, step
    )
    return reference


def _conclude(
    kind: Any, config: dict[str, Any], trial_id: str, checkpoint: tune.Checkpoint, step: int
) -> Conclusion:
    session = kind.session_of(config, trial_id)
    try:
        with checkpoint.as_directory() as saved, tempfile.TemporaryDirectory() as folder:
            session.load(saved)
            found, retrained = session.conclude(step, folder)
            return Conclusion(found, retrained, pack(Path(folder)))
    finally:
        session.close()


def _take(reference: _Reference, record: TrialRecord) -> Conclusion:
    try:
        conclusion: Conclusion = ray.get(reference)
    except ray.exceptions.RayError as error:
        last = str(error).strip().splitlines()[-1]
        _log.warning("what trial %d has found was not kept: %s", record.number, last)
        return Conclusion({}, None, b"")
    with tempfile.TemporaryDirectory() as folder:
        unpack(conclusion.files, Path(folder))
        take_found(Path(folder), record)
    return conclusion
