"""The outer search: a space of meta-hyperparameters, one `Trial`, and adapters that drive it."""

from ift_tune.search.distributions import Choice, Float, Int
from ift_tune.search.runner import Interrupted, Listener, Outcome, run_trial
from ift_tune.search.space import MetaSpace
from ift_tune.search.trial import ProblemFactory, Trial

__all__ = [
    "Choice",
    "Float",
    "Int",
    "Interrupted",
    "Listener",
    "MetaSpace",
    "Outcome",
    "ProblemFactory",
    "Trial",
    "run_trial",
]
