"""IFT inside, a search outside."""

from ift_tune.compare.arms.base import JointArm

ARM = JointArm(
    "ift+tpe",
    "IFT, its meta-hyperparameters searched by TPE; every trial is charged",
    sampler="tpe",
)
