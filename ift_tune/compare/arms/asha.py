"""Early stopping of random trials."""

from ift_tune.compare.arms.base import PlainArm

ARM = PlainArm(
    "asha",
    "random search with asynchronous successive halving",
    sampler="random",
    pruner="asha",
)
