"""The outer search: a space of meta-hyperparameters, and what drives its trials."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ift_tune.search.space import Choice, Float, Int, MetaSpace
    from ift_tune.trial.trial import Trial

_HOMES = {
    **dict.fromkeys(("Choice", "Float", "Int", "MetaSpace"), "ift_tune.search.space"),
    "Trial": "ift_tune.trial.trial",
}

__all__ = ["Choice", "Float", "Int", "MetaSpace", "Trial"]


def __getattr__(name: str) -> Any:
    """Load a name when it is asked for: the report needs this package, and no PyTorch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the names that are loaded when they are asked for."""
    return sorted([*globals(), *_HOMES])
