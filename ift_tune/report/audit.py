"""The audit of a run's training examples: measured, written as tables, and shown as a page."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy.typing as npt
import pandas as pd

from ift_tune.base.arguments import require_path
from ift_tune.base.cards import Card
from ift_tune.base.errors import UsageError, require
from ift_tune.base.files import damaged, read_parquet, write_atomically, write_table
from ift_tune.studies.audit_findings import AUDIT
from ift_tune.trial.tables import RunDirectory

if TYPE_CHECKING:
    import torch

    from ift_tune.trial.trial import ProblemFactory

_CARDS = 200  # most examples that a page shows


class AuditTable(pd.DataFrame):
    """The table of an audit. A notebook shows what it says and where its page is, then its rows.

    What is computed from it, a part or a copy, is a plain DataFrame.
    """

    _metadata: ClassVar[list[str]] = ["folder"]  # what pandas keeps in a pickle

    folder: Path | None = None

    @property
    def _constructor(self) -> type[pd.DataFrame]:
        return pd.DataFrame

    def _repr_html_(self) -> str:
        facts = self.attrs.get(AUDIT) or {}
        files = [f"{AUDIT}.html", f"{AUDIT}.csv", f"{AUDIT}.parquet"]
        card = Card(_claim(self), facts.get("sentences", ()), folder=self.folder, files=files)
        columns = pd.get_option("display.max_columns")
        return card.html() + self.to_html(max_rows=10, max_cols=columns, show_dimensions=True)


def audit(
    run_dir: str | os.PathLike[str],
    make_problem: ProblemFactory | None = None,
    *,
    seeds: int = 1,
    top: int = 50,
    folds: int = 5,
    products: int = 100,
    wrong: npt.ArrayLike | None = None,
    out: str | os.PathLike[str] | None = None,
    device: str | torch.device = "auto",
    say: Callable[[str], None] = lambda line: None,
) -> AuditTable:
    """Rank the training examples of a run that has learned a weight for each (`ExampleWeights`).

    The model is trained from scratch with the weights, and on the validation examples (`refit`);
    plainly; and on the validation examples alone. The examples are ranked by the mean loss of their
    labels under the three, the most suspect first: models trained on different data err on
    different examples (Brodley and Friedl 1999). Beside that order stand those of each of the three
    and of the weights alone, that of the two that know no weights, and cleanlab's, where it is
    installed (``pip install 'ift_tune[audit]'``).

    Written are ``audit.parquet``, ``audit.csv``, whose columns ``index`` and ``weight`` a trainer
    takes, and the page ``audit.html``. A second call writes them anew; trainings that are there
    are not repeated, and one that was interrupted goes on.

    Args:
        run_dir: The run directory, of one run or of a search, whose best trial is audited.
        make_problem: The factory that the run was made with; None: as the run has noted it.
        seeds: How many seeds: the run's own, and others whose runs are made here, with the same
            examples and settings but other initial weights and orders of batches, each with the
            three trainings. Weights, losses and changes are means over them.
        top: Examples that the page shows, and whose order is looked at.
        folds: Parts of the training split for cleanlab, one plain training without each; 0 leaves
            cleanlab out.
        products: Most Hessian-vector products, over eight batches each, for what leaving out an
            example would change; 0 leaves that out.
        wrong: Which labels are wrong, where that is known: a truth value for each training example,
            by its position. A problem that has spoiled them itself knows (the cleaning tasks).
        out: Where to write; None: the folder ``audit`` of the run directory.
        device: Where.
        say: Is told what goes on.

    Returns:
        A row for each training example:

        - ``rank``, 1 for the most suspect, and ``index``, its position in the training split;
        - ``weight`` as learned, and ``weight_se``, its standard error over seeds; of one
          seed, over the better half of a search's trials, and NaN of a single run;
        - ``given_label``, ``suggested_label`` (the likeliest under the three models) and
          ``mean_loss``, that of the given label under them, by which the rank is;
        - ``search_loss_change``: by how much the loss of the search split would change, to first
          order, if the example was left out: below 0, the example does harm
          (`ift_tune.studies.influence`); and its standard error over seeds;
        - ``refitted_loss``, ``plain_loss`` and ``validation_model_loss``, under each of the three,
          and ``cleanlab_score``, by which the other orders are, the most suspect highest;
        - ``flagged``: whether the suggested label is another; and ``wrong``, where that is known.

        It is a `pandas.DataFrame`, which a notebook shows with what the page says. Its attribute
        ``"audit"`` says how well each order finds what is known to be wrong, what each has cost,
        how much of the top the seeds have in common.

    Raises:
        UsageError: If the run has no weight for each example or no trained model, its factory
            cannot be imported, or an argument is wrong.
        Interrupted: On Ctrl-C or SIGTERM, after saving.

    Example:
        >>> import ift_tune
        >>> task = ift_tune.tasks.get("digits-cleaning")
        >>> outcome = ift_tune.run_single(
        ...     task.make_problem, ift_tune.Budget(outer_steps=20), out="runs/mine",
        ...     config=task.default_config, device="cpu",
        ... )
        >>> table = ift_tune.audit("runs/mine", folds=0, device="cpu")
        >>> bool(table.head(50)["wrong"].mean() > 0.9)
        True
        >>> weights = table.sort_values("index")["weight"].to_numpy()
        >>> len(weights)
        600
    """
    require("jinja2", extra="report", what="an audit")
    from ift_tune.studies.audit import measure
    from ift_tune.studies.noted import noted_factory
    from ift_tune.trial.best import find_best

    folder = require_path("the run directory", run_dir)
    target = RunDirectory(folder / AUDIT if out is None else out, resume=True)
    if target.path.resolve() == folder.resolve():
        raise UsageError(
            f"out must be another folder than the run's: leave it out for {folder / AUDIT}, got "
            f"{target.path}"
        )
    settings = RunDirectory(folder, resume=True).settings()
    if settings.get("backend") == "compare":
        raise UsageError(
            "an audit is of one training split, and a comparison has one for each of its seeds: "
            f"audit a run or a search of the task (ift-tune run, search), got {folder}"
        )
    find_best(folder)  # whether there is a run at all
    factory = noted_factory(folder) if make_problem is None else make_problem
    with target.held():
        table = measure(
            folder,
            factory,
            target.path / "trainings",
            seeds=seeds,
            top=top,
            folds=folds,
            products=products,
            wrong=wrong,
            device=device,
            say=say,
        )
        table.attrs[AUDIT]["task"] = str(settings.get("task"))
        write_table(target.path / AUDIT, table)
        write_page(target.path)
    return _of(table, target.path)


def _of(table: pd.DataFrame, folder: Path) -> AuditTable:
    """Return a table that knows where it lies."""
    made = AuditTable(table)
    made.attrs, made.folder = table.attrs, folder
    return made


def load_audit(run_dir: str | os.PathLike[str]) -> AuditTable | None:
    """Return the table of a run's audit; None where there is none.

    Args:
        run_dir: The run directory, or the folder that the audit was written to.

    Raises:
        UsageError: If it cannot be read.
    """
    for folder in (Path(run_dir) / AUDIT, Path(run_dir)):
        if (path := folder / f"{AUDIT}.parquet").exists():
            table = read_parquet(path)
            if not isinstance(table.attrs.get(AUDIT), dict):
                raise damaged(path, "no facts of an audit")
            return _of(table, folder)
    return None


def write_page(folder: str | os.PathLike[str]) -> Path:
    """Write ``audit.html`` from the table beside it, and return its path; nothing is run.

    Raises:
        UsageError: If there is no table.
        MissingDependencyError: If Jinja2 is not installed.
    """
    require("jinja2", extra="report", what="the page of an audit")
    table = load_audit(folder)
    if table is None:
        raise UsageError(f"{folder} holds no {AUDIT}.parquet: audit the run again")
    home = require_path("the run directory", folder)
    path = (home / AUDIT if (home / AUDIT).is_dir() else home) / f"{AUDIT}.html"
    write_atomically(path, page(table).encode())
    return path


def page(table: pd.DataFrame) -> str:
    """Return the page of an audit, one file that needs no other."""
    from ift_tune.report.html import environment, without_paths

    facts = table.attrs[AUDIT]
    return (
        environment()
        .get_template("audit.html")
        .render(
            task=without_paths(facts["task"]),
            claim=_claim(table),
            sentences=facts["sentences"],
            rankings=[_ranking(row, facts) for row in facts["rankings"]],
            top=facts["top"],
            known=facts["wrong"] is not None,
            cards=[
                _card(row, facts["looks"].get(str(row["index"]), {}), facts.get("class_names", []))
                for row in table.head(min(facts["top"], _CARDS)).to_dict("records")
            ],
            solves=facts["solves"],
            seeds=facts["seeds"],
            examples=f"{facts['examples']:,}",
        )
    )


def _claim(table: pd.DataFrame) -> str:
    if "flagged" not in table:
        return f"{len(table):,} training examples, the most suspect first."
    flagged = int(table["flagged"].sum())
    return f"{flagged:,} of {len(table):,} training labels are suspect."


def _ranking(row: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    cells = [
        _number(row["gradient_equivalents"], ",.0f"),
        _number(row["flagged"], ",.0f"),
    ]
    if facts["wrong"] is not None:
        names = ("auc", "f1", "precision_at_top", "precision_at_wrong")
        cells += [_number(row[name], ".3f") for name in names]
    return {"name": row["ranking"], "about": row["about"], "cells": cells}


def _card(
    row: Mapping[Any, Any], look: Mapping[str, str], class_names: Sequence[str]
) -> dict[str, Any]:
    """Return what the page says of one example."""
    given, suggested = (
        _label(row.get(f"{which}_label"), class_names) for which in ("given", "suggested")
    )
    error = _number(row["weight_se"], ".2g")
    return {
        "rank": row["rank"],
        "index": row["index"],
        "image": look.get("image"),
        "text": look.get("text"),
        "given": given,
        "suggested": suggested,
        "differs": given != suggested,
        "weight": _number(row["weight"], ".3g") + (f" ± {error}" if error else ""),
        "change": _number(row["search_loss_change"], "+.2g"),
        "wrong": row.get("wrong"),
    }


def _label(value: Any, class_names: Sequence[str]) -> str:
    """Return a label, by its name where it has one; empty where there is none."""
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, Integral) and 0 <= int(value) < len(class_names):
        return class_names[int(value)]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _number(value: Any, form: str) -> str:
    return "" if value is None or math.isnan(value) else format(value, form)
