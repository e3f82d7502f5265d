"""The cost study: its measure of memory is exact, and its sentences follow the table."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch

from ift_tune.implicit.inverse import Identity, Neumann
from ift_tune.joint.config import MetaConfig
from ift_tune.studies.cost import study_costs
from ift_tune.studies.findings import judge_costs
from ift_tune.studies.writing import Verdict
from ift_tune.testing.price import measured_peak
from ift_tune.testing.problems import sized_problem

CPU = torch.device("cpu")
MEGABYTE = 10**6


def _block(megabytes: int) -> torch.Tensor:
    return torch.zeros(megabytes * MEGABYTE, dtype=torch.uint8)


def test_the_peak_is_what_lives_at_one_time() -> None:
    with measured_peak(CPU) as peak:
        first = _block(3)
        second = first + 1
        del first
        third = second + 1
        del second, third
        _block(2)
    assert peak.bytes == 6 * MEGABYTE


def test_views_and_writing_in_place_take_nothing() -> None:
    outside = _block(5)
    with measured_peak(CPU) as peak:
        outside.add_(1)
        outside.view(-1, 10)[0].fill_(2)
        _block(1)
    assert peak.bytes == 1 * MEGABYTE


def test_what_a_graph_keeps_is_counted() -> None:
    x = torch.zeros(250_000, requires_grad=True)  # 1 MB
    with measured_peak(CPU) as peak:
        y = x
        for _ in range(5):
            y = y.tanh()  # keeps its result
        y.sum().backward()  # type: ignore[no-untyped-call]
    assert 6 * MEGABYTE <= peak.bytes <= 7.1 * MEGABYTE  # the five, and a gradient or two


def test_a_table_a_point_and_memory_constant_over_inner_steps() -> None:
    config = MetaConfig(inverse=Neumann(terms=2), inner_steps=3)
    problem = sized_problem(8, "weight", CPU)
    study = study_costs(
        problem, config, inner_steps=(1, 6), terms=(4,), widths=(8, 16), repeats=1, most_unrolled=6
    )
    table = study.tables["cost"]
    by_t = table[table["sweep"] == "inner_steps"]
    assert list(by_t["value"]) == [1, 3, 6]
    assert by_t["joint_bytes"].nunique() == 1
    assert by_t["unrolled_bytes"].is_monotonic_increasing
    assert list(table[table["sweep"] == "terms"]["value"]) == [2, 4]
    assert len(table[table["sweep"] == "size"]) == 4
    assert (table["joint_bytes"] > table["plain_bytes"]).all()
    assert (table[["plain_seconds", "joint_seconds"]] > 0).all().all()
    verdicts = {f.claim: f.verdict for f in study.findings}
    assert verdicts["memory constant in T"] is Verdict.CONFIRMED
    assert verdicts["unrolling's memory grows with T"] is Verdict.CONFIRMED


def test_an_inverse_without_terms_has_no_sweep_of_them() -> None:
    config = MetaConfig(inverse=Identity(), inner_steps=1)
    study = study_costs(
        sized_problem(8, "model", CPU), config, inner_steps=(), widths=(), repeats=1
    )
    table = study.tables["cost"]
    assert set(table["sweep"]) == {"inner_steps"}
    assert table["terms"].isna().all()
    assert all("<NA>" not in f.sentence for f in study.findings)


def _row(**changes: object) -> dict[str, object]:
    return {
        "sweep": "inner_steps",
        "value": 10,
        "per": "",
        "weights": 100,
        "hypers": 100,
        "inner_steps": 10,
        "terms": 5,
        "inner_batch": 50,
        "outer_batch": 50,
        "time_ratio": 2.0,
        "memory_ratio": 3.0,
        "joint_seconds": 1.0,
        "plain_bytes": 100,
        "joint_bytes": 300,
        "unrolled_bytes": math.nan,
    } | changes


@pytest.mark.parametrize(
    ("changes", "claim", "verdict"),
    [
        ({}, "a few times the time", Verdict.CONFIRMED),
        ({"time_ratio": 9.0}, "a few times the time", Verdict.CONTRADICTED),
        ({"memory_ratio": 9.0}, "a few times the memory", Verdict.CONTRADICTED),
        ({"joint_bytes": 200}, "memory constant in T", Verdict.CONTRADICTED),
        ({"time_ratio": 9.0}, "more inner steps make it relatively cheaper", Verdict.CONTRADICTED),
    ],
)
def test_sentences_follow_the_table(
    changes: dict[str, object], claim: str, verdict: Verdict
) -> None:
    table = pd.DataFrame([_row(value=1, time_ratio=4.0), _row(**changes)])
    found = {f.claim: f.verdict for f in judge_costs(table, 10)}
    assert found[claim] is verdict
