"""Bayesian optimisation with a Gaussian process."""

from ift_tune.compare.arms.base import BaselineArm

ARM = BaselineArm("gp", "Gaussian process with log expected improvement", sampler="gp")
