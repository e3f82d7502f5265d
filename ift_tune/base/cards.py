"""How a result shows itself: a few lines of text, and the same as a small piece of HTML.

Notebooks ask an object for ``_repr_html_``, everything else for ``repr``. Both are made from one
`Card`, without any library. Colours are the page's own, so that it can be light or dark.
"""

from __future__ import annotations

import base64
import html
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

RUN_FILES = (
    *("trials.parquet", "steps.parquet", "report.html", "curves.png", "front.png"),
    *("audit/audit.html", "certificate.png", "pictures"),
)
"""What a card names of a run directory."""

_LONGEST = 60  # characters of a text in a cell
_FRAME = "border-left:3px solid rgba(128,128,128,.4);padding-left:10px"
_LINK = "color:inherit;text-decoration:underline"  # a browser's blue cannot be read on dark
_EDGE = "1px solid rgba(128,128,128,.4)"
_CELL = "padding:2px 10px 2px 0;text-align:left;vertical-align:top"
_PICTURE = "display:block;background:#fff;max-width:100%;width:640px;margin:6px 0"
_DRAWN = 200_000  # bytes of the largest picture that a card holds


@dataclass(frozen=True)
class Table:
    """Rows of plain values.

    Attributes:
        columns: Their names.
        rows: Values in the same order; None and NaN are left empty.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Card:
    """What an object says of itself.

    Attributes:
        title: What it is, in one line.
        lines: Sentences.
        table: Its first rows.
        folder: Where its files lie.
        files: Their names in the folder; those that are not there are left out.
        picture: An SVG file in the folder that is shown, in notebooks alone.
        alt: What that shows, in words.
    """

    title: str
    lines: Sequence[str] = ()
    table: Table | None = None
    folder: Path | None = None
    files: Sequence[str] = ()
    picture: str | None = None
    alt: str = ""

    def text(self) -> str:
        """Return it as lines of text."""
        parts = [self.title, *(f"  {line}" for line in self.lines)]
        if self.table is not None and self.table.rows:
            parts += [f"  {line}" for line in _columns_of_text(self.table)]
        if self.folder is not None:
            found = self._found(self.folder)
            parts.append(f"  files: {self.folder}{' (' + ', '.join(found) + ')' if found else ''}")
        return "\n".join(parts)

    def html(self) -> str:
        """Return it as HTML, in which all texts are escaped."""
        parts = [f"<div><strong>{html.escape(self.title)}</strong></div>"]
        parts += [f"<div>{html.escape(line)}</div>" for line in self.lines]
        if self.table is not None and self.table.rows:
            parts.append(_table(self.table))
        if self.folder is not None:
            parts += [self._picture(self.folder), self._files(self.folder)]
        return f'<div style="{_FRAME}">{"".join(parts)}</div>'

    def _found(self, folder: Path) -> list[str]:
        return [name for name in self.files if (folder / name).exists()]

    def _files(self, folder: Path) -> str:
        links = ", ".join(link(folder / name, name) for name in self._found(folder))
        return f"<div>files: {link(folder, str(folder))}{': ' + links if links else ''}</div>"

    def _picture(self, folder: Path) -> str:
        if self.picture is None or not (path := folder / self.picture).is_file():
            return ""
        if path.stat().st_size > _DRAWN:
            return ""
        source = f"data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}"
        alt = html.escape(self.alt)
        return f'<img src="{source}" alt="{alt}" style="{_PICTURE}">'


def address(path: Path) -> str | None:
    """Return what a notebook's page can follow to a file; None if it is not below this folder.

    A page is served from the notebook's folder, and reaches nothing above it.
    """
    try:
        here = os.path.relpath(path)
    except ValueError:  # on another drive
        return None
    outside = here == os.pardir or here.startswith(os.pardir + os.sep) or Path(here).is_absolute()
    return None if outside else quote(Path(here).as_posix())


def link(path: Path, shown: str) -> str:
    """Return a link to a file, or its name alone where no link would lead there."""
    target, text = address(path), html.escape(shown)
    if target is None:
        return text
    return f'<a href="{target}" target="_blank" style="{_LINK}">{text}</a>'


def shown(value: Any) -> str:
    """Return a value in short: four digits of a float, nothing for what is missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = " ".join(str(value).split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _columns_of_text(table: Table) -> list[str]:
    cells = [list(map(shown, table.columns)), *(list(map(shown, row)) for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def _table(table: Table) -> str:
    head = "".join(
        f'<th style="{_CELL};border-bottom:{_EDGE}">{html.escape(shown(name))}</th>'
        for name in table.columns
    )
    body = "".join(
        "<tr>"
        + "".join(f'<td style="{_CELL}">{html.escape(shown(value))}</td>' for value in row)
        + "</tr>"
        for row in table.rows
    )
    layout = "border-collapse:collapse;margin:6px 0;font-variant-numeric:tabular-nums"
    return f'<table style="{layout}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
