"""The page for contributors: its kind passes the contract, its files and lists are there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

import ift_tune
from ift_tune.testing import contracts

ROOT = Path(__file__).parent.parent
DOCUMENT = "CONTRIBUTING.md"


def test_the_kind_of_the_page_keeps_the_laws_and_learns() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / DOCUMENT).read_text(), flags=re.DOTALL)
    assert "\ncheck_kind(" in block
    scope: dict[str, Any] = {}
    exec(compile(block, DOCUMENT, "exec"), scope)
    kind = scope["LogitAdjustment"](3)
    inputs, targets = torch.randn(30, 4), torch.arange(30) % 3
    splits = ift_tune.Splits(*(ift_tune.Batches(inputs, targets) for _ in range(4)))
    problem = ift_tune.ClassificationProblem(torch.nn.Linear(4, 3), kind, splits)
    ift_tune.JointOptimizer(problem, ift_tune.MetaConfig(inner_steps=3)).step()
    assert kind.summary()["most"] > 0.0


def test_what_it_names_is_there() -> None:
    text = (ROOT / DOCUMENT).read_text()
    named = re.findall(r"`(ift_tune/[\w/.]+)`", text)
    assert len(named) >= 8
    assert [name for name in named if not (ROOT / name).exists()] == []
    for check in re.findall(r"`(check_\w+)\(", text):
        assert hasattr(contracts, check)
