"""An evolution strategy."""

from ift_tune.compare.arms.base import BaselineArm

ARM = BaselineArm("cmaes", "CMA-ES, an evolution strategy", sampler="cmaes")
