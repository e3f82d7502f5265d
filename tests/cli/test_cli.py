"""The command line: what it prints, what it writes, and with which status it ends."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

import optuna
import pytest
from command_line import Call

import ift_tune
from ift_tune import UsageError, cli, load_results, tasks
from ift_tune.compare.arms import ARMS
from ift_tune.search.pruners import PRUNERS
from ift_tune.search.samplers import SAMPLERS
from ift_tune.trial.tables import Results

MODULE = '''
import math

from torch import nn

from ift_tune import BilevelProblem, Splits
from ift_tune.hyper import WeightDecay
from ift_tune.hyper.decays import DecayPenalty
from ift_tune.testing.problems import Quadratic


def good(config, device, seed):
    return Quadratic(seed=seed)


class NotANumber(Quadratic):
    def train_loss(self, batch):
        return super().train_loss(batch) * math.nan


def not_a_number(config, device, seed):
    return NotANumber(seed=seed)


class Scored(Quadratic):
    def metrics(self, batch):
        return {"score": -super().metrics(batch)["loss"]}


def scored(config, device, seed):
    return Scored(seed=seed)


def broken(config, device, seed):
    raise RuntimeError("a mistake in the user's problem")


class WrongPenalty(DecayPenalty):
    """Its mixed product is twice the true one, so its hypergradient is wrong."""

    def mixed(self, weights, vector):
        return [2.0 * product for product in super().mixed(weights, vector)]


class Regression(BilevelProblem):
    def __init__(self, seed):
        inner = Quadratic(seed=seed)
        self.goal, self.model = inner.goal, inner.model
        self.hyper = WeightDecay(self.model, "weight", init=0.5)
        self.splits = inner.splits

    def train_loss(self, batch):
        return 0.5 * (self.model() - self.goal).square().sum()

    def val_loss(self, batch):
        return 0.5 * (self.model() - 0.5 * self.goal).square().sum()

    def penalty(self):
        return WrongPenalty(self.hyper)


def wrong(config, device, seed):
    return Regression(seed)
'''


@pytest.fixture(autouse=True)
def _module_of_mine(tmp_path: Path) -> None:
    """Put a module of problems where the calls are made."""
    (tmp_path / "problems_of_mine.py").write_text(MODULE)


DIGITS = ("digits-weight-decay", "--device", "cpu")
MINE = ("problems_of_mine:good", "--device", "cpu", "--outer-steps", "2")


def test_tasks_are_listed(call: Call) -> None:
    ended = call("tasks")
    assert ended.status == 0
    for name, task in tasks.TASKS.items():
        assert name in ended.out
        assert f"{task.sizes.hypers:,}" in ended.out
        assert task.target.metric in ended.out


def test_tasks_as_json(call: Call) -> None:
    ended = call("tasks", "--json")
    listed = json.loads(ended.out)
    assert [t["name"] for t in listed] == list(tasks.TASKS)
    first = tasks.TASKS[listed[0]["name"]]
    assert listed[0]["default_config"] == first.default_config.to_flat()
    assert listed[0]["hypers"] == first.sizes.hypers


def test_run_prints_progress_result_and_where_the_tables_are(call: Call) -> None:
    ended = call("run", *DIGITS, "--outer-steps", "2", "--out", "mine", "--set", "terms=1")
    assert ended.status == 0
    assert ended.err.count("outer step") == 3  # two steps, and the end
    assert "retrained from scratch" in ended.out
    target = tasks.TASKS["digits-weight-decay"].target
    assert f"target {target.metric} <= {target.value:g}: not reached" in ended.out
    steps = load_results("mine").steps
    assert list(steps["step"]) == [1, 2]
    assert set(steps["terms"]) == {1}
    assert {"curves.png", "trials.parquet", "steps.csv"} <= {p.name for p in Path("mine").iterdir()}


def test_run_as_json_prints_json_alone(call: Call) -> None:
    ended = call("run", *MINE, "--json")
    found = json.loads(ended.out)
    assert (ended.status, ended.err) == (0, "")
    assert found["stop_reason"] == "done"
    assert found["step"] == 2
    again = json.loads(call("run", *MINE, "--json", "--resume").out)
    assert {k: again.get(k) for k in found} == found


def test_the_default_directory_is_named_after_task_and_seed(call: Call, tmp_path: Path) -> None:
    assert call("run", *MINE, "--seed", "3", "--quiet") == (0, "", "")
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["problems_of_mine.good-seed3"]


def test_run_takes_a_counted_budget(call: Call) -> None:
    task = ("problems_of_mine:good", "--device", "cpu")
    short = ("--set", "inner_steps=4", "--set", "terms=1", "--set", "alpha=0.5")
    ended = call("run", *task, *short, "--budget", "70", "--quiet", "--out", "o")
    assert ended == (0, "", "")
    steps = load_results("o").steps
    assert len(steps) > 1
    assert steps["gradient_equivalents"].iloc[-1] <= 70.0


def test_search_varies_what_it_is_told(call: Call) -> None:
    ended = call(
        "search",
        *MINE,
        *("--n-trials", "3", "--vary", "alpha=0.01:1:log", "--vary", "inner_steps=2,3"),
        *("--sampler", "random", "--out", "found"),
    )
    assert ended.status == 0
    assert "best: trial" in ended.out
    assert "best meta-hyperparameters: alpha=" in ended.out
    trials = load_results("found").trials
    assert list(trials["status"]) == ["complete"] * 3
    assert set(trials["inner_steps"]) <= {2, 3}
    assert trials["alpha"].between(0.01, 1.0).all()
    assert trials["alpha"].nunique() == 3
    assert trials["meta_lr"].nunique() == 1
    for number in range(3):
        assert f"trial {number} done after 2 outer steps" in ended.err


def test_search_over_a_grid_ends_with_it(call: Call) -> None:
    varied = ("--vary", "terms=0,1", "--vary", "inner_steps=2,3")
    ended = call("search", *MINE, *varied, "--sampler", "grid", "--out", "grid")
    assert ended.status == 0
    assert "4 of 20 trials are finished\n" in ended.out
    trials = load_results("grid").trials
    assert len({*zip(trials["terms"], trials["inner_steps"], strict=True)}) == 4
    assert set(trials["arm"]) == {"ift+grid"}


def test_the_help_of_search_names_samplers_and_pruners(call: Call) -> None:
    text = call("search", "--help").out
    for name in (*SAMPLERS, *PRUNERS, "--timeout"):
        assert name in text


def test_search_as_json_names_the_best(call: Call) -> None:
    ended = call("search", *MINE, "--n-trials", "2", "--out", "found", "--json")
    assert ended.status == 0
    found = json.loads(ended.out)
    trials = load_results("found").trials
    assert found["trials"] == 2
    assert found["best"]["value"] == trials["search_loss"].min()
    assert set(found["best"]["params"]) == {"terms", "alpha_scale", "meta_lr", "inner_steps"}


def test_search_goes_on_with_more_trials(call: Call) -> None:
    arguments = ("search", *MINE, "--out", "found", "--quiet", "--n-trials")
    assert call(*arguments, "1").status == 0
    assert call(*arguments, "2").status == 2
    assert call(*arguments, "2", "--resume").status == 0
    assert list(load_results("found").trials["trial"]) == [0, 1]


def test_search_with_a_url_leaves_a_study_that_optuna_opens(call: Call, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    stored = ("--storage", url, "--study-name", "mine", "--out", "o", "--quiet")
    assert call("search", *MINE, "--n-trials", "1", *stored).status == 0
    assert len(optuna.load_study(study_name="mine", storage=url).trials) == 1
    joined = call("search", *MINE, "--n-trials", "1", *stored[:4], "--out", "another")
    assert joined.status == 0  # whose best trial is not in its own tables
    assert "best: trial 0" in joined.out


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Let Ray be missing; return what its variable was whenever its import was tried."""
    variable, tried = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", []
    monkeypatch.setenv(variable, "")
    monkeypatch.delenv(variable)
    for name in list(sys.modules):
        if name.partition(".")[0] == "ray" or name.startswith("ift_tune.search.ray"):
            monkeypatch.delitem(sys.modules, name)

    class Missing(MetaPathFinder):
        def find_spec(self, name: str, *_: object) -> None:
            if name == "ray":
                tried.append(os.environ.get(variable))
                raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    return tried


