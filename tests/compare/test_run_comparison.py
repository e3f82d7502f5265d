"""Comparisons from end to end: the same tables each time, extended, interrupted, refused."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from tiny_comparisons import (
    CONFIG,
    Killed,
    Killer,
    assert_same_tables,
    comparable,
    comparison,
    make_clouds,
    of_cell,
    run,
)

from ift_tune import Budget, MetaConfig, UsageError, load_results
from ift_tune.base.errors import RunExistsError
from ift_tune.compare.cell import Cell
from ift_tune.compare.comparison import Comparison
from ift_tune.joint.callbacks import Callback
from ift_tune.trial.tables import Results

LIMIT = 36.0
ARMS = ("ift", "random", "none")
WHOLE = comparison(LIMIT)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three arms, two seeds, one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    run(WHOLE, out, *ARMS, seeds=2)
    return out


def rows_of(table: pd.DataFrame) -> set[tuple[str, int]]:
    return set(zip(table["arm"], table["seed"].astype(int), strict=True))


def test_the_same_tables_twice(alone: Path, tmp_path: Path) -> None:
    results = run(WHOLE, tmp_path / "run", *ARMS, seeds=2)
    assert_same_tables(results, alone)
    assert rows_of(results.trials) == {(arm, seed) for arm in ARMS for seed in (0, 1)}
    assert results.trials["run_id"].nunique() == 1
    assert set(results.trials["task"]) == {"clouds"}


def test_two_processes_write_the_tables_of_one(alone: Path, tmp_path: Path) -> None:
    ended: list[tuple[str, int, int]] = []
    results = run(
        WHOLE,
        tmp_path / "run",
        *ARMS,
        seeds=2,
        workers=2,
        on_done=lambda cell, n, of: ended.append((cell.name, n, of)),
    )
    assert_same_tables(results, alone)
    assert sorted(name for name, _, _ in ended) == sorted(
        f"{arm} with seed {seed}" for arm in ARMS for seed in (0, 1)
    )
    assert [(n, of) for _, n, of in ended] == [(n, 6) for n in range(1, 7)]


def test_it_is_extended_by_seeds_and_arms(alone: Path, tmp_path: Path) -> None:
    out, heard = tmp_path / "run", Heard()
    begun = run(WHOLE, out, "ift")
    run(WHOLE, out, "ift", "random", resume=True, callbacks=[heard])
    assert heard.trials > 0
    on_done: list[tuple[str, int, int]] = []
    results = run(
        WHOLE,
        out,
        *ARMS,
        seeds=2,
        resume=True,
        on_done=lambda cell, n, of: on_done.append((cell.name, n, of)),
    )
    assert [(n, of) for _, n, of in on_done] == [(n, 6) for n in range(3, 7)]
    assert_same_tables(results, alone)
    assert of_cell(results.trials, "ift")["wall_seconds"].item() == pytest.approx(
        begun.trials["wall_seconds"].item(), abs=0.0
    )
    extent = results.trials.attrs["run"]["extent"]
    assert set(extent["arms"]) == set(ARMS)
    assert extent["seeds"] == [0, 1]


class Heard(Callback):
    """Counts."""

    trials = 0

    def on_trial_begin(self, number: int, config: MetaConfig, first_step: int) -> None:
        self.trials += 1


def test_a_finished_comparison_is_not_run_again(alone: Path) -> None:
    heard, before = Heard(), load_results(alone)
    after = run(WHOLE, alone, *ARMS, seeds=2, resume=True, callbacks=[heard])
    assert heard.trials == 0
    for one, other in zip(before, after, strict=True):
        pd.testing.assert_frame_equal(one, other, check_exact=True)
    fewer = run(WHOLE, alone, "none", resume=True)
    assert len(fewer.trials) == len(before.trials)


def test_seeds_begin_where_they_are_told_to(alone: Path, tmp_path: Path) -> None:
    results = run(WHOLE, tmp_path / "run", "none", first_seed=1)
    assert rows_of(results.trials) == {("none", 1)}
    there = of_cell(load_results(alone).trials, "none", 1)
    same = [c for c in comparable(results.trials).columns if c in there and c != "run_id"]
    pd.testing.assert_frame_equal(
        results.trials[same], there[same].reset_index(drop=True), check_dtype=False
    )


def test_the_tables_on_disk_are_those_returned(alone: Path) -> None:
    loaded = load_results(alone)
    for name in Results._fields:
        disk = pd.read_parquet(alone / f"{name}.parquet")
        numbers = disk.select_dtypes("number").columns
        assert list(disk.columns) == list(getattr(loaded, name).columns)
        pd.testing.assert_frame_equal(
            disk[numbers], getattr(loaded, name)[numbers], check_dtype=False, check_exact=True
        )
        assert disk.attrs["run"]["backend"] == "compare"
        assert disk.attrs["environment"]
        assert len(pd.read_csv(alone / f"{name}.csv")) == len(disk)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        (comparison(LIMIT + 1.0), "budget"),
        (comparison(budget=Budget(seconds=1.0)), "budget"),
        (replace(WHOLE, training_steps=7), "training_steps"),
        (replace(WHOLE, config=CONFIG.updated({"inner_lr": 0.2})), "config"),
        (replace(WHOLE, metric="search_error"), "metric"),
        (replace(WHOLE, trial_budget=Budget(outer_steps=5)), "trial_budget"),
        (replace(WHOLE, task="other"), "task"),
    ],
)
def test_it_is_resumed_with_the_same_settings_only(
    alone: Path, changed: Comparison, name: str
) -> None:
    with pytest.raises(UsageError, match=f"was begun with another {name}; resume with the same"):
        run(changed, alone, *ARMS, resume=True)


def test_a_directory_that_holds_something_is_refused(alone: Path, tmp_path: Path) -> None:
    with pytest.raises(RunExistsError, match="already holds files"):
        run(WHOLE, alone, *ARMS)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunExistsError, match="already holds files"):
        run(WHOLE, tmp_path, *ARMS)


def test_mistakes_show_before_anything_is_written(tmp_path: Path) -> None:
    for settings in ({"seeds": 0}, {"workers": 0}):
        with pytest.raises(UsageError, match="at least 1"):
            run(WHOLE, tmp_path / "run", "none", **settings)
    with pytest.raises(UsageError, match="there is no arm"):
        run(WHOLE, tmp_path / "run", "nothing")
    with pytest.raises(UsageError, match="in gradient_equivalents or in seconds"):
        comparison(budget=Budget(outer_steps=3))
    with pytest.raises(UsageError, match="in gradient_equivalents or in seconds"):
        comparison(budget=Budget(gradient_equivalents=1.0, seconds=3.0))
    with pytest.raises(UsageError, match="training_steps"):
        comparison(training_steps=0)
    assert not (tmp_path / "run").exists()


def test_a_budget_in_seconds(tmp_path: Path) -> None:
    whole = comparison(budget=Budget(seconds=0.05))
    results = run(whole, tmp_path / "run", "ift", "random", "none")
    assert rows_of(results.trials) == {("ift", 0), ("random", 0), ("none", 0)}
    assert (of_cell(results.trials, "random")["wall_seconds"].sum()) >= 0.05
    resumed = run(whole, tmp_path / "run", "ift", "random", "none", resume=True)
    pd.testing.assert_frame_equal(results.trials, resumed.trials, check_exact=True)


# Processes that end in the middle: nothing of theirs runs after that moment.

# With a part of the arms each, so that all kinds of searches are hit in all kinds of moments.
MOMENTS = [("started", 1), ("step", 2), ("ended", 1), ("started", 3), ("step", 9), ("ended", 3)]
HIT = ("ift", "ift+tpe", "grid", "cmaes")
DAILY = ("ift", "cmaes")


@pytest.fixture(
    scope="module",
    params=[h if h in DAILY else pytest.param(h, marks=pytest.mark.nightly) for h in HIT],
)
def undisturbed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Results]:
    arm: str = request.param
    return arm, run(WHOLE, tmp_path_factory.mktemp("undisturbed") / "run", arm)


def test_killed_at_any_moment_it_ends_with_the_undisturbed_tables(
    undisturbed: tuple[str, Results], tmp_path: Path
) -> None:
    arm, expected = undisturbed
    out, hits = tmp_path / "run", 0
    # One directory is hit again and again: at each event once, until nothing is left to hit.
    for event, number in MOMENTS:
        try:
            run(WHOLE, out, arm, resume=True, callbacks=[Killer(event, number)])
        except Killed:
            hits += 1
    assert hits >= (1 if arm == "ift" else 2)
    assert_same_tables(run(WHOLE, out, arm, resume=True), expected)


@pytest.fixture(scope="module")
def halving(tmp_path_factory: pytest.TempPathFactory) -> Results:
    results = run(WHOLE, tmp_path_factory.mktemp("halving") / "run", "asha")
    assert results.trials["stop_reason"][1] == results.trials["stop_reason"][3] == "pruned"
    return results


@pytest.mark.parametrize("number", [2, 4])
def test_a_trial_that_was_pruned_stays_pruned(
    number: int, halving: Results, tmp_path: Path
) -> None:
    """Between the pruner's decision and the study's hearing of it, the process is killed."""
    out = tmp_path / "run"
    with pytest.raises(Killed):
        run(WHOLE, out, "asha", callbacks=[Killer("ended", number)])
    assert_same_tables(run(WHOLE, out, "asha", resume=True), halving)


def test_a_search_is_killed_between_claiming_and_beginning(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:

        def die(*_: object, **__: object) -> None:
            raise Killed

        patch.setattr(Cell, "loop", die)
        with pytest.raises(Killed):
            run(WHOLE, tmp_path / "run", "none")
    expected = run(WHOLE, tmp_path / "expected", "none")
    assert_same_tables(run(WHOLE, tmp_path / "run", "none", resume=True), expected)


def test_a_partial_is_told_by_its_arguments() -> None:
    settings = comparison(problem_factory=functools.partial(make_clouds, batches="full")).settings()
    others = comparison().settings()
    assert settings.pop("factory") == "tiny_comparisons:make_clouds(batches='full')"
    assert others.pop("factory") == "tiny_comparisons:make_clouds(batches='mini')"
    assert settings == others
    assert settings["backend"] == "compare"
