"""Hyperparameter optimisation in two layers: IFT inside each trial, a black-box search outside.

The flat public API. Neither Optuna nor Ray nor torchvision is imported before it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ift_tune import tasks, testing
from ift_tune.base.errors import IFTTuneError, MissingDependencyError, UsageError
from ift_tune.base.imports import renamed
from ift_tune.base.status import SolveStatus, StopReason
from ift_tune.hyper import (
    AffineColorAugmentation,
    AugmentationNetwork,
    ClassWeights,
    CoarseParameter,
    Compose,
    DistilledData,
    DropoutRates,
    DropoutSite,
    ExampleWeights,
    HyperKind,
    L1Decay,
    LabelSmoothing,
    LossMixture,
    WeightDecay,
)
from ift_tune.hyper.supervised import ClassificationProblem, RegressionProblem
from ift_tune.implicit.curvature import GaussNewton, Hessian, largest_eigenvalue
from ift_tune.implicit.double_backward import safe_kernels
from ift_tune.implicit.hypergradient import Hypergradient, WarmStart, hypergradient
from ift_tune.implicit.inverse import ConjugateGradient, Dense, Identity, Inverse, Neumann, Nystrom
from ift_tune.implicit.penalty import Penalty
from ift_tune.implicit.unrolled import unrolled_hypergradient
from ift_tune.joint.callbacks import Callback
from ift_tune.joint.config import Budget, MetaConfig
from ift_tune.joint.joint import JointOptimizer
from ift_tune.problem.batches import Batches
from ift_tune.problem.problem import BilevelProblem, Splits
from ift_tune.search.space import Choice, Float, Int, MetaSpace
from ift_tune.trial.tables import load_results
from ift_tune.trial.trial import Trial

if TYPE_CHECKING:
    from ift_tune.compare.comparison import Comparison
    from ift_tune.compare.run import run_comparison
    from ift_tune.report import write_report
    from ift_tune.search.objective import IFTObjective
    from ift_tune.search.ray import (
        DivergenceStopper,
        IFTTrainable,
        TablesCallback,
        ray_function,
        ray_trainable,
        recommended_run_config,
        run_ray,
    )
    from ift_tune.search.study import run_study

Status = SolveStatus  # its name before there was a `TrialStatus`

_RAY = (
    *("DivergenceStopper", "IFTTrainable", "TablesCallback"),
    *("ray_function", "ray_trainable", "recommended_run_config", "run_ray"),
)
_RENAMED = {"Knob": "CoarseParameter"}
_LAZY = {
    "IFTObjective": ("ift_tune.search.objective", "optuna"),
    "run_study": ("ift_tune.search.study", "optuna"),
    **dict.fromkeys(_RAY, ("ift_tune.search.ray", "ray")),
    "Comparison": ("ift_tune.compare.comparison", "compare"),
    "run_comparison": ("ift_tune.compare.run", "compare"),
    "write_report": ("ift_tune.report", "report"),
}


def __getattr__(name: str) -> Any:
    """Load an adapter when it is first asked for.

    Raises:
        MissingDependencyError: If its library is not installed.
        AttributeError: If there is no such name.
    """
    if name in _RENAMED:
        renamed(name, _RENAMED[name])
        return globals()[_RENAMED[name]]
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home, extra = _LAZY[name]
    try:
        module = importlib.import_module(home)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"{name} needs {error.name}: pip install 'ift_tune[{extra}]'"
        ) from error
    return getattr(module, name)


__all__ = [
    # the core
    "Hypergradient",
    "SolveStatus",
    "Status",
    "WarmStart",
    "hypergradient",
    "safe_kernels",
    "unrolled_hypergradient",
    # inverses and curvature
    "ConjugateGradient",
    "Dense",
    "GaussNewton",
    "Hessian",
    "Identity",
    "Inverse",
    "Neumann",
    "Nystrom",
    "largest_eigenvalue",
    # problems
    "Batches",
    "BilevelProblem",
    "ClassificationProblem",
    "Penalty",
    "RegressionProblem",
    "Splits",
    "tasks",
    # kinds of hyperparameters
    "AffineColorAugmentation",
    "AugmentationNetwork",
    "ClassWeights",
    "Compose",
    "DistilledData",
    "DropoutRates",
    "DropoutSite",
    "ExampleWeights",
    "HyperKind",
    "CoarseParameter",
    "L1Decay",
    "LabelSmoothing",
    "LossMixture",
    "WeightDecay",
    # joint optimisation
    "Budget",
    "Callback",
    "JointOptimizer",
    "MetaConfig",
    # the outer search
    "Choice",
    "Float",
    "IFTObjective",
    "Int",
    "MetaSpace",
    "StopReason",
    "Trial",
    "run_study",
    # with Ray Tune
    "DivergenceStopper",
    "IFTTrainable",
    "TablesCallback",
    "ray_function",
    "ray_trainable",
    "recommended_run_config",
    "run_ray",
    # comparisons
    "Comparison",
    "run_comparison",
    "write_report",
    # results and checks
    "IFTTuneError",
    "UsageError",
    "load_results",
    "testing",
]
