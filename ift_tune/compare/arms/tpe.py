"""Bayesian optimisation with Parzen estimators."""

from ift_tune.compare.arms.base import BaselineArm

ARM = BaselineArm("tpe", "tree-structured Parzen estimator", sampler="tpe")
