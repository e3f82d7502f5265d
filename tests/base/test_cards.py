"""How results are shown: whole HTML, in which nothing that a user has named is markup."""

from __future__ import annotations

from pathlib import Path

import pytest
from shown_html import NASTY, Page

from ift_tune.base.cards import Card, Table, address, shown


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a run directory below the one that the test stands in."""
    monkeypatch.chdir(tmp_path)
    made = Path("runs", 'a "b" <c> #1')
    made.mkdir(parents=True)
    return made


def test_texts_of_users_are_texts(folder: Path) -> None:
    (folder / f"{NASTY.replace('/', ':')}.csv").touch()
    card = Card(
        NASTY,
        [NASTY, "second"],
        Table(["trial", NASTY], [[1, NASTY], [2, None]]),
        folder,
        [f"{NASTY.replace('/', ':')}.csv"],
    )
    page = Page(card.html())
    assert page.tags == {"div", "strong", "table", "thead", "tbody", "tr", "th", "td", "a"}
    assert page.texts.count(NASTY) == 4
    assert NASTY in card.text()


def test_only_files_that_are_there_are_linked_and_by_an_address_that_leads_there(
    folder: Path,
) -> None:
    (folder / "trials.parquet").touch()
    page = Page(Card("run", folder=folder, files=["trials.parquet", "report.html"]).html())
    assert page.links == [
        "runs/a%20%22b%22%20%3Cc%3E%20%231",
        "runs/a%20%22b%22%20%3Cc%3E%20%231/trials.parquet",
    ]


def test_what_lies_outside_of_the_notebooks_folder_is_named_without_a_link(
    folder: Path, tmp_path: Path
) -> None:
    assert address(tmp_path.parent / "other") is None
    assert address(tmp_path.resolve() / "runs") == "runs"
    assert address(Path("javascript:alert(1)")) == "javascript%3Aalert%281%29"
    page = Page(Card("run", folder=tmp_path.parent).html())
    assert page.links == []
    assert str(tmp_path.parent) in page.texts[-1]


def test_a_small_picture_is_shown_and_a_large_one_is_not(folder: Path) -> None:
    for size, tags in ((100, 1), (300_000, 0)):
        (folder / "final.svg").write_bytes(b"x" * size)
        page = Page(Card("run", folder=folder, picture="final.svg", alt=NASTY).html())
        assert len([link for link in page.links if link.startswith("data:image/svg+xml")]) == tags


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.123456, "0.1235"),
        (123456.7, "123,457"),
        (1e-9, "1e-09"),
        (1234567, "1,234,567"),
        (True, "True"),
        (None, ""),
        (float("nan"), ""),
        (float("inf"), "inf"),
        ("two\nlines", "two lines"),
        ("x" * 99, "x" * 59 + "…"),
    ],
)
def test_values_are_short(value: object, text: str) -> None:
    assert shown(value) == text


def test_columns_of_text_stand_below_each_other() -> None:
    table = Table(["trial", "value"], [[1, 0.5], [12, None]])
    assert Card("two", table=table).text().splitlines() == [
        "two",
        "  trial  value",
        "      1    0.5",
        "     12",
    ]
