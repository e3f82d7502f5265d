"""Texts in Markdown, shown as they are: whatever a user has named cannot become an element."""

from __future__ import annotations

import re
from collections.abc import Sequence

_SPECIAL = str.maketrans({c: f"\\{c}" for c in "\\`*_{}[]<>#|~$&"})
_LINK = re.compile(r"://|(?<=www)\.", re.IGNORECASE)  # which GitHub makes links of by themselves
_LIST = re.compile(r"^(?:[-+=]|\d+(?=[.)]))")  # at the beginning, a mark of a list or of a heading


def escaped(text: str) -> str:
    r"""Return a text on one line, so that Markdown shows it as it is.

    Example:
        >>> from ift_tune.report.markdown import escaped
        >>> print(escaped("<b> f1[/macro] of www.example.com"))
        \<b\> f1\[/macro\] of www\.example.com
    """
    plain = _one_line(text).translate(_SPECIAL)
    plain = _LINK.sub(r"\\\g<0>", plain)
    mark = _LIST.match(plain)
    if mark is None:
        return plain
    at = mark.end() if plain[0].isdigit() else 0
    return f"{plain[:at]}\\{plain[at:]}"


def bullets(sentences: Sequence[str]) -> str:
    """Return a list."""
    return "\n".join(f"- {escaped(sentence)}" for sentence in sentences)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    lines = [_row(head), "|---" * len(head) + "|", *map(_row, rows)]
    return "\n".join(lines)


def code(lines: Sequence[str]) -> str:
    """Return a block of code, which ends where it shall, whatever the lines hold.

    Not an indented one: after a list, that is a paragraph of the list's last entry.
    """
    shown = [_one_line(line) for line in lines]
    longest = max((len(run) for line in shown for run in re.findall("`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([fence, *shown, fence])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(escaped, cells))} |"


def _one_line(text: str) -> str:
    """Return a text without ends of lines, and with a mark for what does not print."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
