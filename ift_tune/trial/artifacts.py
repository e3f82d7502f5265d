"""What a finished trial leaves in its folder: λ as found, and its pictures."""

from __future__ import annotations

from pathlib import Path

from ift_tune.base.files import write_atomically
from ift_tune.base.views import VIEWS_FILE, pack
from ift_tune.trial.checkpoint import save_checkpoint
from ift_tune.trial.trial import Trial

HYPERPARAMETERS = "hyperparameters.pt"


def save_found(folder: Path, trial: Trial) -> None:
    """Write what a trial has found, if anything."""
    found = trial.found()
    if not found:
        return
    save_checkpoint(folder / HYPERPARAMETERS, found)
    if views := trial.views():
        write_atomically(folder / VIEWS_FILE, pack(views))


def take_found(source: Path, target: Path) -> None:
    """Copy what `save_found` wrote, if anything, to another folder."""
    for name in (HYPERPARAMETERS, VIEWS_FILE):
        if (source / name).exists():
            write_atomically(target / name, (source / name).read_bytes())
