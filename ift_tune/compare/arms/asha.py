"""Early stopping of random trials."""

from ift_tune.compare.arms.base import BaselineArm

ARM = BaselineArm(
    "asha",
    "random search with asynchronous successive halving",
    sampler="random",
    pruner="asha",
)
