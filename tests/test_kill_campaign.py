"""SIGKILL at random moments, again and again: what is resumed ends in the undisturbed tables."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
from processes import finish, ift_tune, wait_for
from small_problems import comparable

from ift_tune import load_results
from ift_tune.trial.tables import Results

COMMON = (
    *("--set", "start_check=false", "--set", "inner_steps=2", "--set", "inner_lr=0.02"),
    *("--device", "cpu", "--quiet"),
)
RUN = ("run", "small_problems:make_saving", "--outer-steps", "12", *COMMON)
SEARCH = (
    *("search", "small_problems:make_saving", "--sampler", "random", "--n-trials", "4"),
    *("--outer-steps", "6", "--vary", "meta_lr=0.01:0.1", *COMMON),
)
PACKED = tuple(part.replace("make_saving", "make_steady") for part in SEARCH)
COMPARE = (
    *("compare", "small_problems:make_saving", "--arms", "ift,random,none", "--seeds", "2"),
    *("--budget", "60", "--training-steps", "10", "--outer-steps", "4", *COMMON),
)
SQLITE = ("--storage", "sqlite:///{}/study.db")
COMMANDS = {
    "run": RUN,
    "search": SEARCH,
    "search in sqlite": (*SEARCH, *SQLITE),
    "search packed": (*PACKED, "--pack", "3"),
    "search by workers": (*SEARCH, "--workers", "2"),
    "search by workers in sqlite": (*SEARCH, "--workers", "2", *SQLITE),
    "compare": COMPARE,
    "compare by workers": (*COMPARE, "--workers", "2"),
}
ROUNDS = 8
"""Kills of each kind of command: with the eight kinds, 64 in all."""
ESTIMATES = ["alpha_lambda_max", "diagnosis"]
"""Of a pack: of nearly dependent vectors, so that its other members tell in the last digits."""


class Whole(NamedTuple):
    """What an undisturbed command leaves, and how long it took from its first file on."""

    results: Results
    seconds: float


def arguments(kind: str, folder: Path) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    return [part.format(folder) for part in COMMANDS[kind]] + ["--out", str(folder / "out")]


def in_order(results: Results) -> list[pd.DataFrame]:
    """Return both tables without what no two runs have in common, whatever ended first."""
    key = ["arm", "seed", "trial", "step"]
    ordered = [comparable(t).sort_values(key, ignore_index=True) for t in results]
    return [
        t.drop(columns="run_id").reindex(columns=sorted(t.columns.drop("run_id"))) for t in ordered
    ]


def require_same(out: Path, whole: Results, *, packed: bool = False) -> None:
    """Compare what loads and what lies on the disk with the undisturbed tables.

    Those of a pack are the same but for rounding: who is left of it goes on in another one.
    """
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6} if packed else {"check_exact": True}
    loaded = load_results(out)
    parquet = Results(*(pd.read_parquet(out / f"{name}.parquet") for name in Results._fields))
    for found in (loaded, parquet):
        assert not found.steps.duplicated(["arm", "seed", "trial", "step"]).any()
        for mine, theirs in zip(in_order(found), in_order(whole), strict=True):
            if packed:
                mine, theirs = (
                    t.drop(columns=[c for c in t if str(c).endswith(tuple(ESTIMATES))])
                    for t in (mine, theirs)
                )
            pd.testing.assert_frame_equal(mine, theirs, check_dtype=False, **close)
    for name, table in zip(Results._fields, loaded, strict=True):
        csv = pd.read_csv(out / f"{name}.csv")
        assert list(csv) == list(table)
        assert csv[["trial", "train_loss"]].equals(
            table[["trial", "train_loss"]].astype(csv[["trial", "train_loss"]].dtypes)
        )


@pytest.fixture(scope="module", params=COMMANDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def whole(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    command = arguments(kind, folder)
    with ift_tune("tasks") as process:  # the server that others are forked from is started
        process.wait()
    with ift_tune(*command) as process:
        wait_for((folder / "out" / "run.json").exists, "it does not begin")
        started = time.monotonic()
        assert process.wait().status == 0
    return Whole(load_results(folder / "out"), time.monotonic() - started)


def kill_and_resume(seed: int, kind: str, whole: Whole, folder: Path) -> None:
    chance = random.Random(f"{kind} {seed}")
    command = arguments(kind, folder / "it")
    out = folder / "it" / "out"
    with ift_tune(*command) as process:
        moment = chance.uniform(0.0, whole.seconds)
        killed = process.hit(signal.SIGKILL, (out / "run.json").exists, moment)
    assert killed.status in (0, -signal.SIGKILL), killed.stderr
    deadline = time.monotonic() + 30.0  # workers see that their parent is gone, and end
    while (status := finish(*command, "--resume")) == 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert status == 0
    require_same(out, whole.results, packed="packed" in kind)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(ROUNDS))
def test_killed_at_a_random_moment_and_resumed(
    seed: int, kind: str, whole: Whole, tmp_path: Path
) -> None:
    kill_and_resume(seed, kind, whole, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["search packed"], indirect=True)
def test_a_packed_search_too(kind: str, whole: Whole, tmp_path: Path) -> None:
    kill_and_resume(ROUNDS, kind, whole, tmp_path)
