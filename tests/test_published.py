"""Figures that others have published, computed again with this package."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from ift_tune import Neumann, Nystrom
from ift_tune.base.files import read_parquet, write_table
from ift_tune.tasks.datasets import load

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def logistic() -> dict[str, Any]:
    return runpy.run_path(str(BENCHMARKS / "published_logistic.py"))


def test_hypertorch_s_notebook_to_six_digits(logistic: dict[str, Any]) -> None:
    losses = logistic["notebook_losses"](131)
    published = logistic["NOTEBOOK"]
    assert {step: losses[step] for step in published} == pytest.approx(published, abs=5e-7)


def test_the_implicit_hypergradient_follows_the_notebook(logistic: dict[str, Any]) -> None:
    """Not to six digits: ten unrolled steps see weights that still move."""
    losses = logistic["notebook_losses"](31, implicit=True)
    published = logistic["NOTEBOOK"]
    assert losses[20] == pytest.approx(published[20], abs=2e-5)
    assert losses[30] == pytest.approx(published[30], abs=2e-4)
    assert losses[30] != pytest.approx(published[30], abs=5e-7)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_errors_of_hypergradients_fall_as_proven(logistic: dict[str, Any], seed: int) -> None:
    """Grazzi et al. 2020: the fixed point attains its factor, conjugate gradients stay below."""
    fixed_point, conjugate = logistic["rates"](seed=seed)
    assert fixed_point.measured == pytest.approx(fixed_point.proven, rel=0.01)
    assert conjugate.measured <= conjugate.proven < 0.75 * fixed_point.measured
    assert fixed_point.largest_excess <= 1.0
    assert conjugate.largest_excess <= 1.0


def test_nystrom_is_ahead_of_neumann_as_published(logistic: dict[str, Any]) -> None:
    """Hataya and Yamada 2023: .2974 and .3658 after 100 outer steps; see results/published."""
    nystrom = logistic["hataya_losses"](Nystrom(rank=5, damping=0.1))[-1]
    assert nystrom == pytest.approx(0.2974, rel=0.02)
    neumann = logistic["hataya_losses"](Neumann(terms=5, alpha=0.1))[-1]
    assert neumann == pytest.approx(0.3658, rel=0.03)
    assert neumann == pytest.approx(0.3743, abs=1e-4)  # their own example's, with these settings


def test_hyper_cleaning_has_the_rivals_rows() -> None:
    """At the size of the embedded digits; the published one is in results/published."""
    cleaning = runpy.run_path(str(BENCHMARKS / "published_cleaning.py"))
    cleaning["NETS"]["small"] = replace(cleaning["NETS"]["linear"], outer_steps=40, steps=75)
    found = cleaning["rows"](load("mnist", embedded=True), "small", 3)
    rows = {row["method"]: row for row in found}
    assert list(rows) == ["T-RHG", "ift", "ift+val", "train", "val", "train+val"]
    assert min(rows["ift"]["f1"], rows["T-RHG"]["f1"]) > 80.0
    assert rows["ift"]["accuracy"] > rows["train"]["accuracy"] + 5.0
    assert rows["train+val"]["accuracy"] > rows["train"]["accuracy"]


def test_redrawn_labels_count_as_wrong() -> None:
    cleaning = runpy.run_path(str(BENCHMARKS / "published_cleaning.py"))
    data = cleaning["draw"](load("mnist", embedded=True), 0)
    redrawn = len(data.clean) // 2
    assert int((~data.clean).sum()) == redrawn
    everything = torch.ones_like(data.clean)
    kept = len(data.clean) - redrawn
    assert cleaning["f1"](everything, data.clean) == pytest.approx(
        200.0 * kept / (len(data.clean) + kept)
    )
    assert cleaning["f1"](data.clean, data.clean) == 100.0
    assert cleaning["f1"](~data.clean, data.clean) == 0.0


def test_figures_stand_beside_the_published_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Parts that were not asked for are read from where they lie; means are over the seeds."""
    cleaned = pd.DataFrame(
        {
            "net": ["linear", "linear", "MLP"],
            "method": ["T-RHG", "T-RHG", "ift"],
            "accuracy": [84.0, 86.0, 90.0],
            "f1": [89.0, 90.0, None],
        }
    )
    write_table(tmp_path / "cleaning", cleaned)
    options = ("--parts", "rates", "--seeds", "2", "--out", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["published.py", *options])
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    runpy.run_path(str(BENCHMARKS / "published.py"), run_name="__main__")
    table = read_parquet(tmp_path / "published.parquet").set_index("row")
    assert table["seeds"].to_dict() == {
        "fixed point (Neumann)": 2,
        "conjugate gradients": 2,
        "linear, T-RHG / T-RHG, accuracy": 2,
        "MLP, G-PBGD / ift, accuracy": 1,
        "linear, T-RHG / T-RHG, f1": 2,
    }
    theirs = table.loc["linear, T-RHG / T-RHG, accuracy"]
    assert (theirs["ours"], theirs["ratio"]) == pytest.approx((85.0, 85.0 / 84.61))
    assert json.loads((tmp_path / "environment.json").read_text())["packages"]


@pytest.mark.nightly
def test_warm_weights_remember_what_distilled_images_do_not_say() -> None:
    """Vicol et al. 2022, at the size of the embedded digits."""
    distillation = runpy.run_path(str(BENCHMARKS / "published_distillation.py"))
    rows = distillation["rows"]
    rows.__globals__["OUTER_STEPS"] = 80
    found = {row["method"]: row["accuracy"] for row in rows(load("mnist", embedded=True), 10, 0)}
    assert list(found) == ["warm", "retrained", "cold"]
    assert found["warm"] > found["retrained"] + 20.0
    assert found["cold"] > found["retrained"]
