"""The certificate says yes where the theorem holds, and no, with the reason, where it does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from ift_tune import (
    Batches,
    BilevelProblem,
    Budget,
    ClassificationProblem,
    Dense,
    ExampleWeights,
    Identity,
    MetaConfig,
    Splits,
    UsageError,
    WeightDecay,
    testing,
)
from ift_tune.base.statistics import relation
from ift_tune.hyper import Compose
from ift_tune.report.certificate import draw_certificate, load_certificate, sentence_of
from ift_tune.studies.certificate import certify
from ift_tune.studies.certificate_findings import Certificate, judge, metasmoothness
from ift_tune.studies.writing import Verdict
from ift_tune.trial.session import run_single

EXACT = MetaConfig(
    inverse=Dense(),
    meta_lr=0.02,
    inner_steps=60,
    inner_lr=0.2,
    inner_optimizer="momentum",
    start_check=False,
)
Factory = Callable[[MetaConfig, torch.device, int], BilevelProblem]


def quadratic(config: MetaConfig, device: torch.device, seed: int) -> BilevelProblem:
    return testing.Quadratic(seed=seed)


def weighted(config: MetaConfig, device: torch.device, seed: int) -> BilevelProblem:
    """Softmax regression on three clouds, a weight for each of 30 examples."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(30) % 3
    centres = 1.5 * torch.eye(3)[targets]
    rows = [centres + torch.randn(30, 3, generator=generator) for _ in range(4)]
    first = Batches(rows[0], targets, torch.arange(30))
    rest = [Batches(inputs, targets) for inputs in rows[1:]]
    model = nn.Linear(3, 3)
    kinds = {
        "weights": ExampleWeights(30),
        "decay": WeightDecay(model, "model", init=0.05, transform="exp"),
    }
    return ClassificationProblem(model, Compose(kinds), Splits(first, *rest))


def noisy(config: MetaConfig, device: torch.device, seed: int) -> BilevelProblem:
    """The like with a hidden layer, of which each step drops a part."""
    problem = weighted(config, device, seed)
    dropout = nn.Dropout(float(str(config.user["rate"])))
    model = nn.Sequential(nn.Linear(3, 8), nn.ELU(), dropout, nn.Linear(8, 3))
    return ClassificationProblem(model, WeightDecay(model, "tensor", init=0.01), problem.splits)


def certified(
    directory: Path, factory: Factory, config: MetaConfig, steps: int = 5, **options: int
) -> Certificate:
    """Run a single trial, and look at what it has found."""
    budget = Budget(outer_steps=steps, retrain=False)
    run_single(factory, budget, out=directory, config=config, device="cpu")
    asked: dict[str, Any] = {"directions": 4, "groups": 4, **options}
    return certify(directory, factory, device="cpu", **asked)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """The certificate of a problem that the theorem is exact for."""
    return certified(tmp_path_factory.mktemp("exact") / "run", quadratic, EXACT)


def test_where_the_theorem_holds_it_says_yes(exact: Certificate) -> None:
    found = exact
    assert found.holds, found.finding
    every = found.relations["all"]
    assert every.slope.mean == pytest.approx(1.0, abs=0.1)
    assert every.rank.low > 0.8
    assert found.facts["noise"] < 0.05
    assert found.facts["metasmoothness"] == pytest.approx(1.0)
    assert set(found.table["kind"]) == {"gradient", "random"}
    # For each displaced λ a prediction and a measurement on both splits.
    assert len(found.table) == 2 * (5 + 4)


@pytest.mark.nightly
def test_a_wrong_size_is_told_from_a_wrong_order(tmp_path: Path) -> None:
    config = EXACT.updated({"inverse": "identity"})
    assert isinstance(config.inverse, Identity)
    found = certified(tmp_path / "run", quadratic, config)
    assert not found.holds
    # It is the inverse's fault: the longer solve predicts what happens.
    assert "with a longer solve" in found.finding.sentence
    longer = found.relations["all, longer solve"]
    assert longer.slope.mean == pytest.approx(1.0, abs=0.1)
    assert longer.r2.mean > 0.95


