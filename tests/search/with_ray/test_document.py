"""The Tuner that docs/cluster.md shows, on what there is here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ift_tune import testing

DOCUMENT = "docs/cluster.md"


def make_problem(config: object, device: object, seed: int) -> testing.Quadratic:
    """Return a problem that costs nothing."""
    return testing.Quadratic(seed=seed)


@pytest.mark.nightly
def test_the_tuner_of_the_document_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = Path(__file__).parents[3]
    (block,) = re.findall(r"```python\n(.*?)```", (root / DOCUMENT).read_text(), re.DOTALL)
    here = {
        '{"cpu": 4, "gpu": 0.5}': '{"cpu": 1}',
        "outer_steps=100": "outer_steps=2",
        "num_samples=40": "num_samples=2",
        "max_t=100": "max_t=2",
        "/shared/run": str(tmp_path / "run"),
    }
    for long, short in here.items():
        assert long in block
        block = block.replace(long, short)
    scope: dict[str, Any] = {"make_problem": make_problem}
    exec(block, scope)
    assert len(scope["results"]) == len(scope["trials"]) == 2
    assert scope["results"].errors == []
