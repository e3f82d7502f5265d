"""How the laws of a family are gone through, and the laws that more than one family has."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeAlias, TypeVar

import torch

from ift_tune.base.errors import CheckFailedError, IFTTuneError
from ift_tune.base.views import View, pack, unpack

Case = TypeVar("Case")

Laws: TypeAlias = Mapping[str, Callable[[Case], None]]
"""What each law says, in a sentence, and what checks it: raises a `CheckFailedError` if broken."""

MOST_NUMBERS = 20  # of a summary: each is a column of the tables
MOST_BYTES = 400_000  # of all views: they travel in the tables


def require(holds: bool, text: str) -> None:
    """Raise a `CheckFailedError` with a text unless something holds."""
    if not holds:
        raise CheckFailedError(text)


def check_laws(who: str, laws: Laws[Case], make: Callable[[], Case]) -> None:
    """Check every law, each on a case of its own, and list all that are broken.

    Args:
        who: What is checked, for the error.
        laws: The laws.
        make: Makes a case, always the same. What it raises goes through.

    Raises:
        CheckFailedError: If a law is broken; the message names it.
    """
    broken: list[str] = []
    cause: Exception | None = None
    # The caller's random numbers go on as if nothing had been checked.
    with torch.random.fork_rng(devices=[]):
        for law, check in laws.items():
            case = make()
            try:
                check(case)
            except IFTTuneError as error:  # CheckFailedError too
                broken.append(f"  - {law}: {error}")
            except Exception as error:  # noqa: BLE001  (it is the cause of what is raised)
                broken.append(f"  - {law}: raises {type(error).__name__}: {error}")
                cause = cause or error
    if broken:
        head = f"{who} breaks what holds for its family:"
        raise CheckFailedError("\n".join([head, *broken])) from cause


def require_numbers(summary: Mapping[str, float], *, most: int = MOST_NUMBERS) -> None:
    """Raise a `CheckFailedError` unless these are a few finite named numbers."""
    require(0 < len(summary) <= most, f"summary() gives {len(summary)} numbers, not 1 to {most}")
    for name, value in summary.items():
        require(
            isinstance(name, str) and type(value) is float and math.isfinite(value),
            f"summary() gives {name!r}: {value!r}, not a finite float by a name",
        )


def require_words(words: str) -> None:
    """Raise a `CheckFailedError` unless this is a sentence that a text can go on after."""
    holds = isinstance(words, str) and words.strip() == words != "" and "\n" not in words
    require(holds and not words.endswith("."), f"words() gives {words!r}, not a line without stop")


def require_views(views: list[View]) -> None:
    """Raise a `CheckFailedError` unless pictures are finite, detached, on the CPU and small."""
    for view in views:
        for field in fields(view):
            value = getattr(view, field.name)
            for numbers in value.values() if isinstance(value, Mapping) else [value]:
                if hasattr(numbers, "shape"):
                    _require_plain(f"{field.name} of the picture {view.title!r}", numbers)
    packed = pack(views)
    require(
        [view.title for view in unpack(packed)] == [view.title for view in views],
        "pictures are lost where a run directory keeps them",
    )
    require(len(packed) <= MOST_BYTES, f"pictures take {len(packed)} of {MOST_BYTES} bytes")


def _require_plain(what: str, numbers: Any) -> None:
    tensor = torch.as_tensor(numbers)  # an array, or a tensor still
    require(not tensor.requires_grad, f"{what} have a graph: detach them")
    require(tensor.device.type == "cpu", f"{what} are on {tensor.device}, not on the CPU")
    require(bool(torch.isfinite(tensor).all()), f"{what} are not all finite")
