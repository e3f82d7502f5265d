"""No search."""

from ift_tune.compare.arms.base import BaselineArm

ARM = BaselineArm("none", "no search: one training with hyperparameters as the task has them")
