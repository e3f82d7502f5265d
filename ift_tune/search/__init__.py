"""The outer search: a space of meta-hyperparameters, and what drives its trials."""

from typing import TYPE_CHECKING

from ift_tune.base.errors import lazy_names

if TYPE_CHECKING:
    from ift_tune.search.space import Choice, Float, Int, MetaSpace
    from ift_tune.trial.trial import Trial

__getattr__, __dir__ = lazy_names(  # a report needs this package, and no PyTorch
    __name__,
    {
        **dict.fromkeys(("Choice", "Float", "Int", "MetaSpace"), "ift_tune.search.space"),
        "Trial": "ift_tune.trial.trial",
    },
)

__all__ = ["Choice", "Float", "Int", "MetaSpace", "Trial"]
