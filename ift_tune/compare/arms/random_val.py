"""Random search that trains on the validation examples too: what IFT must beat to be worth it."""

from ift_tune.compare.arms.base import BaselineArm

ARM = BaselineArm(
    "random+val",
    "random search; its trainings use the validation examples as further training data",
    sampler="random",
    train_on_val=True,
)
