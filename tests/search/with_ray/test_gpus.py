"""Ray allots GPUs, here on paper: whole ones, parts of them, and more than there are."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import pytest
from ray import tune
from small_problems import CONFIG, make_nothing

from ift_tune import Budget, UsageError
from ift_tune.search.ray import ray_trainable, run_ray
from ift_tune.search.space import Float, MetaSpace
from with_ray.ray_problems import fit, make_met_noting

RATES = MetaSpace({"meta_lr": Float(1e-3, 0.3)})
SHORT = Budget(outer_steps=1, retrain=False)


def seen(notes: Path, gpus: float, trials: int) -> list[str]:
    """Return what each of so many trials that ran at the same time saw of the GPUs."""
    path = notes / "notes"
    path.mkdir()
    factory = functools.partial(make_met_noting, notes=path, processes=trials)
    kind = ray_trainable(factory, RATES, SHORT, config=CONFIG, device="cpu")
    started = time.monotonic()
    results = fit(
        tune.with_resources(kind, {"cpu": 0.5, "gpu": gpus}),
        notes,
        RATES.to_ray(),
        num_samples=trials,
    )
    assert time.monotonic() - started < 60.0, "the trials did not run at the same time"
    assert not results.errors
    return sorted(note.read_text() for note in path.iterdir())


@pytest.mark.nightly
def test_two_trials_at_a_time_see_a_gpu_each(tmp_path: Path) -> None:
    assert seen(tmp_path, 1, 2) == ["0", "1"]


@pytest.mark.nightly
def test_four_trials_at_a_time_share_two_gpus(tmp_path: Path) -> None:
    assert seen(tmp_path, 0.5, 4) == ["0", "0", "1", "1"]


@pytest.mark.parametrize(
    ("wants", "message"),
    [
        ({"gpus_per_trial": 3}, "at most one GPU: share.*got 3"),
        ({"gpus_per_trial": 1.5}, "at most one GPU, got 1.5"),
        ({"cpus_per_trial": 99}, r"needs 99 CPUs and 0 GPUs, and no node has them \(2 CPUs"),
        ({"cpus_per_trial": 0}, "needs a CPU or a GPU"),
    ],
)
def test_what_no_node_has_is_refused_and_not_waited_for(
    wants: dict[str, Any], message: str, tmp_path: Path
) -> None:
    started = time.monotonic()
    with pytest.raises(UsageError, match=message):
        run_ray(make_nothing, RATES, SHORT, n_trials=1, out=tmp_path / "run", resume=True, **wants)
    assert time.monotonic() - started < 5.0
    assert not list((tmp_path / "run").glob("ray-*"))
