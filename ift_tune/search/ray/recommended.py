"""Settings for a Tuner of one's own, under which nothing is lost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray import tune

from ift_tune.search.ray.tables import TablesCallback


def recommended_run_config(
    directory: str | Path,
    name: str = "ray",
    *,
    tables: TablesCallback | None = None,
    checkpoint_every: int | None = 1,
    checkpoints_kept: int = 1,
    max_failures: int = 3,
    callbacks: Sequence[tune.Callback] = (),
    **more: Any,
) -> tune.RunConfig:
    """Return settings for a ``tune.Tuner`` under which nothing is lost.

    A checkpoint follows each result, and Ray's snapshot of the experiment each checkpoint, so a
    killed trial, node or driver costs one result at most. For models whose checkpoints are large,
    raise `checkpoint_every`; docs/cluster.md has the sizes.

    Args:
        directory: Ray's ``storage_path``: on a cluster, what all nodes can reach.
        name: Of the experiment, a folder there.
        tables: Default: our tables in the experiment's folder.
        checkpoint_every: Results between checkpoints; None for function trainables, which decide
            for themselves.
        checkpoints_kept: The latest so many of each trial; PBT needs a few.
        max_failures: How often a trial may be started again from its checkpoint.
        callbacks: Further ones.
        more: Further arguments of ``tune.RunConfig``, such as `stop` or `verbose`.
    """
    checkpoints: dict[str, Any] = {"num_to_keep": checkpoints_kept}
    if checkpoint_every is not None:
        checkpoints |= {"checkpoint_frequency": checkpoint_every, "checkpoint_at_end": True}
    directory = str(directory)
    return tune.RunConfig(
        name=name,
        storage_path=directory if "://" in directory else str(Path(directory).resolve()),
        callbacks=[tables or TablesCallback(), *callbacks],
        checkpoint_config=tune.CheckpointConfig(**checkpoints),
        failure_config=tune.FailureConfig(max_failures=max_failures),
        **more,
    )
