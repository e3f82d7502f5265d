"""A wrong command line: one line with the mend, exit status 2, and nothing left behind."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Call

MODULE = """
from torch import nn

from ift_tune import Splits
from ift_tune.testing.problems import Quadratic

number = 3


def good(config, device, seed):
    return Quadratic(seed=seed)


def nothing(config, device, seed):
    pass


def word(config, device, seed):
    return "problem"


def a_class(config, device, seed):
    return Quadratic


def a_model(config, device, seed):
    return nn.Linear(2, 2)


def of_nothing():
    return Quadratic()


class Returning(Quadratic):
    what = {}

    def train_loss(self, batch):
        return self.what.get("train", lambda v: v)(super().train_loss(batch))

    def val_loss(self, batch):
        return self.what.get("val", lambda v: v)(super().val_loss(batch))

    def penalty(self):
        return self.what.get("penalty")


def returning(**what):
    def factory(config, device, seed):
        problem = Returning(seed=seed)
        problem.what = what
        return problem

    return factory


float_loss = returning(train=lambda value: value.item())
dict_loss = returning(val=lambda value: {"loss": value})
number_penalty = returning(penalty=0.1)


def no_data(config, device, seed):
    problem = Quadratic(seed=seed)
    problem.splits = Splits([], [], [], [])
    return problem


def no_splits(config, device, seed):
    problem = Quadratic(seed=seed)
    problem.splits = None
    return problem


def on_meta(config, device, seed):
    problem = Quadratic(seed=seed)
    problem.model.to("meta")
    return problem
