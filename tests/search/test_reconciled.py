"""A study and the folders of its trials that do not belong together any more: said, not mixed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from small_problems import BUDGET, CONFIG, SPACE, assert_same_tables, make_tiny

from ift_tune import Callback, UsageError, load_best, load_results, run_study
from ift_tune.base.status import Outcome
from ift_tune.search.work import open_storage
from ift_tune.trial.session import run_single
from ift_tune.trial.tables import load_views


def study(out: Path, n_trials: int = 2, **options: Any) -> optuna.Study:
    return run_study(
        *(make_tiny, SPACE, BUDGET),
        n_trials=n_trials,
        out=out,
        config=CONFIG,
        device="cpu",
        sampler="random",
        **options,
    ).study


def other_token(out: Path) -> None:
    (out / "token").write_text("0" * 32)


def no_token(out: Path) -> None:
    (out / "token").write_bytes(b"\0" * 32)


def lost_trial(out: Path) -> None:
    shutil.rmtree(out / "trial-00001")


def lost_study(out: Path) -> None:
    (out / "study.journal").write_bytes(b"")


def older_facts(out: Path) -> None:
    file = out / "trial-00000" / "trial.json"
    facts = json.loads(file.read_text())
    del facts["digest"], facts["rows"]
    file.write_text(json.dumps({**facts, "status": "running", "stop_reason": None}))


def other_value(out: Path) -> None:
    lines = [json.loads(line) for line in (out / "study.journal").read_text().splitlines()]
    for line in lines:
        line.pop("digest", None)
        if line.get("values"):
            line["values"] = [0.0]
    (out / "study.journal").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (other_token, r"is not of the directory with .*token"),
        (no_token, r"token is damaged: put a copy"),
        (lost_trial, r"its folder has no trial\.json"),
        (lost_study, r"the study has no such trial"),
        (older_facts, r"running in trial\.json"),
        (other_value, r"best_value is 0\.0 in the study"),
    ],
)
def test_what_does_not_belong_together_is_refused_before_a_trial_begins(
    harm: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    study(tmp_path / "run")
    harm(tmp_path / "run")
    with pytest.raises(UsageError, match=words):
        study(tmp_path / "run", 3, resume=True)
    assert not (tmp_path / "run" / "trial-00002").exists()


def test_runs_that_share_a_storage_know_their_own_trials(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    shared = {"storage": storage, "study_name": "shared"}
    study(tmp_path / "one", 1, **shared)
    study(tmp_path / "two", 2, **shared)
    again = study(tmp_path / "one", 3, resume=True, **shared)
    assert len(again.trials) == 3
    assert load_results(tmp_path / "one").trials["trial"].tolist() == [0, 2]


def test_each_line_of_a_journal_is_known_by_what_it_is(tmp_path: Path) -> None:
    study(tmp_path / "run", 1)
    journal = tmp_path / "run" / "study.journal"
    whole = journal.read_text()
    journal.write_text(whole.replace('"param_value_internal":0', '"param_value_internal":1', 1))
    assert journal.read_text() != whole
    with pytest.raises(UsageError, match=r"study\.journal is damaged: .* another digest in line"):
        open_storage(None, tmp_path / "run")
    stripped = [json.loads(line) for line in whole.splitlines()]
    for line in stripped:
        del line["digest"]
    journal.write_text("".join(json.dumps(line) + "\n" for line in stripped))  # Optuna's own
    study(tmp_path / "run", 2, resume=True)
    study(tmp_path / "whole", 2)
    assert_same_tables(tmp_path / "run", tmp_path / "whole")


def test_a_last_line_that_is_no_json_is_not_passed_over(tmp_path: Path) -> None:
    study(tmp_path / "run", 1)
    with (tmp_path / "run" / "study.journal").open("ab") as file:
        file.write(b"\0\0\0\n")
    with pytest.raises(UsageError, match=r"study\.journal is damaged"):
        study(tmp_path / "run", 2, resume=True)


@pytest.mark.parametrize("asked", [True, False], ids=["after it was asked for", "before"])
def test_a_trial_asked_for_in_a_shared_storage_is_this_runs_from_its_beginning(
    asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill there would leave one that nobody takes up, and that counts as running for ever."""
    ask = optuna.Study.ask

    def kill(self: optuna.Study) -> optuna.Trial:
        if asked:
            ask(self)
        raise KeyboardInterrupt

    storage = f"sqlite:///{tmp_path / 'study.db'}"
    study(tmp_path / "run", 1, storage=storage)
    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "ask", kill)
        with pytest.raises(KeyboardInterrupt):
            study(tmp_path / "run", 2, storage=storage, resume=True)
    again = study(tmp_path / "run", 2, storage=storage, resume=True)
    assert [t.state.name for t in again.trials] == ["COMPLETE", "COMPLETE"]
    study(tmp_path / "whole", 2)
    assert_same_tables(tmp_path / "run", tmp_path / "whole")


class Hasty(Callback):
    """Is mistaken at the end of a trial."""

    def on_trial_end(self, number: int, outcome: Outcome) -> None:
        raise RuntimeError("a mistake in a callback")


def test_tables_and_study_agree_on_a_trial_whose_callback_raised(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="mistake in a callback"):
        study(tmp_path / "run", callbacks=[Hasty()])
    assert load_results(tmp_path / "run").trials["status"].tolist() == ["failed"]
    kept = optuna.load_study(study_name=None, storage=open_storage(None, tmp_path / "run"))
    assert [t.state.name for t in kept.trials] == ["RUNNING"]  # to be tried again
    study(tmp_path / "run", 2, resume=True)
    study(tmp_path / "whole", 2)
    assert_same_tables(tmp_path / "run", tmp_path / "whole")


def test_pictures_that_cannot_be_drawn_cost_a_trial_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def views(self: object) -> list[Any]:
        raise ZeroDivisionError("no picture")

    monkeypatch.setattr("ift_tune.hyper.WeightDecay.views", views)
    run_single(make_tiny, BUDGET, out=tmp_path, config=CONFIG, device="cpu")
    assert "no pictures of λ: its views() failed: ZeroDivisionError('no picture')" in caplog.text
    assert load_results(tmp_path).trials["status"].tolist() == ["complete"]
    load_best(tmp_path, make_tiny, device="cpu")
    assert load_views(tmp_path) == {}
