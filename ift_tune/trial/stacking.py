"""The rows of many trials in one table: a thousand small files, read together.

Reading each for itself takes a table per file, which costs far more than the few rows in it. Files
with the same columns are read as one, where that comes to the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ift_tune.trial.diagnoses import DIAGNOSES, diagnosed, joined
from ift_tune.trial.record import TrialRecord, latest_of, parsed

_FLAGS = ("True", "False", "true", "false")


class _Rows(NamedTuple):
    """Rows of trials that have the same columns.

    Attributes:
        table: The rows, those of a trial one after the other.
        places: Of each row, where its trial is in the list of all.
    """

    table: pd.DataFrame
    places: np.ndarray[Any, np.dtype[np.int64]]

    def each(self) -> Iterator[tuple[int, dict[str, np.ndarray[Any, Any]]]]:
        """Yield each trial's place and its columns."""
        columns = {str(name): self.table[name].to_numpy() for name in self.table}
        cuts = np.flatnonzero(np.diff(self.places)) + 1
        for start, end in zip([0, *cuts], [*cuts, len(self.places)], strict=True):
            part = slice(start, end)
            yield int(self.places[start]), {name: all_[part] for name, all_ in columns.items()}


def stack(
    records: Sequence[TrialRecord], metric: str | None, mode: str
) -> tuple[list[pd.DataFrame], list[pd.DataFrame]]:
    """Return both tables of trials in parts, which `ordered` puts together.

    Args:
        records: Of the trials; one that has no facts yet is left out.
        metric: What decides; see `diagnose`.
        mode: Its direction.

    Returns:
        Parts of the `trials` table, and parts of the `steps` table. Their indices are the order of
        the trials.
    """
    known = {record: whole for record in records if (whole := record.whole())[0]}
    facts = [each for each, _ in known.values()]
    latest: dict[int, dict[str, Any]] = {}
    beware: dict[int, str] = {}
    steps = []
    for rows in _rows_of({record: text for record, (_, text) in known.items()}):
        steps.append(_with_constants(rows, facts))
        latest |= latest_of(rows.table, rows.places)
        beware |= {i: joined(diagnosed(columns, metric, mode)) for i, columns in rows.each()}
    trials = [
        {**latest.get(i, {}), **constants, DIAGNOSES: beware.get(i, "")}
        for i, constants in enumerate(facts)
    ]
    return [_frame(trials)] if trials else [], steps


def ordered(parts: Sequence[pd.DataFrame], first: Sequence[str]) -> pd.DataFrame:
    """Put parts of a table together, each row in the order of its trial.

    Args:
        parts: Tables whose indices are the order of the rows.
        first: Columns that come first, and are there in any case; the others follow as the first
            trial that has them has them.
    """
    if not parts:
        return pd.DataFrame(columns=list(first))
    others = dict.fromkeys(
        name
        for part in sorted(parts, key=lambda part: part.index[0])
        for name in part
        if name not in first
    )
    # Columns without a value would decide the type of the whole column when they are stacked.
    table = pd.concat([part.dropna(axis="columns", how="all") for part in parts])
    if not table.index.is_monotonic_increasing:
        table = table.sort_index(kind="stable")
    return table.reset_index(drop=True).reindex(columns=[*first, *others])


def _rows_of(trials: Mapping[TrialRecord, str]) -> list[_Rows]:
    """Return the rows of trials, given as text, those with the same columns together."""
    records, texts = list(trials), list(trials.values())
    alike: dict[str, list[int]] = {}
    for place, text in enumerate(texts):
        alike.setdefault(text.partition("\n")[0], []).append(place)
    rows = []
    for header, places in alike.items():
        bodies = [texts[place].removeprefix(f"{header}\n") for place in places]
        together = _together(header, bodies, places)
        alone = (_Rows(t := records[i].steps(), np.full(len(t), i)) for i in places)
        rows += list(alone) if together is None else [together]
    return [each for each in rows if len(each.table)]


def _together(header: str, bodies: Sequence[str], places: Sequence[int]) -> _Rows | None:
    """Return the rows of files that have one header, as one; None if that is not the same.

    A column may be numbers in one file and texts in another, and one file may be damaged, which is
    then found where each is read for itself.
    """
    text = f"{header}\n{''.join(bodies)}"
    if '"' in text:  # a cell may have several lines
        return None
    counts = [body.count("\n") for body in bodies]
    try:
        table = parsed(text)
    except ValueError:
        return None
    if len(table) != sum(counts):
        return None
    rows = _Rows(table, np.repeat(np.asarray(places, dtype=np.int64), counts))
    return None if any(_is_mixed(table[name], rows.places) for name in table) else rows


def _is_mixed(column: pd.Series[Any], places: np.ndarray[Any, Any]) -> bool:
    """Return whether a column of texts would be one of numbers or flags in one of the files."""
    if pd.api.types.is_numeric_dtype(column.dtype):
        return False
    firsts = column.groupby(places).first().dropna()
    return bool(pd.to_numeric(firsts, errors="coerce").notna().any() or firsts.isin(_FLAGS).any())


def _with_constants(rows: _Rows, facts: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return rows with what is constant over their trials, unless the rows have it themselves."""
    own = set(rows.table.columns)
    places, row_trials = np.unique(rows.places, return_inverse=True)
    constants = _frame([{k: v for k, v in facts[i].items() if k not in own} for i in places])
    table = rows.table.set_axis(rows.places, axis="index")
    repeated = constants.take(row_trials).set_axis(rows.places, axis="index")
    return pd.concat([table, repeated], axis="columns")


def _frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return a table of rows, in which None is a missing value and decides no type."""
    columns = dict.fromkeys(name for row in rows for name in row)
    known = [{name: value for name, value in row.items() if value is not None} for row in rows]
    return pd.DataFrame(known, index=range(len(known))).reindex(columns=list(columns))
