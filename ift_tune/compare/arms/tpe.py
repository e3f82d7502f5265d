"""Bayesian optimisation with Parzen estimators."""

from ift_tune.compare.arms.base import PlainArm

ARM = PlainArm("tpe", "tree-structured Parzen estimator", sampler="tpe")