def test_too_few_inner_steps_say_no(tmp_path: Path) -> None:
    config = EXACT.updated({"inner_steps": 2, "inner_lr": 0.01})
    found = certified(tmp_path / "run", quadratic, config, longest=1)
    assert found.finding.verdict is Verdict.CONTRADICTED
    assert "take more inner steps" in found.finding.sentence
    assert found.facts["gain"] > 0.01


@pytest.mark.nightly
@pytest.mark.parametrize("rate", [0.5, 0.0])
def test_active_dropout_says_no(tmp_path: Path, rate: float) -> None:
    config = EXACT.updated({"inner_lr": 0.05, "user.rate": rate})
    found = certified(tmp_path / "run", noisy, config, steps=3, longest=2, directions=3)
    # The same net without dropout is predicted: it is dropout that says no.
    assert found.finding.verdict is (Verdict.CONTRADICTED if rate else Verdict.CONFIRMED)


@pytest.mark.nightly
def test_examples_that_are_left_out(tmp_path: Path) -> None:
    found = certified(tmp_path / "run", weighted, EXACT, steps=3, longest=1, groups=6, directions=3)
    rows = found.table[(found.table["kind"] == "left out") & (found.table["split"] == "search")]
    assert len(rows) == 6
    assert set(rows["size"]) == {10.0}
    # To leave out ten of thirty is a large step: the order of the groups is predicted.
    assert relation(
        rows["predicted"].to_numpy(float), rows["retrained"].to_numpy(float)
    ).rank.mean == pytest.approx(1.0, abs=0.3)


def test_what_it_says_is_kept_and_shown(exact: Certificate, tmp_path: Path) -> None:
    found = exact
    (tmp_path / "run").mkdir()
    found.save(tmp_path / "run")
    table = load_certificate(tmp_path / "run")
    assert table is not None
    pd.testing.assert_frame_equal(table, found.table)
    assert found.finding.sentence in sentence_of(table)
    draw_certificate(table, tmp_path / "figure.svg")
    assert "predicted change" in (tmp_path / "figure.svg").read_text()
    assert json.loads(json.dumps(found.as_dict()))["verdict"] == "confirmed"
    (tmp_path / "run" / "certificate.parquet").write_bytes(b"no table")
    with pytest.raises(UsageError, match=r"certificate\.parquet is damaged"):
        load_certificate(tmp_path / "run")
    assert load_certificate(tmp_path) is None


def table_of(predicted: np.ndarray, retrained: np.ndarray, again: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "kind": "random",
            "split": "search",
            "predicted": predicted,
            "retrained": retrained,
            "again": again,
        }
    )


def test_the_verdict_follows_the_numbers() -> None:
    x = np.linspace(-1.0, 1.0, 20)
    facts = {"gain": 0.0, "inner_steps": 10.0, "metasmoothness": 1.0}

    def verdict(*columns: np.ndarray, **more: float) -> Verdict:
        return judge(table_of(*columns), {**facts, **more}).finding.verdict

    assert verdict(x, 1.1 * x, 1.1 * x) is Verdict.CONFIRMED
    assert verdict(x, 9.0 * x, 9.0 * x) is Verdict.MIXED
    assert verdict(x, -x, -x) is Verdict.CONTRADICTED
    assert verdict(x, x, -x) is Verdict.CONTRADICTED  # another training says otherwise
    assert verdict(x, x, x, gain=0.5) is Verdict.CONTRADICTED
    assert verdict(x, x, x, gain=float("nan")) is Verdict.CONTRADICTED


def test_metasmoothness_of_noise_is_about_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second, third = torch.randn(3, 20_000, generator=generator)
    ramp = torch.linspace(-1.0, 1.0, 20_000)
    assert metasmoothness(0 * ramp, ramp, 2 * ramp) == 1.0
    # What is drawn anew each time goes back rather than on.
    assert metasmoothness(first, second, third) < 0.3
    assert metasmoothness(first, first + 1.0, first) != metasmoothness(first, first + 1, first + 2)
