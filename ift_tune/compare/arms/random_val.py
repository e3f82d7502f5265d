"""Random search that trains on the validation examples too: what IFT must beat to be worth it."""

from ift_tune.compare.arms.base import PlainArm

ARM = PlainArm(
    "random+val",
    "random search; its trainings use the validation examples as further training data",
    sampler="random",
    pooled=True,
)
