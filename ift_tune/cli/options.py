"""The options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

OPTUNA, RAY = "with --backend optuna", "with --backend ray"  # panels of the help

TaskName = Annotated[str, typer.Argument(metavar="TASK", help="a built-in task or MODULE:FACTORY")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="a meta-hyperparameter; may be repeated"),
]
OuterSteps = Annotated[int | None, typer.Option(help="length of a trial in outer steps")]
BudgetGE = Annotated[
    float | None, typer.Option("--budget", help="length of a trial in gradient-equivalents")
]
Seconds = Annotated[float | None, typer.Option(help="length of a trial in seconds")]
Out = Annotated[Path | None, typer.Option(help="run directory; default runs/TASK-seedN")]
DataRoot = Annotated[Path | None, typer.Option(help="where data sets lie; default $IFT_TUNE_DATA")]
Download = Annotated[bool, typer.Option("--download", help="fetch missing data into --data-root")]
Embedded = Annotated[
    bool, typer.Option("--embedded", help="try the task on small embedded data, no files needed")
]
TaskOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option", metavar="KEY=VALUE", help="of the task itself, see `tasks`; may be repeated"
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
Seed = Annotated[int, typer.Option(help="of splits, weights, order of batches and sampler")]
Resume = Annotated[bool, typer.Option("--resume", help="go on with the run in --out")]
Quiet = Annotated[bool, typer.Option("--quiet", help="print errors only")]
AsJson = Annotated[bool, typer.Option("--json", help="print the result as JSON")]
Metric = Annotated[str | None, typer.Option(help="search metric to minimise, as search_loss")]
GpusPerTrial = Annotated[float | None, typer.Option(help="1, a part of 1 to share a GPU, or 0")]
Workers = Annotated[
    int | None, typer.Option(help="optuna: processes side by side", rich_help_panel=OPTUNA)
]
Address = Annotated[
    str | None,
    typer.Option(help="ray: of a cluster; default: start one here", rich_help_panel=RAY),
]
CpusPerTrial = Annotated[
    float | None, typer.Option(help="ray: cores of a trial", rich_help_panel=RAY)
]
