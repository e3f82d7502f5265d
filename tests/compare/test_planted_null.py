"""An arm against itself is seldom called better, and a difference that is there is found."""

from __future__ import annotations

import random
from pathlib import Path

import optuna
import pandas as pd
import pytest
from tiny_comparisons import CONFIG, comparison, run

from ift_tune.compare import pairwise as anytime
from ift_tune.compare.findings import Findings, find
from ift_tune.compare.verdict import judge
from ift_tune.search import loop
from ift_tune.trial.tables import Results, RunDirectory

REPETITIONS, PAIRS = 20, 6
SEEDS = 80  # from which each repetition draws its two sides
STEP = 1.0 + 10.0 / 3.0 / 12.0  # of the problem in full batches


@pytest.fixture(scope="module")
def searches(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Random searches of a short training each."""
    whole = comparison(STEP * 2.0, batches="full", training_steps=2)
    storages: dict[Path, optuna.storages.InMemoryStorage] = {}

    def in_memory(_: object, directory: Path) -> optuna.storages.BaseStorage:
        return storages.setdefault(directory, optuna.storages.InMemoryStorage())

    out = tmp_path_factory.mktemp("null") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "open_storage", in_memory)
        # Without the task's defaults as the first point, so that the one trial is a random one.
        patch.setattr(optuna.Study, "enqueue_trial", lambda *_, **__: None)
        patch.setattr(RunDirectory, "refresh_tables", lambda _: None)  # they come at the end
        return run(whole, out, "random", seeds=SEEDS)


def against(results: Results, left: list[int], right: list[int]) -> Findings:
    """Return the findings of a comparison of the seeds on the left, as IFT, with the others."""
    names = {seed: ("ift", i) for i, seed in enumerate(left)}
    names |= {seed: ("random", i) for i, seed in enumerate(right)}
    parts = []
    for table in results:
        part = table[table["seed"].isin(list(names))].copy()
        part["arm"] = [names[seed][0] for seed in part["seed"]]
        part["seed"] = [names[seed][1] for seed in part["seed"]]
        extent = {"arms": ["ift", "random"], "seeds": list(range(len(left)))}
        part.attrs = {"run": table.attrs["run"] | {"extent": extent}}
        parts.append(part)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anytime, "POINTS", 2)  # the curves are of no interest here
        return find(Results(*parts))


@pytest.mark.nightly
def test_an_arm_against_itself_is_significant_at_most_twice_in_twenty(searches: Results) -> None:
    trials = searches.trials
    assert (trials.groupby("seed")["best_value"].count() == 1).all()
    assert trials["knob.decay"].nunique() == SEEDS  # they were searches
    verdicts, generator = [], random.Random(0)
    for _ in range(REPETITIONS):
        drawn = generator.sample(range(SEEDS), 2 * PAIRS)
        findings = against(searches, drawn[:PAIRS], drawn[PAIRS:])
        (found,) = findings.against
        assert found.test.pairs == PAIRS
        verdicts.append(found.conclusion)
        shown = "is not shown" not in judge(findings).headline
        assert shown == bool(verdicts[-1])
        assert not any("Too few" in note for note in judge(findings).notes)
    assert sum(verdict != 0 for verdict in verdicts) <= 2
    assert pd.Series(verdicts).abs().max() <= 1


def test_the_same_searches_on_both_sides_show_no_difference(searches: Results) -> None:
    left = list(range(PAIRS))
    twice = Results(*(pd.concat([t, t.assign(seed=t["seed"] + 10_000)]) for t in searches))
    for table, old in zip(twice, searches, strict=True):
        table.attrs = dict(old.attrs)
    findings = against(twice, left, [10_000 + seed for seed in left])
    (found,) = findings.against
    assert (found.test.p, found.test.effect, found.conclusion) == (1.0, 0.0, 0)
    assert found.reach.ratio == 1.0


def test_a_difference_that_is_there_is_found(tmp_path: Path) -> None:
    sides: dict[str, Results] = {}
    for side, lr in (("good", 0.1), ("bad", 1e-6)):  # the latter trains nothing
        config = CONFIG.updated({"inner_lr": lr})
        whole = comparison(STEP * 10.0, batches="full", training_steps=10, config=config)
        sides[side] = run(whole, tmp_path / side, "none", seeds=8)
    both = []
    for good, bad in zip(sides["good"], sides["bad"], strict=True):
        table: pd.DataFrame = pd.concat([good, bad.assign(seed=bad["seed"] + 100)])
        table.attrs = dict(good.attrs)
        both.append(table)
    good_seeds, bad_seeds = list(range(8)), list(range(100, 108))
    for left, right, conclusion, start in (
        (good_seeds, bad_seeds, 1, "IFT is ahead"),
        (bad_seeds, good_seeds, -1, "IFT is not worth it"),
    ):
        findings = against(Results(*both), left, right)
        assert [a.conclusion for a in findings.against] == [conclusion]
        assert judge(findings).headline.startswith(start)
