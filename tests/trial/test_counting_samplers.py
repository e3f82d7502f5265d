"""Runs over samplers that count their passes are resumed; of what cannot be, all is said."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_problems import CONFIG, SPACE, assert_same_tables
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Sampler, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from ift_tune import (
    Budget,
    Callback,
    ClassificationProblem,
    MetaConfig,
    Splits,
    UsageError,
    WeightDecay,
    load_best,
    refit,
    run_study,
)
from ift_tune.base.errors import Interrupted
from ift_tune.joint.joint import JointOptimizer
from ift_tune.trial.session import run_single

ROWS = 24


class Epochs(Sampler[int]):
    """Seeds a generator with the number of passes so far."""

    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter(torch.randperm(ROWS, generator=torch.Generator().manual_seed(self.epoch)))


class Groups(BatchSampler):
    """A sampler of batches that counts its passes where the first is drawn."""

    def __init__(self) -> None:
        super().__init__(range(ROWS), 6, drop_last=False)
        self.passes = 0

    def __iter__(self) -> Iterator[list[int]]:
        self.passes += 1
        order = random.Random(self.passes).sample(range(ROWS), ROWS)
        yield from (order[at : at + 6] for at in range(0, ROWS, 6))


class Plain:
    """A sampler that is not of PyTorch's class, around one that counts."""

    def __init__(self) -> None:
        self.inner = Epochs()

    def __iter__(self) -> Iterator[int]:
        return iter(self.inner)

    def __len__(self) -> int:
        return ROWS


class Hidden(Sampler[int]):
    """Draws from what nobody can put back."""

    def __init__(self, draw: Callable[[], Any]) -> None:
        self._draw = draw

    def __iter__(self) -> Iterator[int]:
        return iter(self._draw().tolist())

    def __len__(self) -> int:
        return ROWS


def enclosed() -> Callable[[], Any]:
    generator = np.random.RandomState(0)
    return lambda: generator.permutation(ROWS)


def loader_of(data: TensorDataset, kind: str) -> DataLoader[Any]:
    if kind == "batch sampler":
        return DataLoader(data, batch_sampler=Groups())
    samplers: dict[str, Callable[[], Any]] = {
        "epochs": Epochs,
        "plain": Plain,
        "set_epoch": lambda: DistributedSampler(data, num_replicas=1, rank=0),
        "new generators": lambda: Hidden(lambda: np.random.default_rng().permutation(ROWS)),
        "enclosed generator": lambda: Hidden(enclosed()),
    }
    return DataLoader(data, 6, sampler=samplers[kind]())


def factory(kind: str, split: str = "train") -> Callable[..., ClassificationProblem]:
    def make(config: MetaConfig, device: torch.device, seed: int) -> ClassificationProblem:
        draw = torch.Generator().manual_seed(5)
        inputs = torch.randn(2 * ROWS, 3, generator=draw)
        labels = (inputs[:, 0] + 0.3 * torch.randn(2 * ROWS, generator=draw) > 0).long()
        data = TensorDataset(inputs[:ROWS], labels[:ROWS])
        others = [(inputs[ROWS:], labels[ROWS:])]
        splits: dict[str, Any] = dict.fromkeys(("train", "val", "search", "test"), others)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 2))
        return ClassificationProblem(
            model, WeightDecay(model), Splits(**splits | {split: loader_of(data, kind)})
        )

    return make


class SetsEpochs(Callback):
    """Tells PyTorch's sampler the epoch, as its users do."""

    def on_outer_step_begin(self, joint: JointOptimizer) -> None:
        sampler = getattr(joint.problem.splits.train, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            sampler.set_epoch(joint.outer_steps)


class Stop(Callback):
    """Presses Ctrl-C during a step."""

    def on_trial_step(self, number: int, row: dict[str, Any]) -> None:
        if row["step"] == 5:
            signal.raise_signal(signal.SIGINT)


def single(out: Path, make: Any, *callbacks: Callback, resume: bool = False) -> None:
    run_single(
        make,
        Budget(outer_steps=8),
        out=out,
        config=CONFIG.updated({"inner_steps": 3}),
        device="cpu",
        baseline=True,
        callbacks=[SetsEpochs(), *callbacks],
        resume=resume,
    )


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", ["epochs", "batch sampler", "plain", "set_epoch"])
def test_a_sampler_that_counts_its_passes_is_resumed(
    kind: str, split: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make = factory(kind, split)
    single(tmp_path / "whole", make)
    with pytest.raises(Interrupted):
        single(tmp_path / "cut", make, Stop())
    single(tmp_path / "cut", make, resume=True)
    assert_same_tables(tmp_path / "cut", tmp_path / "whole")
    assert "cannot be resumed" not in caplog.text


def test_in_a_study_too(tmp_path: Path) -> None:
    def study(out: Path, *callbacks: Callback, resume: bool = False) -> None:
        run_study(
            factory("epochs"),
            SPACE,
            Budget(outer_steps=6),
            n_trials=2,
            out=out,
            config=CONFIG,
            device="cpu",
            callbacks=callbacks,
            resume=resume,
        )

    study(tmp_path / "whole")
    with pytest.raises(Interrupted):
        study(tmp_path / "cut", Stop())
    study(tmp_path / "cut", resume=True)
    assert_same_tables(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", ["new generators", "enclosed generator"])
def test_of_what_cannot_be_resumed_the_cause_is_said_and_the_model_is_there(
    kind: str, split: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make = factory(kind, split)
    with pytest.raises(Interrupted):
        single(tmp_path, make, Stop())
    assert caplog.text.count(f"cannot be resumed: the order of the {split} loader") == 1
    with pytest.raises(UsageError) as refused:
        single(tmp_path, make, resume=True)
    said = str(refused.value)
    assert said.startswith(f"the {split} loader gives other batches when its pass is begun again")
    assert "another problem" not in said
    folder = tmp_path / "trial-00000"
    assert f"load_best({str(folder)!r}, make_problem)" in said
    for path in (tmp_path, folder):
        caplog.clear()
        best, last = load_best(path, make, device="cpu"), load_best(path, make, at="last")
        assert best.measure("search")["error"] <= last.measure("search")["error"]
        assert ("has not come to its end" in caplog.text) == (path == tmp_path)
    with pytest.raises(UsageError, match=r"keeps no trained model: .* --resume"):
        refit(tmp_path, make)


def test_several_trials_that_have_not_come_to_their_end_are_not_chosen_from(tmp_path: Path) -> None:
    make = factory("epochs")
    with pytest.raises(Interrupted):
        single(tmp_path, make, Stop())
    (tmp_path / "trial-00001").mkdir()
    with pytest.raises(UsageError, match=r"the folder of a trial"):
        load_best(tmp_path, make)
