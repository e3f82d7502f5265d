"""Bayesian optimisation with a Gaussian process."""

from ift_tune.compare.arms.base import PlainArm

ARM = PlainArm("gp", "Gaussian process with log expected improvement", sampler="gp")
