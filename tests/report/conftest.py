"""One small comparison, its pages and one browser: made once for all test processes."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browser import open_browser
from filelock import FileLock

from ift_tune.compare.findings import Findings, find
from ift_tune.report import write_report
from ift_tune.trial.tables import Results, load_results
from report.comparisons import CHANGES, run_small, saved

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("optuna")

Once = Callable[[str, Callable[[Path], object]], Path]


@contextlib.contextmanager
def rough_estimates() -> Iterator[None]:
    """Spend little on estimates: these tests look at how numbers are shown, not at the numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ift_tune.base.statistics._RESAMPLES", 99)
        patch.setattr("ift_tune.search.analysis._TREES", 4)
        yield


@pytest.fixture(scope="package", autouse=True)
def _quick() -> Iterator[None]:
    """Not for the session: the statistics' own tests may follow in the same process."""
    with rough_estimates():
        yield


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Return what fills a folder once: the process that comes first, and the others wait."""
    base = tmp_path_factory.getbasetemp()
    # Each process of pytest-xdist has a folder of its own in a common one.
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def fill(name: str, make: Callable[[Path], object]) -> Path:
        folder = shared / f"report-{name.replace(' ', '-')}"
        done = folder.with_suffix(".done")
        with FileLock(folder.with_suffix(".lock")):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a process that failed half-way
                with rough_estimates():  # session fixtures come before those of the package
                    make(folder)
                done.touch()
        return folder

    return fill


@pytest.fixture(scope="session")
def comparison(once: Once) -> Path:
    """Return the directory of a comparison as it was run, cells and all, with its page."""

    def make(folder: Path) -> None:
        run_small(folder)
        write_report(folder)

    return once("run", make)


@pytest.fixture(scope="session")
def results(comparison: Path) -> Results:
    """Return its tables."""
    return load_results(comparison)


@pytest.fixture(scope="session")
def findings_of(results: Results) -> Callable[[str], Findings]:
    """Return what gives the findings of each of `CHANGES`."""

    @functools.cache
    def find_once(name: str) -> Findings:
        with rough_estimates():
            return find(CHANGES[name](results))

    return find_once


@pytest.fixture(scope="session")
def page_of(comparison: Path, results: Results, once: Once) -> Callable[[str], Path]:
    """Return what gives the page of each of `CHANGES`."""

    def write(name: str) -> Path:
        if name == "whole":  # as a user has it: beside the folders of the trials
            return comparison / "report.html"
        folder = once(name, lambda path: write_report(saved(CHANGES[name](results), path)))
        return folder / "report.html"

    return write


@pytest.fixture(scope="session")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """Start a browser; skip where there is none."""
    with open_browser(tmp_path_factory.mktemp("profile")) as chrome:
        yield chrome