def test_ray_is_told_to_keep_to_this_machine_before_it_is_imported(
    call: Call, without_ray: list[str | None]
) -> None:
    ended = call("search", *MINE, "--backend", "ray")
    assert ended == (1, "", "ift-tune: --backend ray needs ray: pip install 'ift_tune[ray]'\n")
    assert without_ray == ["0"]


def test_a_search_with_optuna_needs_no_ray(call: Call, without_ray: list[str | None]) -> None:
    assert call("search", *MINE, "--n-trials", "1", "--out", "o", "--quiet") == (0, "", "")
    assert without_ray == []


def test_a_search_in_which_everything_diverges_says_so(call: Call) -> None:
    ended = call(
        "search",
        *("problems_of_mine:not_a_number", "--device", "cpu", "--outer-steps", "2"),
        *("--n-trials", "1", "--out", "found"),
    )
    assert ended.status == 1
    assert "no trial came to its end with a finite value (1 nonfinite)" in ended.err


def test_a_comparison_in_which_nothing_is_found_says_so(call: Call) -> None:
    ended = call(
        *("compare", "problems_of_mine:not_a_number", "--device", "cpu", "--out", "found"),
        *("--arms", "ift,none", "--seeds", "2", "--budget", "90", "--training-steps", "20"),
    )
    assert ended.status == 1
    assert "no trial came to its end with a finite value (4 nonfinite)" in ended.err
    assert "report.html" not in ended.out


