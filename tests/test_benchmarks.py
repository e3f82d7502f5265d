"""The comparison with other libraries and the scaling run as they are, at a small size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ift_tune.base.files import read_parquet

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
LIBRARY = """
import torch

def neumann(weights, raws, terms, step, outer, set_grad):
    return [torch.ones_like(raw) for raw in raws]
"""


def run_benchmark(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / name), "--repeats", "3", "--seconds", "0", *options],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.nightly
def test_peers_are_compared(tmp_path: Path) -> None:
    options = ("--models", "lenet", "--inner-steps", "2", "--out", str(tmp_path))
    done = run_benchmark("peers.py", *options)
    assert done.returncode == 0, done.stderr
    assert "left out: hypertorch, for want of --hypertorch PATH" in done.stdout
    table = read_parquet(tmp_path / "peers.parquet").set_index(["what", "name"])
    assert table["difference"].to_dict()["hypergradient", "autograd code"] < 1e-5
    assert table["times_ift_tune"].to_dict()["outer step", "ift_tune"] == 1.0
    assert ("hypergradient", "plain training") not in table.index
    # Adam's two moments and the gradient beside the weights, and what λ takes above that.
    weights = 4 * 61_706
    peaks = table.loc["outer step"]["peak_bytes"].to_dict()
    assert 4 * weights < peaks["plain training"] < peaks["ift_tune"]
    times = read_parquet(tmp_path / "times.parquet")
    assert set(times.groupby(["what", "name"]).size()) == {3}
    assert json.loads((tmp_path / "environment.json").read_text())["libraries"].keys() <= {
        "torchopt",
        "betty-ml",
    }
    assert (tmp_path / "peers.png").stat().st_size > 0


@pytest.mark.nightly
def test_another_hypergradient_is_not_timed(tmp_path: Path) -> None:
    library = tmp_path / "hypergrad"
    library.mkdir()
    (library / "__init__.py").touch()
    (library / "hypergradients.py").write_text(LIBRARY)
    options = ("--models", "lenet", "--inner-steps", "1", "--hypertorch", str(tmp_path))
    done = run_benchmark("peers.py", *options)
    assert done.returncode == 1
    assert "hypertorch computes another hypergradient" in done.stderr


@pytest.mark.nightly
def test_costs_are_fitted(tmp_path: Path) -> None:
    sizes: tuple[str, ...] = (
        "--terms",
        "0",
        "2",
        "40",
        "--hypers",
        "200",
        "2000",
        "--widths",
        "4",
        "8",
    )
    sizes += ("--inner-steps", "1", "4", "--packs", "1", "2")
    done = run_benchmark("scaling.py", *sizes, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = read_parquet(tmp_path / "scaling.parquet").set_index(["sweep", "value"])["seconds"]
    terms = rows["terms K (T = 1)"].to_dict()
    assert terms[40] > terms[0]
    assert list(rows["trials packed together"].index) == [1, 2]
    assert list(rows["hyperparameters H (T = 10, K = 3)"].index) == [200, 2000]
    fits = read_parquet(tmp_path / "fits.parquet").set_index("sweep")
    assert list(fits.index) == ["terms K (T = 1)"]  # two points are always on a line
    assert 0.0 < fits["slope"].iloc[0] < terms[40]


@pytest.mark.nightly
def test_adapters_are_compared_at_one_cost(tmp_path: Path) -> None:
    options = ["--embedded", "--seeds", "2", "--outer-steps", "2", "--steps", "20"]
    options += ["--pretraining", "3", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "adapters.py"), *options],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    table = read_parquet(tmp_path / "out" / "adapters.parquet").set_index(["seed", "arm"])
    cost = table["cost"].unstack("arm")
    assert (cost["tpe"] >= cost["ift"]).all()
    assert (cost["tpe"] - cost["ift"] < 20).all()  # a training
    assert (cost["default"] == 20).all()
    scales = [name for name in table if str(name).startswith("scale ")]
    assert table[scales].notna().sum(axis=1).unstack("arm").loc[1].to_dict() == {
        "default": 0,
        "ift": 16,
        "tpe": 0,
    }
    assert "`manual`" in (tmp_path / "out" / "README.md").read_text()
