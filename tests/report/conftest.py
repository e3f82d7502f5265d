"""One small comparison and one browser for all tests of the report."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ift_tune.report import write_report
from ift_tune.trial.tables import Results, load_results
from report.comparisons import CHANGES, run_small, saved

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("optuna")

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="session", autouse=True)
def _quick() -> Iterator[None]:
    """Make estimates rough: these tests look at how numbers are shown, not at the numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ift_tune.base.statistics._RESAMPLES", 99)
        patch.setattr("ift_tune.search.analysis._TREES", 4)
        yield


@pytest.fixture(scope="session")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a comparison as it was run, cells and all."""
    out = tmp_path_factory.mktemp("comparison") / "run"
    run_small(out)
    return out


@pytest.fixture(scope="session")
def results(comparison: Path) -> Results:
    """Return its tables."""
    return load_results(comparison)


@pytest.fixture(scope="session")
def page_of(
    comparison: Path, results: Results, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Return what gives the page of each of `CHANGES`; it is written once."""

    @functools.cache
    def write(name: str) -> Path:
        if name == "whole":  # as a user has it: beside the folders of the trials
            return write_report(comparison)
        return write_report(saved(CHANGES[name](results), tmp_path_factory.mktemp("report")))

    return write


@pytest.fixture(scope="session")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """Start a browser that has no memory; skip where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver")
    driver = shutil.which("chromedriver")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if driver is None or browser is None:
        pytest.skip("needs Chromium and chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield chrome
    finally:
        chrome.quit()
