"""``ift-tune study-inverse | study-cost | study-validation``."""

from __future__ import annotations

import typer

from ift_tune.cli.study_cost import study_cost
from ift_tune.cli.study_inverse import study_inverse
from ift_tune.cli.study_validation import study_validation


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("study-inverse")(study_inverse)
    app.command("study-cost")(study_cost)
    app.command("study-validation")(study_validation)
