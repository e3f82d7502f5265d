"""The outer search with Ray Tune: trainables, a searcher, a stopper, and our tables."""

from ift_tune.search.ray.cluster import check_room
from ift_tune.search.ray.run import RayResult, run_ray
from ift_tune.search.ray.searcher import StudySearcher
from ift_tune.search.ray.settings import DivergenceStopper, recommended_run_config
from ift_tune.search.ray.tables import TablesCallback
from ift_tune.search.ray.trainable import IFTTrainable, ray_function, ray_trainable

__all__ = [
    "DivergenceStopper",
    "IFTTrainable",
    "RayResult",
    "StudySearcher",
    "TablesCallback",
    "check_room",
    "ray_function",
    "ray_trainable",
    "recommended_run_config",
    "run_ray",
]
