"""Grid search."""

from ift_tune.compare.arms.base import PlainArm

ARM = PlainArm("grid", "a grid of decays and inner learning rates, in random order", sampler="grid")
