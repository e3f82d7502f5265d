"""The package as others get it: wheel, extras one by one, what an import costs, its types."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ift_tune

ROOT = Path(__file__).parent.parent
TRAINING = """
import json, sys
import ift_tune
names = ("hypergradient", "JointOptimizer", "Neumann", "MetaConfig", "BilevelProblem", "Splits")
found = {"ift_tune": sorted(sys.modules)}
for name in (*names, "ClassificationProblem", "WeightDecay", "ExampleWeights", "Budget", "Batches"):
    getattr(ift_tune, name)
    found[name] = sorted(sys.modules)
print(json.dumps(found))
"""
TABLES = {"pandas", "pyarrow", "sklearn", "scipy", "optuna", "ray", "matplotlib", "yaml", "rich"}

LIBRARIES = {  # of each extra, beside those of the extras that it names
    "optuna": {"optuna", "sqlalchemy", "alembic"},
    "ray": {"ray"},
    "report": {"matplotlib", "jinja2"},
    "vision": {"torchvision"},
    "compare": {"cmaes", "greenlet"},
    "audit": {"cleanlab"},
    "notebooks": {"ipykernel"},
}
EXTRAS = {  # what each brings in all, and what then has to work
    "nothing": (
        set(),
        "ift_tune.run_single(make, ift_tune.Budget(outer_steps=2), out='runs', device='cpu')",
    ),
    "optuna": (
        {"optuna"},
        "ift_tune.run_study(make, ift_tune.MetaSpace({'terms': ift_tune.Int(0, 2)}), "
        "ift_tune.Budget(outer_steps=1), n_trials=2, out='runs', device='cpu', sampler='random')",
    ),
    "ray": (
        {"ray", "optuna"},
        "space = ift_tune.MetaSpace.default(); "
        "ift_tune.ray_trainable(make, space, ift_tune.Budget(outer_steps=1))",
    ),
    "report": (
        {"report"},
        "ift_tune.run_single(make, ift_tune.Budget(outer_steps=2), out='runs', device='cpu'); "
        "from ift_tune.report import draw_curves; "
        "draw_curves(ift_tune.load_results('runs').steps, Path('curves.png'))",
    ),
    "vision": (
        {"vision"},
        "from ift_tune.tasks import vision",
    ),
    "compare": (
        {"compare", "optuna", "report"},
        "ift_tune.run_comparison(ift_tune.Comparison(make, "
        "ift_tune.Budget(gradient_equivalents=30), training_steps=4, device='cpu'), out='runs', "
        "arms=['ift', 'random'], seeds=1); ift_tune.write_report('runs')",
    ),
    "audit": (
        {"audit", "report"},
        "from ift_tune.studies.cleanlab_ranking import *; ift_tune.audit",
    ),
    "notebooks": (
        {"notebooks", "optuna", "report"},
        "import ipykernel; "
        "result = ift_tune.run_study(make, ift_tune.MetaSpace({'terms': ift_tune.Int(0, 2)}), "
        "ift_tune.Budget(outer_steps=1), n_trials=2, out='runs', device='cpu', "
        "callbacks=[ift_tune.Progress()]); assert '<table' in result._repr_html_()",
    ),
}
ALONE = """
import sys
from pathlib import Path

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
import ift_tune
from ift_tune.testing import Quadratic

def make(config, device, seed):
    return Quadratic(seed=seed)

if __name__ == "__main__":
    {use}
    print("used")
"""


def test_what_trains_is_imported_without_what_makes_tables() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRAINING], capture_output=True, text=True, check=True
    )
    imported = json.loads(done.stdout)
    found = {name: TABLES & set(modules) for name, modules in imported.items()}
    assert not any(found.values()), found
    assert "torch" not in imported["ift_tune"]
    assert "torch" in imported["JointOptimizer"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python has no reader of TOML before")
def test_every_extra_is_tried_alone() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for_developers = {"all", "test", "docs"}
    assert set(LIBRARIES) == set(extras) - for_developers
    for extra, libraries in LIBRARIES.items():
        listed = {re.split(r"[\[><=]", each)[0].lower() for each in extras[extra]}
        assert libraries & listed == libraries - {"sqlalchemy", "alembic"}


@pytest.mark.nightly
@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_works_without_the_others(extra: str, tmp_path: Path) -> None:
    brought, use = EXTRAS[extra]
    theirs = set().union(*(LIBRARIES[each] for each in brought))
    missing = [library for library in theirs if not _is_installed(library)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    absent = set().union(*LIBRARIES.values()) - theirs
    script = tmp_path / "alone.py"
    script.write_text(ALONE.format(absent=absent, use=use.replace("; ", "\n    ")))
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout[-5:]) == (0, "used\n"), done.stderr


def _is_installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


CONSUMER = """
import torch
import ift_tune
from ift_tune import tasks, testing
from ift_tune.testing.contracts import check_kind

problem = testing.Quadratic()
joint = ift_tune.JointOptimizer(problem, ift_tune.MetaConfig(inner_steps=2))
{revealed}
ift_tune.Budget(outer_stepz=3)
ift_tune.no_such_name
"""
TYPES = {
    "ift_tune.Budget(outer_steps=3)": "ift_tune.joint.budget.Budget",
    "ift_tune.MetaConfig().to_flat()": "dict[str, bool | int | float | str | None]",
    "joint.step()": "dict[str, ",
    "tasks.get('digits-cleaning').make_problem": "def (",
    "ift_tune.hypergradient": "-> ift_tune.implicit.hypergradient.Hypergradient",
    "ift_tune.load_best": "-> ift_tune.problem.problem.BilevelProblem",
    "ift_tune.run_single": "-> ift_tune.base.status.Outcome",
    "ift_tune.run_study": "fallback=ift_tune.search.result.StudyResult",
    "ift_tune.WeightDecay(torch.nn.Linear(2, 2)).decays()": "list[torch._tensor.Tensor]",
    "check_kind": "def (kind: type[ift_tune.hyper.base.HyperKind]",
}


@pytest.mark.nightly
def test_a_type_checker_sees_the_types_from_outside(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    lines = "\n".join(f"reveal_type({each})" for each in TYPES)
    (tmp_path / "consumer.py").write_text(CONSUMER.format(revealed=lines))
    installed = Path(ift_tune.__file__).parent
    assert (installed / "py.typed").is_file()
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "consumer.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(installed.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    seen = re.findall(r'Revealed type is "(.*)"', done.stdout)
    assert len(seen) == len(TYPES), done.stdout
    for (written, kind), found in zip(TYPES.items(), seen, strict=True):
        assert kind in found.replace("builtins.", ""), (written, found)
        assert found != "Any"
    errors = re.findall(r"error: (.*?)  \[(.*)\]", done.stdout)
    assert [code for _, code in errors] == ["call-arg", "attr-defined"], done.stdout


@pytest.mark.nightly
def test_the_wheel_and_the_source_hold_what_they_should(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), "."]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    (wheel,), (source,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    assert source.stat().st_size < 5e6
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "ift_tune").rglob("*.py")}
    assert modules <= names
    assert "ift_tune/py.typed" in names
    assert {name.partition("/")[0] for name in names} == {
        "ift_tune",
        f"ift_tune-{ift_tune.__version__}.dist-info",
    }