"""

RUN = "run mine:good --device cpu --outer-steps 1"
SEARCH = "search mine:good --device cpu --outer-steps 1 --n-trials 1"
COMPARE = "compare mine:good --device cpu --seeds 1 --training-steps 2 --budget 50"
COST = "study-cost digits-weight-decay --device cpu"
INVERSE = "study-inverse mine:good"
LONG = "n" * 300

TASKS = """mine:nothing mine:word mine:a_class mine:a_model mine:of_nothing mine:float_loss
mine:dict_loss mine:number_penalty mine:no_data mine:no_splits mine:on_meta mine:number mine:absent
mine: no_module:f :f a-b:f os:getcwd breaks:f lacks:f misspelt:f leaves:f digits-weigth-decay"""

OPTIONS = f"""--device=meta --device=gpu --device=cuda:99 --device= --metric=f1[/macro] --metric=
--set=alpha --set==3 --set=tems=3 --set=terms=-1 --set=inner_steps=2.5 --set=inverse=newton
--set=meta_lr=inf --set=inner_optimizer=adma --set=max_steps=3 --set=inner_steps=1e30
--out=a_file --out=a_file/deep --out=full --out={LONG} --out=new/{LONG} --out=damaged --option=a=1
--out=/proc/nowhere/x --embedded"""

OTHERS = f"""
runn
run
--no-such
tasks --jsonn
tasks extra
check
check nope
check mine:good --device meta
check mine:good --seed -1
check mine:good --seed {2**64}
check mine:nothing
check mine:float_loss
report
report nowhere
report full
report a_file
report damaged_tables
report damaged_trial
report {LONG}
{RUN} --outer-steps 0
{RUN} --outer-steps x
{RUN} --budget 0
{RUN} --budget nan
{RUN} --seconds inf
{RUN} --seed -1
{RUN} --seed {2**63}
{RUN} --seed 1.5
{RUN} --out damaged --resume
run digits-distill --device cpu --option per_class=-1
run digits-weight-decay --device cpu --option nope=7
run mnist-cleaning --device cpu --data-root a_file
{SEARCH} --n-trials 0
{SEARCH} --workers 0
{SEARCH} --workers x
{SEARCH} --gpus-per-trial 2
{SEARCH} --gpus-per-trial nan
{SEARCH} --gpus-per-trial 1
{SEARCH} --seed {2**63}
{SEARCH} --sampler tpee
{SEARCH} --sampler f1[/x]
{SEARCH} --pruner medain
{SEARCH} --backend slurm
{SEARCH} --scheduler asha
{SEARCH} --cpus-per-trial 1
{SEARCH} --storage redis://localhost:1/0
{SEARCH} --storage x.db
{SEARCH} --storage sqlite:///no/dir/x.db
{SEARCH} --storage journal:///no/dir/x
{SEARCH} --storage sqlite:///full
{SEARCH} --storage foo://bar
{SEARCH} --storage ''
{SEARCH} --storage sqlite:///fresh.db --metric search_f1
{SEARCH} --storage sqlite:///fresh.db --vary tems=1:2
{SEARCH} --study-name ''
{SEARCH} --vary terms
{SEARCH} --vary terms=5:1
{SEARCH} --vary terms=a:b
{SEARCH} --vary terms=1:2:lin
{SEARCH} --vary terms=0:3:log
{SEARCH} --vary meta_lr=0:1
{SEARCH} --vary inverse=newton,dense
{SEARCH} --vary alpha=nan:1
{SEARCH} --vary alpha=1:inf
{SEARCH} --vary alpha=.1:1 --vary alpha_scale=.1:1
{COMPARE} --arms nope
{COMPARE} --arms ''
{COMPARE} --arms ift,ift
{COMPARE} --arms f1[/macro]
{COMPARE} --seeds 0
{COMPARE} --first-seed -1
{COMPARE} --first-seed {2**63 - 1} --seeds 2
{COMPARE} --training-steps 0
{COMPARE} --budget nan
{COMPARE} --seconds 5
{COMPARE} --backend slurm
{COMPARE} --workers 0
{COST} --repeats 0
{COST} --terms a
{COST} --terms -1
{COST} --inner-steps 0
{COST} --widths 0
{COST} --most-unrolled -1
{COST} --seed -1
{COST} --out full
{INVERSE} --terms -1
{INVERSE} --terms ''
{INVERSE} --cosine nan
{INVERSE} --damping -1
{INVERSE} --seed {2**63}
{INVERSE} --out a_file
study-validation --seeds 0
study-validation --outer-steps 0
study-validation --totals x
study-validation --totals 100000
study-validation --fractions 2
study-validation --fractions nan
study-validation --out full
study-worth --noise 2 --data digits
study-worth --clean 0 --data digits
study-worth --clean ''
study-worth --data digits --clean 5000
study-worth --data mnist
study-worth --jobs nope
study-worth --arms val,tpe --data digits
study-worth --arms nope
study-worth --arms ''
study-worth --seeds 0
study-worth --middle-seeds 0
study-worth --trainings nan
study-worth --workers 0
study-worth --out full
"""

WRONG = [
    *(f"run {task} --device cpu --outer-steps 1 --quiet" for task in TASKS.split()),
    *(
        f"{COMPARE.replace('mine:good', task)} --quiet"
        for task in ("mine:no_data", "mine:dict_loss")
    ),
    *(f"{RUN} {option}" for option in OPTIONS.split()),
    *(f"{SEARCH} {option}" for option in OPTIONS.split()[::3]),
    *(f"{COMPARE} {option}" for option in OPTIONS.split()[1::3]),
    *OTHERS.strip().splitlines(),
]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Fill a directory with modules, files where folders are wanted, and damaged runs."""
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "breaks.py").write_text("x = 1 / 0\n")
    (tmp_path / "lacks.py").write_text("import no_such_library_at_all\n")
    (tmp_path / "misspelt.py").write_text("def f(:\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(5)\n")
    (tmp_path / "a_file").write_text("x")
    files = {
        "full/x": "x",
        "damaged/run.json": "{",
        "damaged_tables/trials.parquet": "x",
        "damaged_tables/steps.parquet": "x",
        "damaged_trial/trial-00000/trial.json": "[1]",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def listing(place: Path) -> dict[str, bytes | None]:
    """Return all files with what they hold, and the folders."""
    found = [path for path in place.rglob("*") if "__pycache__" not in path.parts]
    return {str(path): path.read_bytes() if path.is_file() else None for path in found}


def test_there_are_enough_of_them() -> None:
    assert len(set(WRONG)) == len(WRONG) >= 120


def test_each_is_one_line_with_status_2_and_leaves_nothing(
    place: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("COLUMNS", "80")
    before = listing(place)
    for line in WRONG:
        ended = call(*shlex.split(line))
        assert ended.status == 2, (line, ended)
        assert ended.err.startswith("ift-tune: "), (line, ended)
        assert ended.err.count("\n") == 1, (line, ended)
        assert len(ended.err) > len("ift-tune: ") + 12, (line, ended)
        assert listing(place) == before, line


def test_a_rich_name_is_shown_as_it_was_written(place: Path, call: Call) -> None:
    assert "f1[/macro]" in call(*RUN.split(), "--metric", "f1[/macro]").err
    assert "f1[/macro]" in call(*COMPARE.split(), "--arms", "f1[/macro]").err


def test_a_name_that_no_file_can_have(place: Path, call: Call) -> None:
    before = listing(place)
    for words in ((*RUN.split(), "--out", "x\0y"), ("report", "x\0y")):
        ended = call(*words)
        assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert listing(place) == before


def test_a_failed_import_says_what_to_mend_and_where(place: Path, call: Call) -> None:
    assert (
        f"mend {place / 'breaks.py'}, line 1, got ZeroDivisionError" in call("run", "breaks:f").err
    )
    assert "misspelt.py, line 1, got SyntaxError" in call("run", "misspelt:f").err
    assert "No module named 'no_such_library_at_all'" in call("run", "lacks:f").err


@pytest.mark.parametrize(
    "line", [f"{RUN} --metric f1[/macro]", "report damaged_tables"], ids=["run", "report"]
)
def test_a_real_process_says_the_same(place: Path, line: str) -> None:
    before = listing(place)
    ended = subprocess.run(
        [sys.executable, "-m", "ift_tune", *shlex.split(line)],
        cwd=place,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("ift-tune: ")
    assert ended.stderr.count("\n") == 1
    assert listing(place) == before


def test_a_script_that_runs_when_it_is_imported_is_told_where_and_what(
    tmp_path: Path, call: Call
) -> None:
    (tmp_path / "runs.py").write_text(
        "import ift_tune\nfrom ift_tune.testing.problems import Quadratic\n\n"
        "def make(config, device, seed):\n    return Quadratic(seed=seed)\n\n"
        "ift_tune.run_single(make, ift_tune.Budget(outer_steps=-1), out='o')\n"
    )
    told = call("check", "runs:make").err
    assert f"see {tmp_path / 'runs.py'}, line 7" in told
    assert 'put what runs in it under `if __name__ == "__main__":`' in told


def test_of_a_mistake_in_a_library_the_users_line_is_named(tmp_path: Path, call: Call) -> None:
    (tmp_path / "calls.py").write_text("import json\n\nsettings = json.loads('{')\n")
    told = call("run", "calls:make").err
    assert f"mend {tmp_path / 'calls.py'}, line 3, got JSONDecodeError" in told
