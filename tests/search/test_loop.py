"""One trial too many, begun by two machines at the same moment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from small_problems import BUDGET, CONFIG, SPACE, make_nothing, make_tiny

from ift_tune.search.loop import StudyLoop, StudyPlan
from ift_tune.search.plan import SearchPlan
from ift_tune.search.samplers import sampler_factory
from ift_tune.search.work import Worker
from ift_tune.trial.plan import TrialPlan
from ift_tune.trial.tables import load_results
from ift_tune.trial.trial import ProblemFactory


class Race:
    """A study of which another machine begins trials just before this one does."""

    def __init__(
        self,
        out: Path,
        factory: ProblemFactory,
        *,
        failed: int,
        others: int,
        n_trials: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        storage = optuna.storages.InMemoryStorage()
        self.plan = StudyPlan(
            SearchPlan(TrialPlan(factory, BUDGET, CONFIG, device="cpu"), SPACE),
            0,
            out,
            {"run_id": "tiny-0", "task": "tiny", "arm": "mine"},
            storage,
            "shared",
            sampler_factory("random"),
            optuna.pruners.NopPruner(),
            n_trials,
        )
        self.study = self.plan.open(join=True)
        for _ in range(failed):
            self.study.tell(self.study.ask(), state=TrialState.FAIL)
        ask = self.study.new_trial

        def ask_too_late(marks: Mapping[str, Any]) -> optuna.Trial:
            theirs = optuna.load_study(study_name="shared", storage=storage)
            for _ in range(others):
                theirs.ask()
            return ask(marks)

        monkeypatch.setattr(self.study, "new_trial", ask_too_late)

    def run(self) -> list[int]:
        """Run this machine's loop, and return the trials that were told."""
        on_done: list[int] = []
        loop = StudyLoop(self.plan, self.study, Worker("me"), on_done=on_done.append)
        loop.run()
        return on_done


@pytest.mark.parametrize("failed", [0, 2])
def test_the_trial_too_many_fails_as_a_surplus_and_is_never_run(
    failed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    race = Race(
        tmp_path, make_nothing, failed=failed, others=2, n_trials=2, monkeypatch=monkeypatch
    )
    assert race.run() == []
    trials = race.study.trials
    others = [TrialState.RUNNING] * 2
    assert [t.state for t in trials] == [*[TrialState.FAIL] * failed, *others, TrialState.FAIL]
    assert trials[-1].user_attrs["surplus"]
    assert not any("surplus" in t.user_attrs for t in trials[:-1])
    assert trials[-1].params == {}
    assert list(tmp_path.glob("trial-*")) == []


def test_failed_trials_before_it_make_no_trial_a_surplus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    race = Race(tmp_path, make_tiny, failed=2, others=1, n_trials=2, monkeypatch=monkeypatch)
    assert race.run() == [3]
    states = [t.state for t in race.study.trials]
    assert states == [TrialState.FAIL] * 2 + [TrialState.RUNNING, TrialState.COMPLETE]
    assert "surplus" not in race.study.trials[3].user_attrs
    assert list(load_results(tmp_path).trials["trial"]) == [3]
