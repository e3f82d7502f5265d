"""Oracles shipped to users: a check of any problem, and problems whose answer is known.

Example:
    >>> from ift_tune import testing
    >>> problem = testing.Quadratic(seed=0)
    >>> testing.check_hypergradient(problem).passed
    True
"""

from ift_tune.testing.check import CheckReport, Comparison, check_hypergradient
from ift_tune.testing.problems import Quadratic, random_spd

__all__ = ["CheckReport", "Comparison", "Quadratic", "check_hypergradient", "random_spd"]
