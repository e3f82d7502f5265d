"""Reading makes nothing, and what is refused leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ift_tune import Budget, Float, MetaConfig, MetaSpace, UsageError, load_results, run_study
from ift_tune.report import draw_pictures
from ift_tune.testing import Quadratic
from ift_tune.trial.session import run_single
from ift_tune.trial.tables import load_views

SPACE = MetaSpace({"meta_lr": Float(1e-3, 0.1)})


def make(config: MetaConfig, device: torch.device, seed: int) -> Quadratic:
    return Quadratic(seed=seed)


def refuse(config: MetaConfig, device: torch.device, seed: int) -> Quadratic:
    raise UsageError("this problem cannot be built")


@pytest.mark.parametrize("read", [load_results, load_views, draw_pictures])
def test_a_mistyped_directory_is_not_made(read: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run"):
        read(tmp_path / "typo")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ["run", "deep/down/run"])
def test_a_refused_run_leaves_nothing_and_the_corrected_one_is_accepted(
    folder: str, tmp_path: Path
) -> None:
    out = tmp_path / folder
    with pytest.raises(UsageError, match="cannot be built"):
        run_single(refuse, Budget(outer_steps=1), out=out, device="cpu")
    with pytest.raises(UsageError, match="not measured"):
        run_single(make, Budget(outer_steps=1), out=out, device="cpu", metric="search_typo")
    assert list(tmp_path.iterdir()) == []
    assert run_single(make, Budget(outer_steps=1), out=out, device="cpu").value is not None


def test_a_refused_study_leaves_nothing_and_the_corrected_one_is_accepted(tmp_path: Path) -> None:
    out = tmp_path / "study"

    def study(factory: Any, n_trials: int) -> int:
        result = run_study(
            factory, SPACE, Budget(outer_steps=1), n_trials=n_trials, out=out, device="cpu"
        )
        return len(result.trials)

    for factory, n_trials in ((make, 0), (refuse, 1)):
        with pytest.raises(UsageError):
            study(factory, n_trials)
    assert list(tmp_path.iterdir()) == []
    assert study(make, 1) == 1
