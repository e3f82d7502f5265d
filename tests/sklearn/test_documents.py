"""The page and the benchmark are as they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import ift_tune
from ift_tune.base.files import read_parquet

ROOT = Path(ift_tune.__file__).parent.parent


def test_the_page_runs_as_it_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/sklearn.md").read_text()
    scope: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(block, scope)
    assert scope["accuracy"] > 0.93
    assert scope["decays"].keys() == set(scope["X_train"].columns)
    assert scope["wrong"][scope["suspects"]["row"]].mean() > 0.75
    assert scope["pipeline"].score(scope["X_test"], scope["y_test"]) > 0.93
    assert not list(tmp_path.iterdir())


@pytest.mark.nightly
def test_the_benchmark_compares_at_a_small_size(tmp_path: Path) -> None:
    options = ["--data", "wine", "--seeds", "2", "--least", "0.5", "--small"]
    command = [sys.executable, str(ROOT / "benchmarks" / "estimators.py"), *options]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    table: pd.DataFrame = read_parquet(tmp_path / "estimators.parquet")
    assert len(table) == 10
    assert table["test_error"].between(0.0, 0.5).all()
    assert (table["settings"] >= 1).all()
    assert "| wine | MLPClassifier | " in (tmp_path / "estimators.md").read_text()
