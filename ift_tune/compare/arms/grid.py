"""Grid search."""

from ift_tune.compare.arms.base import BaselineArm

ARM = BaselineArm(
    "grid", "a grid of decays and inner learning rates, in random order", sampler="grid"
)
