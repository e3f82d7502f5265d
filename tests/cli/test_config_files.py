"""Configuration files: the same settings as flags, and those of a run given back."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
import typer.main
import yaml
from command_line import Call

from ift_tune import load_results
from ift_tune.cli import app
from ift_tune.trial.tables import MEASURED_COLUMNS

FACTORY = """
from ift_tune.testing.problems import Quadratic

def make_problem(config, device, seed):
    return Quadratic(weights=config.user.get("size", 4), seed=seed)
"""
SMALL = """
task: mine:make_problem
outer_steps: 3        # an underscore is as good as a dash
seed: 4
set: {inner_steps: 2, meta_lr: 1e-2, user.size: 5}
"""


@pytest.fixture(autouse=True)
def files(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a module and a configuration beside the user."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "mine.py").write_text(FACTORY)
    (tmp_path / "small.yaml").write_text(SMALL)


def settings(call: Call, *words: str) -> dict[str, Any]:
    """Return what a command would be carried out with."""
    ended = call(*words, "--dump-config")
    assert ended.status == 0, ended
    found: dict[str, Any] = yaml.safe_load(ended.out)
    return found


def refused(call: Call, text: str, *words: str, file: str = "wrong.yaml") -> str:
    """Return the one line with which a file is refused."""
    Path(file).write_text(text)
    ended = call(*(words or ("run",)), "--config", file)
    assert (ended.status, ended.out, ended.err.count("\n")) == (2, "", 1)
    said: str = ended.err
    return said


def same_tables(one: str, other: str) -> None:
    for mine, theirs in zip(load_results(one), load_results(other), strict=True):
        drop = [name for name in MEASURED_COLUMNS if name in mine]
        assert len(mine)
        pd.testing.assert_frame_equal(mine.drop(columns=drop), theirs.drop(columns=drop))
        assert mine.attrs["run"] == theirs.attrs["run"]


def test_a_file_does_what_its_flags_do(call: Call) -> None:
    flags = "run mine:make_problem --outer-steps 3 --seed 4 --set inner_steps=2 --set meta_lr=1e-2"
    assert call(*flags.split(), "--set", "user.size=5", "--quiet", "--out", "one").status == 0
    assert call("run", "--config", "small.yaml", "--quiet", "--out", "other").status == 0
    same_tables("one", "other")
    assert load_results("other").trials["user.size"].tolist() == [5]


@pytest.mark.parametrize("kind", ["json", "toml"])
def test_json_and_toml_say_the_same(call: Call, kind: str) -> None:
    if kind == "toml" and sys.version_info < (3, 11):
        pytest.skip("Python has no reader of TOML before")
    text = {
        "json": '{"task": "mine:make_problem", "outer-steps": 3, "seed": 4, '
        '"set": {"inner_steps": 2, "meta_lr": 0.01, "user.size": 5}}',
        "toml": 'task = "mine:make_problem"\nouter-steps = 3\nseed = 4\n'
        '[set]\ninner_steps = 2\nmeta_lr = 1e-2\n"user.size" = 5\n',
    }[kind]
    Path(f"same.{kind}").write_text(text)
    assert settings(call, "run", "--config", f"same.{kind}") == settings(
        call, "run", "--config", "small.yaml"
    )


def test_flags_win_pairs_one_by_one(call: Call) -> None:
    more = ["--seed", "7", "--set", "meta_lr=0.5", "--set", "terms=1", "--metric", "search_loss"]
    found = settings(call, "run", "--config", "small.yaml", *more)
    assert (found["seed"], found["outer-steps"], found["metric"]) == (7, 3, "search_loss")
    assert found["set"] == {"inner_steps": 2, "user.size": 5, "meta_lr": 0.5, "terms": 1}
    Path("lists.yaml").write_text("metric: [search_loss, hvps]\nmode: [min, max]\n")
    words = ["search", "mine:make_problem", "--config", "lists.yaml"]
    assert settings(call, *words)["metric"] == ["search_loss", "hvps"]
    assert settings(call, *words, "--metric", "hvps")["metric"] == ["hvps"]


def test_a_flag_that_a_file_sets_is_taken_back(call: Call) -> None:
    Path("quiet.yaml").write_text(SMALL + "quiet: true\nno-baseline: true\njson: true\n")
    words = ("run", "--config", "quiet.yaml")
    kept = settings(call, *words)
    assert (kept["quiet"], kept["no-baseline"], kept["json"]) == (True, True, True)
    back = settings(call, *words, "--no-quiet", "--baseline", "--no-json")
    assert (back["quiet"], back["no-baseline"], back["json"]) == (False, False, False)
    assert settings(call, *words, "--no-quiet", "--quiet")["quiet"]
    assert call("run", "--no-help").status == 2
    assert "--no-quiet" not in call("run", "--help").out


def test_one_file_is_taken_and_not_the_last_of_several(call: Call) -> None:
    for second in (("--config", "small.yaml"), ("--config=small.yaml",)):
        ended = call("run", "--config", "small.yaml", *second)
        assert (ended.status, ended.out) == (2, "")
        assert "--config takes one file" in ended.err


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("nested.yaml", "set: {user: {size: 5, depth: 2}, terms: 2}"),
        ("nested.json", '{"set": {"user.size": 5, "user": {"depth": 2}, "terms": 2}}'),
        ("nested.toml", "[set]\nuser.size = 5\nuser.depth = 2\nterms = 2"),
    ],
)
def test_names_with_dots_may_be_nested(call: Call, file: str, text: str) -> None:
    Path(file).write_text(text)
    found = settings(call, "run", "mine:make_problem", "--config", file, "--set", "user.depth=3")
    assert found["set"] == {"user.size": 5, "user.depth": 3, "terms": 2}


def test_the_environment_stands_between_flags_and_file(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("s.yaml").write_text("task: mine:make_problem\nstorage: sqlite:///file.db\n")
    words = ("search", "--config", "s.yaml")
    assert settings(call, *words)["storage"] == "sqlite:///file.db"
    monkeypatch.setenv("IFT_TUNE_STORAGE", "sqlite:///variable.db")
    assert settings(call, *words)["storage"] == "sqlite:///variable.db"
    given = settings(call, *words, "--storage", "sqlite:///flag.db")
    assert given["storage"] == "sqlite:///flag.db"


def test_plain_texts_are_what_they_look_like(call: Call) -> None:
    # By YAML 1.1 the first is 80, the second a text, the third false and the fourth 8.
    Path("ranges.yaml").write_text(
        "task: mine:make_problem\nvary: {terms: 1:20, meta_lr: .01:1:log, inner_steps: [2, 4]}\n"
        "set: {inner_lr: 1e-3, user.word: no, user.number: 010}\ntimeout: 1e3\n"
    )
    found = settings(call, "search", "--config", "ranges.yaml")
    assert found["vary"] == {"terms": "1:20", "meta_lr": ".01:1:log", "inner_steps": "2,4"}
    assert found["set"] == {"inner_lr": 0.001, "user.word": "no", "user.number": 10}
    assert found["timeout"] == 1000.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seeed: 3", "'seeed'.*wrong.yaml.*did you mean 'seed'"),
        ("n_trials: 3", "'n_trials'.*known: .*outer-steps"),
        ("config: other.yaml", "has no 'config'"),
        ("seed: '3'", "seed in wrong.yaml must be a whole number, got '3'"),
        ("seed: true", "seed in wrong.yaml must be a whole number, got True"),
        ("seed: 2.5", "seed in wrong.yaml must be a whole number, got 2.5"),
        ("budget: many", "budget in wrong.yaml must be a number, got 'many'"),
        ("budget: false", "budget in wrong.yaml must be a number, got False"),
        ("quiet: 1", "quiet in wrong.yaml must be true or false, got 1"),
        ("no-baseline: yes", "no-baseline in wrong.yaml must be true or false, got 'yes'"),
        ("out: 2024", "out in wrong.yaml must be a text in quotes, got 2024"),
        ("device: [cpu]", "device in wrong.yaml must be a text, got"),
        ("set: 5", "set in wrong.yaml must be a mapping"),
        ("set: {terms: [1, 2]}", "set in wrong.yaml must be a mapping.*in terms, got"),
        ("set: {terms: null}", "in terms, got None"),
        ("option: {1: 2}", "option in wrong.yaml must be a mapping"),
        ("seed: 1\nseed: 2", "'seed' is there twice"),
        ("set: {a: 1, a: 2}", "'a' is there twice"),
        ("outer-steps: 1\nouter_steps: 2", "outer-steps twice"),
        ("[1, 2]", "names of flags"),
        ("seed", "names of flags"),
        ("seed: [", "cannot be read"),
        ("!!python/name:os.system", "cannot be read"),
        ("a: &a 1\n<<: *b", "cannot be read"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(call: Call, text: str, said: str) -> None:
    assert re.search(said, refused(call, text)), refused(call, text)


def test_files_that_are_none(call: Call) -> None:
    assert "got 'seed' is there twice" in refused(call, '{"seed": 1, "seed": 2}', file="w.json")
    assert "cannot be read" in refused(call, "seed = ", file="w.toml")
    assert "takes a .yaml, .json or .toml" in refused(call, "seed: 1", file="w.txt")
    assert "No such file" in call("run", "--config", "absent.yaml").err
    Path("empty.yaml").write_text("# nothing\n")
    assert "Missing argument 'TASK'" in call("run", "--config", "empty.yaml").err


def test_nothing_is_the_default(call: Call) -> None:
    Path("none.yaml").write_text("task: mine:make_problem\nseed: null\nout: ~\nset: {}\n")
    assert settings(call, "run", "--config", "none.yaml") == settings(
        call, "run", "mine:make_problem"
    )


COMMANDS: dict[str, Any] = getattr(typer.main.get_command(app), "commands")  # noqa: B009
ARGUMENTS = {"audit": "runs", "refit": "runs", "certify": "runs"}
CONFIGURED = sorted(set(COMMANDS) - {"tasks", "report"})


@pytest.mark.parametrize("name", CONFIGURED)
def test_each_command_shows_all_settings_and_takes_them_back(call: Call, name: str) -> None:
    argument = [] if name in ("study-validation", "study-worth") else ["digits-weight-decay"]
    shown = call(name, *argument, "--dump-config")
    flags = {p.opts[-1].lstrip("-") for p in COMMANDS[name].params if p.expose_value}
    known = yaml.safe_load(shown.out)
    assert set(known) == flags
    assert all(f"\n{key}:" in shown.out for key in known)
    assert shown.out.count("\n# ") >= len(known)
    written = call(name, *argument, "--dump-config", "all.yaml")
    assert "--config all.yaml" in written.out
    assert Path("all.yaml").read_text() == shown.out
    assert call(name, "--config", "all.yaml", "--dump-config").out == shown.out


def test_a_file_with_everything_makes_the_same_run(call: Call) -> None:
    call("run", "--config", "small.yaml", "--quiet", "--out", "one")
    call("run", "--config", "small.yaml", "--dump-config=all.yaml")
    assert call("run", "--config", "all.yaml", "--quiet", "--out", "other").status == 0
    for mine, theirs in zip(load_results("one"), load_results("other"), strict=True):
        drop = list(MEASURED_COLUMNS)
        pd.testing.assert_frame_equal(mine.drop(columns=drop), theirs.drop(columns=drop))


def test_what_is_shown_runs_nothing_and_says_what_the_task_has(call: Call) -> None:
    before = sorted(Path().iterdir())
    out = call("run", "digits-cleaning", "--set", "terms=3", "--dump-config").out
    assert sorted(Path().iterdir()) == before
    assert "#  inner_lr: " in out
    assert "#  terms" not in out
    assert "#  outer-steps: " in out
    assert (
        "#  outer-steps" not in call("run", "digits-cleaning", "--seconds=2", "--dump-config").out
    )
    assert "did you mean 'digits-cleaning'" in call("run", "digits-cleanin", "--dump-config").err


def test_a_dump_overwrites_nothing_and_is_yaml(call: Call) -> None:
    assert call("run", "digits-cleaning", "--dump-config", "small.yaml").status == 2
    assert Path("small.yaml").read_text() == SMALL
    assert "writes YAML" in call("run", "digits-cleaning", "--dump-config", "x.toml").err


# Optuna 4 has none of any sampler.
CONSTRAINT = "" if optuna.__version__.startswith("4.") else "--constraint gradient_equivalents<=1e3"


@pytest.mark.parametrize(
    "line",
    [
        "run mine:make_problem --set inner_steps=2 --budget 30 --no-baseline --patience 3",
        "run digits-cleaning --embedded --option corrupted=0.25 --outer-steps 1 --device cpu",
        "search mine:make_problem --n-trials 3 --vary terms=0:4 --vary meta_lr=.01:1:log "
        f"--sampler random --outer-steps 2 --pruner median {CONSTRAINT}",
        "compare mine:make_problem --arms ift,random --seeds 1 --training-steps 4 --budget 40 "
        "--first-seed 2",
    ],
    ids=["run", "embedded", "search", "compare"],
)
def test_a_run_is_given_back(call: Call, line: str) -> None:
    words = line.split()
    assert call(*words, "--quiet", "--out", "first").status == 0
    shutil.copy("first/run.json", "elsewhere.json")
    assert call(words[0], "--config", "elsewhere.json", "--quiet", "--out", "again").status == 0
    same_tables("first", "again")


def test_a_run_goes_on_by_its_own_file(call: Call) -> None:
    words = "search mine:make_problem --outer-steps 1 --sampler random --storage sqlite:///s.db"
    assert call(*words.split(), "--n-trials", "2", "--quiet", "--out", "runs").status == 0
    shutil.copy("runs/run.json", "copy.json")
    back = ["search", "--config", "copy.json", "--quiet"]
    anew = call(*back, "--out", "new")
    assert "in sqlite:///s.db and stays as it is" in anew.err
    assert len(load_results("new").trials) == 2
    assert call(*back, "--out", "runs", "--resume", "--n-trials", "3").err == ""
    assert len(load_results("runs").trials) == 3
    noted = json.loads(Path("runs/run.json").read_text())["command"]["search"]
    assert (noted["n-trials"], noted["storage"]) == (3, "sqlite:///s.db")
    assert not {"out", "resume", "quiet"} & set(noted)


def test_the_run_json_of_another_command_or_of_python_is_refused(call: Call) -> None:
    call("run", "--config", "small.yaml", "--quiet", "--out", "one")
    assert "ift-tune run: give it to that" in call("search", "--config", "one/run.json").err
    noted = json.loads(Path("one/run.json").read_text())
    changed = noted | {"command": {"run": {"task": "mine:other"}}}
    assert "changed after the run wrote it" in refused(
        call, json.dumps(changed), "run", file="changed.json"
    )


def test_a_factory_is_found_by_the_name_that_the_command_had(call: Call) -> None:
    """What a function returns has no name of its own; that of the command is noted."""
    Path("made.py").write_text(
        FACTORY.replace("make_problem(", "plain(")
        + "\ndef sized(size):\n    def factory(config, device, seed):\n"
        "        return Quadratic(weights=size, seed=seed)\n    return factory\n\n"
        "three = sized(3)\n"
    )
    assert call("run", "made:three", "--outer-steps", "2", "--out", "three").status == 0
    ended = call("refit", "three", "--json")
    assert ended.status == 0, ended.err


def test_no_file_has_a_password(call: Call) -> None:
    url = "postgresql://me:secret%2Fword@host/db"
    words = ["search", "mine:make_problem", "--storage", url]
    call(*words, "--dump-config", "shown.yaml")
    assert "secret" not in Path("shown.yaml").read_text()
    ended = call("search", "--config", "shown.yaml", "--out", "x")
    assert (ended.status, ended.err.count("\n"), Path("x").exists()) == (2, 1, False)
    assert "no file has the password" in ended.err
    assert "--storage" in ended.err
    again = call("search", "--config", "shown.yaml", "--storage", url, "--dump-config")
    assert (again.status, "secret" in again.out) == (0, False)
