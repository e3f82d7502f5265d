"""An evolution strategy."""

from ift_tune.compare.arms.base import PlainArm

ARM = PlainArm("cmaes", "CMA-ES, an evolution strategy", sampler="cmaes")
