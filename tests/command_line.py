"""``ift-tune`` called in this process: its exit status and what it prints."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import pytest

from ift_tune import cli


class Ended(NamedTuple):
    """How a call ended."""

    status: int
    out: str
    err: str


class Call(Protocol):
    """Runs ``ift-tune`` with some arguments."""

    def __call__(self, *arguments: str) -> Ended: ...


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Call]:
    """Stand in an empty directory, without any data root."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("IFT_TUNE_DATA", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    known = dict(sys.modules)

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["ift-tune", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert isinstance(ended.value.code, int)
        return Ended(ended.value.code, *capsys.readouterr())

    yield run
    # What was imported from here would be taken for the next test's module of that name.
    for name, module in set(sys.modules.items()) - set(known.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]