SCORED = ("problems_of_mine:scored", "--device", "cpu", "--outer-steps", "3")


@pytest.mark.parametrize("command", ["run", "search", "compare"])
def test_a_metric_to_maximise_needs_its_mode(call: Call, command: str) -> None:
    task = SCORED if command != "compare" else (*SCORED, "--seeds", "1", "--budget", "200")
    more = ("--n-trials", "3") if command == "search" else ()
    for wrong, mend in (
        ((), "choose a metric from search_score"),
        (("--metric", "search_score"), "say mode='max' (--mode max)"),
        (("--metric", "search_score", "--mode", "up"), "must be 'min' or 'max', got 'up'"),
        (("--mode", "max"), "name what is to be maximised"),
    ):
        ended = call(command, *task, *more, "--out", "o", *wrong)
        assert ended.status == 2
        assert mend in ended.err
        assert not Path("o").exists()
    right = ("--metric", "search_score", "--mode", "max")
    assert call(command, *task, *more, "--out", "o", *right, "--quiet").status == 0
    assert json.loads(Path("o", "run.json").read_text())["mode"] == "max"


def test_the_best_of_a_search_is_told_with_its_direction(call: Call) -> None:
    aim = ("--metric", "search_score", "--mode", "max")
    ended = call("search", *SCORED, "--n-trials", "3", "--out", "o", *aim)
    best = load_results("o").trials["search_score"].max()
    assert f"search_score {best:.4g} (higher is better)  test_score" in ended.out
    told = json.loads(call("search", *SCORED, "--n-trials", "3", "--out", "p", *aim, "--json").out)
    assert told["best"]["value"] == best


def test_a_search_without_a_finite_trial_says_so_as_json_too(call: Call) -> None:
    ended = call(
        *("search", "problems_of_mine:not_a_number", "--device", "cpu", "--outer-steps", "2"),
        *("--n-trials", "1", "--out", "found", "--json"),
    )
    assert ended.status == 1
    assert json.loads(ended.out)["best"] is None


def test_a_run_that_is_not_finite_says_so_and_is_no_usage_error(call: Call) -> None:
    ended = call(
        "run",
        "problems_of_mine:not_a_number",
        "--device",
        "cpu",
        "--outer-steps",
        "2",
        "--out",
        "o",
    )
    assert ended.status != 2
    assert "nonfinite" in ended.out + ended.err
    assert list(load_results("o").trials["stop_reason"]) == ["nonfinite"]


def test_check_approves_of_a_right_problem(call: Call) -> None:
    ended = call("check", "problems_of_mine:good")
    assert (ended.status, ended.err) == (0, "")
    assert "6 weights, 3 hyperparameters" in ended.out
    assert ended.out.count("  ok  ") >= 4
    assert "FAIL" not in ended.out


