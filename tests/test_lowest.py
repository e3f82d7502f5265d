"""The lowest versions that are tested are those that pyproject.toml allows."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOT_RUN = {
    "ruff",
    "mypy",
    "pandas-stubs",
    "types-PyYAML",
    "build",
    "hatchling",
    "selenium",
    "mkdocs-material",
    "mkdocstrings",
    "nbclient",
    "ipykernel",
    "optuna-dashboard",
    "peft",
}  # tools that look at the source or build it, Chrome's, the site's and notebooks', guests


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python has no reader of TOML before")
def test_each_lower_bound_is_pinned_and_nothing_else_is() -> None:
    import tomllib

    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = [each for part in (project["dependencies"], *extras) for each in part]
    known = [re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", each) for each in wanted]
    assert all(known[i] or wanted[i].startswith("ift_tune[") for i in range(len(wanted)))
    bounds = {match[1]: match[2] for match in known if match}
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    expected = {name: v for name, v in bounds.items() if name not in NOT_RUN}
    assert {name: padded(v) for name, v in expected.items()} == {
        name: padded(v) for name, v in pins.items()
    }


def padded(version: str) -> str:
    """Return "2.6" as "2.6.0"."""
    return ".".join([*version.split("."), "0", "0"][:3])
