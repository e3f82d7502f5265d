"""What a report writes: the same bytes each time, from the two tables alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pandas as pd
import pytest
from markdown_it import MarkdownIt  # Rich brings it

from ift_tune import UsageError, write_report
from ift_tune.base.errors import MissingDependencyError
from ift_tune.compare.findings import Findings
from ift_tune.compare.verdict import judge
from ift_tune.report.figures import FIGURES
from ift_tune.report.words import learned_sentences
from ift_tune.trial.tables import Results
from report.comparisons import ARMS, CHANGES, MATHS, SEEDS, saved

PageOf: TypeAlias = Callable[[str], Path]
FindingsOf: TypeAlias = Callable[[str], Findings]
WRITTEN = [f"figures/{f.name}.{ending}" for f in FIGURES for ending in ("svg", "png")]
WRITTEN += ["report.html", "report.md"]
WRITTEN += [f"{t}.{e}" for t in ("final", "chosen", "against") for e in ("csv", "parquet")]


@pytest.fixture(scope="module")
def report(page_of: PageOf) -> Path:
    """Return the directory of the comparison, with its report."""
    return page_of("whole").parent


def test_everything_is_written(report: Path) -> None:
    for name in (*WRITTEN, "trials.csv", "steps.csv"):
        assert (report / name).stat().st_size > 100, name


def test_two_parquet_files_give_the_same_bytes(report: Path, tmp_path: Path) -> None:
    for name in ("trials.parquet", "steps.parquet"):
        (tmp_path / name).write_bytes((report / name).read_bytes())
    write_report(tmp_path)
    for name in (*WRITTEN, "trials.csv", "steps.csv"):
        assert (tmp_path / name).read_bytes() == (report / name).read_bytes(), name


def test_nothing_tells_of_the_machine(report: Path) -> None:
    for name in ("report.html", "report.md"):
        text = (report / name).read_text()
        assert str(report) not in text
        assert str(Path.home()) not in text


def test_what_was_learned_is_said_in_the_words_of_the_kinds(
    report: Path, results: Results, findings_of: FindingsOf
) -> None:
    sentences = learned_sentences(findings_of("whole"))
    assert sentences
    words = results.trials["learned_words"].dropna()
    page = (report / "report.html").read_text()
    for sentence in sentences:
        assert any(sentence.endswith(f": {said}.") for said in words)
        assert f"<p>{sentence}</p>" in page
    assert "## What was learned" in (report / "report.md").read_text()


def test_markdown_says_it_in_short(report: Path, findings_of: FindingsOf) -> None:
    text = (report / "report.md").read_text()
    verdict = judge(findings_of("whole"))
    assert text.startswith("# clouds: comparison\n\n**")
    for sentence in (verdict.headline, *verdict.others, *verdict.notes):
        assert sentence.replace("[", "\\[").replace("]", "\\]").replace("_", "\\_") in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(ARMS) + 2 + len(ARMS) - 1
    assert len({line.replace("\\|", "").count("|") for line in rows}) == 2
    assert "torch " in text


def test_markdown_shows_names_as_they_are(page_of: PageOf) -> None:
    text = (page_of("hostile").parent / "report.md").read_text()
    assert "\\<script\\>" in text
    assert MATHS not in text
    kinds = {
        kind.type
        for token in MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
        for kind in (token, *(token.children or []))
    }
    assert {"text", "fence", "table_open"} <= kinds
    assert kinds.isdisjoint({"html_block", "html_inline", "link_open", "image", "code_block"})


def test_summary_tables_say_what_was_found(report: Path, findings_of: FindingsOf) -> None:
    found = findings_of("whole")
    final = pd.read_parquet(report / "final.parquet")
    assert list(final["arm"]) == [arm.name for arm in found.arms]
    assert list(final["retrained"]) == [arm.retrained.mean for arm in found.arms]
    chosen = pd.read_csv(report / "chosen.csv")
    assert len(chosen) == len(ARMS) * SEEDS
    against = pd.read_csv(report / "against.csv")
    assert list(against["other"]) == [a.other for a in found.against]
    assert (against["reference"] == "ift").all()
    means = final.set_index("arm")["retrained"]
    for row in against.to_dict("records"):
        assert row["difference"] == pytest.approx(means["ift"] - means[row["other"]])
        assert row["difference_low"] <= row["difference"] <= row["difference_high"]


@pytest.mark.parametrize("name", ["one arm", "one arm, one seed"])
def test_a_report_of_little_is_a_report(page_of: PageOf, name: str) -> None:
    text = page_of(name).read_text()
    assert text.count("<h1>") == 1
    only_ift = name == "one arm"
    assert ("No arm of this comparison uses hypergradients" in text) != only_ift
    assert ("there is no search to look into" in text) == only_ift
    assert "against</th>" not in text
    assert "nan" not in (page_of(name).parent / "report.md").read_text()


def test_an_unfinished_comparison_says_so(page_of: PageOf) -> None:
    text = page_of("unfinished").read_text()
    assert "1 of 12 searches have not found anything yet" in text


def test_what_is_no_comparison_is_refused(results: Results, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run"):
        write_report(tmp_path)
    for table in (tables := CHANGES["without IFT"](results)):
        table.attrs["run"]["backend"] = "optuna"
    with pytest.raises(UsageError, match="not of a comparison"):
        write_report(saved(tables, tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {"trials.parquet", "steps.parquet"}


@pytest.mark.parametrize("library", ["matplotlib.figure", "jinja2"])
def test_without_a_library_the_extra_is_named(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    saved(results, tmp_path)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'ift_tune\[report\]'"):
        write_report(tmp_path)