def test_check_as_json(call: Call) -> None:
    ended = call("check", "problems_of_mine:good", "--json", "--no-exact")
    assert ended.status == 0
    found = json.loads(ended.out)
    assert found["start"]["status"] == "passed"
    assert found["exact"] is None


def test_check_refuses_a_wrong_derivative_at_once(call: Call) -> None:
    ended = call("check", "problems_of_mine:wrong")
    assert ended.status == 1
    assert "the mixed product by λ of the penalty is not" in ended.err
    assert call("run", "problems_of_mine:wrong", "--quiet", "--out", "o").status == 2


def test_check_fails_a_wrong_hypergradient(call: Call) -> None:
    ended = call("check", "problems_of_mine:wrong", "--set", "start_check=false")
    assert ended.status == 1
    assert "the hypergradient is not the true one" in ended.err
    assert "FAIL closed-form penalty, mixed product" in ended.err
    assert "ok   closed-form penalty, gradient" in ended.err


def test_an_exception_of_the_users_own_is_not_hidden(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["ift-tune", "run", "problems_of_mine:broken", "--out", "o", "--quiet"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(RuntimeError, match="a mistake in the user's problem"):
        cli.main()


@pytest.mark.parametrize(
    ("arguments", "mend"),
    [
        ("run digits-weight-dekay", "did you mean 'digits-weight-decay'"),
        ("run rare", "a problem of your own is named MODULE:FACTORY"),
        ("run no_such_module:make", "no module 'no_such_module'"),
        ("run problems_of_mine:god", "did you mean 'good'"),
        ("check problems_of_mine:god", "did you mean 'good'"),
        ("run ./problems_of_mine.py:good", "problems_of_mine"),
        ("run problems_of_mine:good --set tems=3", "did you mean 'terms'"),
        ("run problems_of_mine:good --set terms", "--set takes KEY=VALUE"),
        ("search problems_of_mine:good --set terms=3 --vary terms=0:9", "got terms in both"),
        ("run problems_of_mine:good --outer-steps 0", "outer_steps must be"),
        ("run problems_of_mine:good --budget -1", "gradient_equivalents must be"),
        ("run problems_of_mine:good --outer-stps 3", "--outer-steps"),
        ("run problems_of_mine:good --seed one", "--seed"),
        ("run problems_of_mine:good --device gpu0", "auto, cpu, cuda"),
        ("run problems_of_mine:good --out .", "--resume"),
        ("run problems_of_mine:good --out problems_of_mine.py", "name a directory"),
        ("run problems_of_mine:good --metric search_eror --out o", "search_loss"),
        ("run", "TASK"),
        ("serch problems_of_mine:good", "search"),
        ("run mnist-overfit", "--data-root"),
        ("run mnist-cleaning --data-root nowhere", "--download"),
        ("search mnist-overfit --n-trials 1", "--data-root"),
        ("search problems_of_mine:good --vary alhpa=0.1:1", "did you mean 'alpha'"),
        ("search problems_of_mine:good --vary alpha", "--vary takes KEY=VALUE"),
        ("search problems_of_mine:good --vary alpha=1:0.1", "low <= high"),
        ("search problems_of_mine:good --vary alpha=0:1", "alpha must be"),
        ("search problems_of_mine:good --vary alpha=0.1", "LOW:HIGH"),
        ("search problems_of_mine:good --n-trials 0", "n_trials"),
        ("search problems_of_mine:good --backend opuna", "did you mean 'optuna'"),
        ("search problems_of_mine:good --sampler tep", "did you mean 'tpe'"),
        ("search problems_of_mine:good --pruner medan", "did you mean 'median'"),
        ("search problems_of_mine:good --vary alpha=.1:1 --sampler grid", "--vary alpha=A,B,C"),
        ("search problems_of_mine:good --timeout 0", "timeout must be"),
        ("search problems_of_mine:good --backend ray --timeout 9", "belongs to --backend optuna"),
        (
            "search problems_of_mine:good --backend ray --searcher random --sampler gp",
            "draws at random: leave --sampler out, got gp",
        ),
        (
            "search problems_of_mine:good --backend ray --scheduler pbt --sampler cmaes",
            "pbt draws at random: leave --sampler out, got cmaes",
        ),
        ("search problems_of_mine:good --backend ray --sampler grid", "use --backend optuna"),
        ("search problems_of_mine:good --storage nonsense", "sqlite:///"),
    ],
)
def test_a_usage_error_is_one_line_with_the_mend_and_status_2(
    arguments: str, mend: str, call: Call
) -> None:
    ended = call(*arguments.split())
    assert ended.status == 2
    assert ended.out == ""
    assert len(ended.err.splitlines()) == 1
    assert mend in ended.err


@pytest.mark.parametrize(
    "arguments", ["run mnist-overfit --out o", "search mnist-overfit --out o", "run --device gpu0"]
)
def test_a_command_can_be_mended_and_given_again(arguments: str, call: Call) -> None:
    words = arguments.split()
    ended = call(*words, *(() if "--out" in words else ("problems_of_mine:good", "--out", "o")))
    assert ended.status == 2
    assert call("run", *MINE, "--out", "o", "--quiet") == (0, "", "")


def test_without_arguments_the_commands_are_shown(call: Call) -> None:
    ended = call()
    shown = (ended.out + ended.err).splitlines()
    assert all(any(name in line for line in shown) for name in ("tasks", "run", "search", "check"))
    assert "ift-tune: " not in ended.err.splitlines()


@pytest.mark.parametrize("command", [[], ["run"], ["search"], ["check"], ["tasks"]])
def test_help_is_no_error(command: list[str], call: Call) -> None:
    ended = call(*command, "--help")
    assert ended.status == 0
    assert "Usage" in ended.out


def test_a_real_process_says_one_line_too(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "ift_tune", "report", "nowhere"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("ift-tune: nowhere holds no run")
    assert ended.stderr.count("\n") == 1


def test_the_version_is_that_of_the_package(call: Call) -> None:
    assert call("--version") == (0, f"ift-tune {ift_tune.__version__}\n", "")


def test_the_help_of_compare_names_every_arm(call: Call) -> None:
    ended = call("compare", "--help")
    shown = ended.out.replace("│", " ").split("--budget")[0]
    assert set(ARMS) <= set(re.split(r"[\s,]+", shown))


def test_what_the_package_warns_of_is_one_line_on_standard_error(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warns(*_: object, **__: object) -> Results:
        logging.getLogger("ift_tune.trial.tables").warning("a row\nis %s", "damaged")
        logging.getLogger("ift_tune.trial.tables").info("nobody asked")
        raise UsageError("as expected")

    monkeypatch.setattr("ift_tune.trial.tables.load_results", warns)
    ended = call("report", "somewhere")
    assert ended == (2, "", "ift-tune: a row is damaged\nift-tune: as expected\n")
    logging.getLogger("ift_tune.trial.tables").warning("after the command")
    assert "after the command" not in call("--version").err


def test_check_plans_a_study(call: Call) -> None:
    ended = call(
        *("check", "problems_of_mine:good", "--no-exact", "--json"),
        *("--plan", "--n-trials", "6", "--workers", "2", "--outer-steps", "30"),
    )
    assert ended.status == 0
    plan = json.loads(ended.out)["plan"]
    assert (plan["trials"], plan["workers"], plan["outer_steps"]) == (6, 2, 30)
    assert call("check", "problems_of_mine:good", "--n-trials", "6").status == 2


def test_check_as_json_says_what_is_wrong(call: Call) -> None:
    ended = call("check", "problems_of_mine:wrong", "--json")
    assert ended.status == 1
    found = json.loads(ended.out)
    assert found["passed"] is False
    assert found["findings"][-1]["level"] == "wrong"
    assert "the mixed product by λ of the penalty is not" in found["findings"][-1]["sentence"]


def test_a_quoted_tilde_is_the_home_directory(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    ended = call("run", "digits-weight-decay", "--outer-steps", "1", "--out", "~/mine")
    assert ended.status == 0, ended.err
    assert str(home / "mine" / "steps.parquet") in ended.out
    assert call("report", "~/mine").status == 0
    assert not (tmp_path / "~").exists()


def test_a_user_whom_nobody_knows_has_no_home(call: Call, tmp_path: Path) -> None:
    ended = call("run", "digits-weight-decay", "--outer-steps", "1", "--out", "~nobody-of-mine/run")
    assert ended.status == 0, ended.err
    assert (tmp_path / "~nobody-of-mine" / "run" / "steps.parquet").exists()
