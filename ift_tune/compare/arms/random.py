"""Random search."""

from ift_tune.compare.arms.base import PlainArm

ARM = PlainArm("random", "random search", sampler="random")
