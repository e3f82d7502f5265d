"""IFT as it comes."""

from ift_tune.compare.arms.base import JointArm

ARM = JointArm("ift", "IFT with the task's defaults, in one run that takes the whole budget")
