"""Problems that take milliseconds or go wrong on purpose, and how tables are compared."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import optuna
import pandas as pd
import torch
from torch import Tensor, nn

from ift_tune import Budget, Callback, MetaConfig, Neumann, UsageError, load_results
from ift_tune.hyper import WeightDecay
from ift_tune.hyper.supervised import ClassificationProblem
from ift_tune.problem.batches import Batch, Batches, Loader
from ift_tune.problem.problem import Splits
from ift_tune.search.space import Float, Int, MetaSpace
from ift_tune.testing.problems import Quadratic
from ift_tune.trial import runner
from ift_tune.trial.tables import MEASURED_COLUMNS

# Without the check at the start, so that calls of the losses can be counted.
CONFIG = MetaConfig(
    inverse=Neumann(terms=2, alpha=0.1),
    meta_lr=0.05,
    inner_steps=2,
    inner_lr=0.02,
    start_check=False,
)
SPACE = MetaSpace(
    {"alpha": Float(1e-3, 1.0, log=True), "meta_lr": Float(1e-3, 0.3), "inner_steps": Int(1, 3)}
)
BUDGET = Budget(outer_steps=4)

P = TypeVar("P", bound=ClassificationProblem)


def make_tiny(config: MetaConfig, device: torch.device, seed: int) -> ClassificationProblem:
    """Three overlapping clouds, a small network with dropout, a decay per weight."""
    return _build(ClassificationProblem, device, seed)


def make_saving(config: MetaConfig, device: torch.device, seed: int) -> ClassificationProblem:
    """As `make_tiny`, in processes that save after every outer step."""
    if multiprocessing.parent_process() is not None:
        runner.CHECKPOINT_SECONDS = 0.0
    return make_tiny(config, device, seed)


def make_steady(config: MetaConfig, device: torch.device, seed: int) -> ClassificationProblem:
    """As `make_saving`, without dropout: what can be packed."""
    problem = make_saving(config, device, seed)
    for module in problem.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return problem


class StopAt(Callback):
    """Presses Ctrl-C after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_trial_step(self, number: int, row: dict[str, Any]) -> None:
        if row["step"] == self._step:
            signal.raise_signal(signal.SIGINT)


class Faulty(ClassificationProblem):
    """Goes wrong in the training loss after some calls; an outer step of `CONFIG` takes three."""

    fault = "nan"
    after = 0
    calls = 0

    def train_loss(self, batch: Batch) -> Tensor:
        loss = super().train_loss(batch)
        self.calls += 1
        if self.calls <= self.after:
            return loss
        if self.fault == "nan":
            return loss * math.nan
        if self.fault == "oom":
            raise torch.OutOfMemoryError("a GPU would be full now")
        raise RuntimeError("a mistake in the user's problem")


def make_faulty(
    config: MetaConfig, device: torch.device, seed: int, *, fault: str, after: int
) -> Faulty:
    """Return the tiny problem, to go wrong after `after` calls of its training loss."""
    problem = _build(Faulty, device, seed)
    problem.fault, problem.after = fault, after
    return problem


class Rare(ClassificationProblem):
    """Measures the precision of one class too: NaN where nothing is taken for it."""

    def evaluate(self, batches: Iterable[Batch]) -> Mapping[str, Any]:
        answered = [(self.model(x).argmax(1) == 2, y == 2) for x, y in batches]
        chosen, right = (torch.cat(part) for part in zip(*answered, strict=True))
        return {**super().evaluate(batches), "precision": (chosen & right).sum() / chosen.sum()}


def make_rare(
    config: MetaConfig, device: torch.device, seed: int, *, bias: float = -1.5
) -> ClassificationProblem:
    """Return the tiny problem without dropout, a class of which is not answered at first."""
    problem = _build(Rare, device, seed)
    *_, dropout, last = problem.model.children()
    assert isinstance(dropout, nn.Dropout)
    assert isinstance(last, nn.Linear)
    dropout.p = 0.0
    with torch.no_grad():
        last.bias[2] = bias
    return problem


def make_quadratic(config: MetaConfig, device: torch.device, seed: int) -> Quadratic:
    """Return the closed-form problem, which measures losses and no errors."""
    return Quadratic(seed=seed)


def make_nothing(config: MetaConfig, device: torch.device, seed: int) -> ClassificationProblem:
    """Stand for a problem that must not be built."""
    raise AssertionError("the problem was built")


