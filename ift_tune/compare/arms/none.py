"""No search."""

from ift_tune.compare.arms.base import PlainArm

ARM = PlainArm("none", "no search: one training with hyperparameters as the task has them")
