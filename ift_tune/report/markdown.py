"""The report in short, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from ift_tune.compare.findings import Findings
from ift_tune.compare.verdict import Verdict
from ift_tune.report.rows import Table, against_table, commands, environment_rows, final_table
from ift_tune.report.wording import without_paths

_SPECIAL = str.maketrans({c: f"\\{c}" for c in "\\`*_{}[]<>#|~$"} | {"\n": " "})


def markdown(findings: Findings, verdict: Verdict) -> str:
    """Return verdict, tables, notes and environment."""
    parts = [
        f"# {escaped(without_paths(findings.task))}: comparison",
        f"**{escaped(verdict.headline)}**",
        _bullets(verdict.others),
        _notes(verdict.notes),
        _section(final_table(findings)),
        _section(against_table(findings)),
        "## Environment and command",
        _bullets([f"{name}: {text}" for name, text in environment_rows(findings.about)]),
        *(f"    {command}" for command in commands(findings.about)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def escaped(text: str) -> str:
    """Return the text so that Markdown shows it as it is."""
    return text.translate(_SPECIAL)


def _bullets(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {escaped(sentence)}" for sentence in sentences)


def _notes(notes: Sequence[str]) -> str:
    return f"## Notes\n\n{_bullets(notes)}" if notes else ""


def _section(table: Table) -> str:
    if not table.rows:
        return ""
    lines = [_line(table.head), "|---" * len(table.head) + "|"]
    lines += [_line(row.cells) for row in table.rows]
    return f"## {table.name}\n\n" + "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(escaped, cells))} |"
