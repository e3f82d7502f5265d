"""What options accept where that is a closed list: for the help, and for a shell to complete.

The lists stand here as plain words, since the libraries that the parts behind them need take longer
to import than a help may take. A test holds them equal to what is accepted.
"""

from __future__ import annotations

from collections.abc import Callable

from ift_tune.compare.arms import ARMS  # plain values: no library is imported

BACKENDS = ("optuna", "ray")
SAMPLERS = ("tpe", "random", "gp", "cmaes", "qmc", "nsgaii", "nsgaiii", "grid", "bruteforce")
PRUNERS = ("none", "median", "hyperband", "asha")
SCHEDULERS = ("none", "asha", "hyperband", "pbt")
SEARCHERS = ("optuna", "random")
FIDELITIES = ("outer_steps", "inner_steps", "hvps", "gradient_equivalents")
DEVICES = ("auto", "cpu", "cuda")
MODES = ("min", "max")
REFIT_DATA = ("train", "train+val")
WORTH_DATA = ("digits", "mnist")
WORTH_JOBS = ("cleaning", "decay", "imbalance")
METRICS = ("search_error", "search_loss")
COSTS = ("gradient_equivalents", "hvps", "wall_seconds", "peak_memory_bytes")
KEYS = (
    *("inverse", "terms", "alpha", "alpha_scale", "tolerance", "preconditioner", "max_steps"),
    *("damping", "rank", "sketch_seed", "max_weights", "probes", "meta_lr", "meta_optimizer"),
    *("inner_steps", "inner_lr", "inner_optimizer", "inner_momentum", "inner_schedule"),
    *("inner_warmup", "clip_norm", "accumulate", "precision", "warm_start", "curvature"),
    *("start_check", "products", "memory_budget", "reinit_every", "reinit_below"),
    *("signal_every", "signal_parts", "signal_patience"),
)
"""Of `MetaConfig`, flat: what ``--set`` and ``--vary`` take, besides keys of the user's own."""

Complete = Callable[[str], list[str]]


def words(*known: str, end: str = "") -> Complete:
    """Return what completes one of some words.

    Args:
        known: The words.
        end: What follows the word, as the ``=`` of a pair.
    """

    def complete(incomplete: str) -> list[str]:
        return [word + end for word in known if (word + end).startswith(incomplete)]

    return complete


def joined(*known: str) -> Complete:
    """Return what completes the last of some words with commas between."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        chosen = before.split(",")
        return [
            f"{before}{comma}{word}"
            for word in known
            if word.startswith(last) and word not in chosen
        ]

    return complete


def task_names(incomplete: str) -> list[tuple[str, str]]:
    """Return the built-in tasks that a text may become, each with what it is."""
    from ift_tune import tasks

    return [
        (name, task.summary) for name, task in tasks.TASKS.items() if name.startswith(incomplete)
    ]


arm_names = joined(*ARMS)
keys = words(*KEYS, end="=")
metrics = words(*METRICS)
