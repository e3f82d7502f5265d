"""Random search."""

from ift_tune.compare.arms.base import BaselineArm

ARM = BaselineArm("random", "random search", sampler="random")
