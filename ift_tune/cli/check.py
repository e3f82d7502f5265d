"""``ift-tune check``."""

import typer

from ift_tune.cli.jobs import find_job
from ift_tune.cli.options import (
    DataRoot,
    Device,
    Download,
    Embedded,
    Seed,
    Settings,
    TaskName,
    TaskOptions,
)


def check(
    task: TaskName,
    settings: Settings = None,
    data_root: DataRoot = None,
    download: Download = False,
    embedded: Embedded = False,
    options: TaskOptions = None,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Say whether a problem is differentiable, its hypergradient right, and how dear it is."""
    from ift_tune.base.environment import resolve_device
    from ift_tune.testing import check_hypergradient
    from ift_tune.testing.price import measure_price

    job = find_job(task, settings, data_root, download, embedded, options)
    where = resolve_device(device)
    typer.echo(str(measure_price(job.factory(job.config, where, seed), job.config)))
    typer.echo(str(check_hypergradient(job.factory(job.config, where, seed), seed=seed)))
