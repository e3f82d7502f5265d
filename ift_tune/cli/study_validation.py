"""``ift-tune study-validation``."""

from pathlib import Path
from typing import Annotated

import typer

from ift_tune.cli.options import AsJson, Out, Quiet
from ift_tune.cli.studying import decimals, finish, numbers, teller


def study_validation(
    totals: Annotated[
        str, typer.Option(help="numbers of points for training and validation")
    ] = "100,200,800",
    fractions: Annotated[
        str, typer.Option(help="of them for validation")
    ] = "0.05,0.1,0.25,0.5,0.75,0.9",
    seeds: Annotated[int, typer.Option(help="how many")] = 6,
    outer_steps: Annotated[int, typer.Option(help="of each tuning")] = 100,
    out: Out = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Vary the share of the validation set for one decay and for one a weight, on digits."""
    from ift_tune.report.studies import draw_fractions
    from ift_tune.studies.validation_size import CONFIG, study_validation_sizes
    from ift_tune.studies.writing import open_directory

    points, shares = numbers("--totals", totals), decimals("--fractions", fractions)
    out = out or Path("runs", "study-validation")
    directory = open_directory(
        out,
        {
            "task": "digits, softmax regression",
            "study": "validation",
            "config": CONFIG.to_flat(),
            "totals": points,
            "fractions": shares,
            "seeds": seeds,
            "outer_steps": outer_steps,
        },
    )
    with directory.held():
        study = study_validation_sizes(
            totals=points,
            fractions=shares,
            seeds=seeds,
            outer_steps=outer_steps,
            on_progress=teller(quiet or as_json),
        )
        finish(study, out, draw_fractions, quiet=quiet, as_json=as_json)
