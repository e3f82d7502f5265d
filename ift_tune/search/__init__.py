"""The outer search: a space of meta-hyperparameters, and what drives its trials."""

from ift_tune.search.space import Choice, Float, Int, MetaSpace
from ift_tune.trial.trial import ProblemFactory, Trial

__all__ = ["Choice", "Float", "Int", "MetaSpace", "ProblemFactory", "Trial"]