class Eventful(ClassificationProblem):
    """Takes its time, and something happens in its training loss after some calls."""

    pause = 0.0
    event: Callable[[], None] | None = None
    after = 0
    calls = 0

    def train_loss(self, batch: Batch) -> Tensor:
        time.sleep(self.pause)
        self.calls += 1
        if self.event is not None and self.calls == self.after:
            self.event()
        return super().train_loss(batch)


def make_eventful(
    config: MetaConfig,
    device: torch.device,
    seed: int,
    *,
    event: Callable[[], None] | None = None,
    meta_lr: float = math.nan,
    after: int = 6,
    pause: float = 0.0,
    notes: Path | None = None,
    checkpoints: bool = False,
) -> Eventful:
    """Return the tiny problem; in the trial with this `meta_lr` an event comes.

    Args:
        config: The trial is known by its ``meta_lr``.
        device: Where.
        seed: Of the problem.
        event: What happens there.
        meta_lr: In which trial; default: in none.
        after: At which training loss; 0: already here, while the problem is built.
        pause: Seconds that each training loss takes longer.
        notes: A folder in which each process leaves a file about itself.
        checkpoints: Whether worker processes save after every outer step.
    """
    hit = event is not None and config.meta_lr == meta_lr
    if notes is not None:
        _take_note(notes)
    if checkpoints and multiprocessing.parent_process() is not None:
        runner.CHECKPOINT_SECONDS = 0.0
    if hit and event is not None and after == 0:
        event()
    problem = _build(Eventful, device, seed)
    problem.pause, problem.after = pause, after
    problem.event = event if hit else None
    return problem


def _take_note(notes: Path) -> None:
    note = {"variables": dict(os.environ), "threads": torch.get_num_threads()}
    (notes / f"{os.getpid()}.json").write_text(json.dumps(note))


def make_met(
    config: MetaConfig, device: torch.device, seed: int, *, meeting: Path, pause: float
) -> Eventful:
    """Return the tiny problem, but the first ones not before two processes are there."""
    (meeting / str(os.getpid())).touch()
    deadline = time.monotonic() + 60.0
    while len(list(meeting.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    return make_eventful(config, device, seed, pause=pause)


def make_slow(config: MetaConfig, device: torch.device, seed: int) -> ClassificationProblem:
    """Return the tiny problem, with a pause in every outer step: time to do harm."""
    problem = make_tiny(config, device, seed)
    problem.splits = replace(problem.splits, search=Unhurried(problem.splits.search))
    return problem


class Unhurried:
    """A loader that takes its time."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Batch]:
        time.sleep(0.25)
        return iter(self._loader)


def kill_this_process() -> None:
    """Die at once, as when the system is out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_and_count(deaths: Path) -> None:
    """Die, and leave a mark for each death."""
    with deaths.open("a") as file:
        file.write("x")
    kill_this_process()


def kill_once(marker: Path) -> None:
    """Die, unless somebody has died of this marker before."""
    if not marker.exists():
        marker.touch()
        kill_this_process()


def raise_mistake() -> None:
    """Be a user's mistake that no one foresaw."""
    raise RuntimeError("a mistake in the user's problem")


def raise_usage_error() -> None:
    """Be a mistake that the package names."""
    raise UsageError("this problem cannot be used so")


class PruneAtSecondReport(optuna.pruners.BasePruner):
    """Prunes every trial at its second reported value."""

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        return len(trial.intermediate_values) >= 2


def comparable(table: pd.DataFrame) -> pd.DataFrame:
    """Drop the columns that no two runs have in common."""
    return table.drop(columns=list(MEASURED_COLUMNS))


def assert_same_tables(one: Path, other: Path) -> None:
    """Compare both tables of two run directories, to the bit."""
    for mine, theirs in zip(load_results(one), load_results(other), strict=True):
        pd.testing.assert_frame_equal(comparable(mine), comparable(theirs), check_exact=True)


def assert_same_tensors(one: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    """Compare to the bit."""
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=0.0)


def _build(kind: type[P], device: torch.device, seed: int) -> P:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, 4, generator=generator)

    def draw(size: int) -> tuple[Tensor, Tensor]:
        targets = torch.randint(3, (size,), generator=generator)
        noise = torch.randn(size, 4, generator=generator)
        return (centres[targets] + noise).to(device), targets.to(device)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 8), nn.ELU(), nn.Dropout(0.2), nn.Linear(8, 3))
    model.to(device)
    splits = Splits(
        train=Batches(*draw(48), batch_size=16, seed=seed),
        val=Batches(*draw(32)),
        search=Batches(*draw(48)),
        test=Batches(*draw(64)),
    )
    return kind(model, WeightDecay(model, "weight", init=1e-2), splits)
