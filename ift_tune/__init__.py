"""Hyperparameter optimisation in two layers: IFT inside each trial, a black-box search outside.

The flat public API. ``import ift_tune`` imports no other library: each name is loaded from its
home when it is first used (PEP 562), so a command that does not train does not wait for PyTorch,
and Optuna, Ray, Matplotlib and torchvision need not be installed by those who do not use them.
"""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING, Any

from ift_tune.base.errors import renamed, require

if TYPE_CHECKING:  # what type checkers and editors see; a test holds it equal to `_HOMES`
    from ift_tune import tasks, testing
    from ift_tune.base.errors import (
        DoubleBackwardError,
        IFTTuneError,
        MissingDependencyError,
        StartCheckError,
        UsageError,
    )
    from ift_tune.base.status import SolveStatus, StopReason
    from ift_tune.compare.comparison import Comparison
    from ift_tune.compare.run import run_comparison
    from ift_tune.hyper import (
        AdapterScale,
        AffineColorAugmentation,
        AugmentationNetwork,
        ClassWeights,
        CoarseParameter,
        Compose,
        DistilledData,
        DomainWeights,
        DropoutRates,
        DropoutSite,
        ExampleScorer,
        ExampleWeights,
        HyperKind,
        L1Decay,
        LabelSmoothing,
        LossMixture,
        PositionWeights,
        WeightDecay,
    )
    from ift_tune.hyper.supervised import (
        ClassificationProblem,
        RegressionProblem,
        SupervisedProblem,
    )
    from ift_tune.implicit.curvature import GaussNewton, Hessian, largest_eigenvalue
    from ift_tune.implicit.double_backward import safe_kernels
    from ift_tune.implicit.hypergradient import (
        Hypergradient,
        WarmStart,
        hypergradient,
        unrolled_hypergradient,
    )
    from ift_tune.implicit.inverse import (
        ConjugateGradient,
        Dense,
        Identity,
        Inverse,
        Neumann,
        Nystrom,
    )
    from ift_tune.implicit.penalty import Penalty
    from ift_tune.implicit.preconditioner import (
        DiagonalPreconditioner,
        NoPreconditioner,
        Preconditioner,
    )
    from ift_tune.joint.budget import Budget
    from ift_tune.joint.callbacks import Callback
    from ift_tune.joint.config import MetaConfig
    from ift_tune.joint.joint import JointOptimizer
    from ift_tune.problem.batches import Batches
    from ift_tune.problem.collating import IndexedCollator, IndexedDataset
    from ift_tune.problem.features import cached_features
    from ift_tune.problem.problem import BilevelProblem, Splits
    from ift_tune.report import write_report
    from ift_tune.report.audit import audit
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
    from ift_tune.search.space import Choice, Float, Int, MetaSpace
    from ift_tune.search.study import run_study
    from ift_tune.trial.best import load_best
    from ift_tune.trial.progress import Progress
    from ift_tune.trial.refit import refit
    from ift_tune.trial.session import run_single
    from ift_tune.trial.tables import RunDirectory, load_results
    from ift_tune.trial.trial import Trial

    Status = SolveStatus
    Knob = CoarseParameter
    __version__: str

_KINDS = (
    *("AdapterScale", "AffineColorAugmentation", "AugmentationNetwork", "ClassWeights"),
    *("CoarseParameter", "Compose", "DistilledData", "DomainWeights", "DropoutRates"),
    *("DropoutSite",),
    *("ExampleScorer", "ExampleWeights", "HyperKind", "L1Decay", "LabelSmoothing"),
    *("LossMixture", "PositionWeights", "WeightDecay"),
)
_PROBLEMS = ("ClassificationProblem", "RegressionProblem", "SupervisedProblem")
_HYPERGRADIENTS = ("Hypergradient", "WarmStart", "hypergradient", "unrolled_hypergradient")
_INVERSES = ("ConjugateGradient", "Dense", "Identity", "Inverse", "Neumann", "Nystrom")
_PRECONDITIONERS = ("DiagonalPreconditioner", "NoPreconditioner", "Preconditioner")
_ERRORS = (
    *("DoubleBackwardError", "IFTTuneError", "MissingDependencyError"),
    *("StartCheckError", "UsageError"),
)
_RAY = (
    *("DivergenceStopper", "IFTTrainable", "TablesCallback", "ray_function", "ray_trainable"),
    *("recommended_run_config", "run_ray"),
)
_HOMES: dict[str, tuple[str, str | None]] = {
    name: (f"ift_tune.{home}", extra)
    for home, extra, names in (
        ("base.errors", None, _ERRORS),
        ("base.status", None, ("SolveStatus", "StopReason")),
        ("compare.comparison", "compare", ("Comparison",)),
        ("compare.run", "compare", ("run_comparison",)),
        ("hyper", None, _KINDS),
        ("hyper.supervised", None, _PROBLEMS),
        ("implicit.curvature", None, ("GaussNewton", "Hessian", "largest_eigenvalue")),
        ("implicit.double_backward", None, ("safe_kernels",)),
        ("implicit.hypergradient", None, _HYPERGRADIENTS),
        ("implicit.inverse", None, _INVERSES),
        ("implicit.penalty", None, ("Penalty",)),
        ("implicit.preconditioner", None, _PRECONDITIONERS),
        ("joint.budget", None, ("Budget",)),
        ("joint.callbacks", None, ("Callback",)),
        ("joint.config", None, ("MetaConfig",)),
        ("joint.joint", None, ("JointOptimizer",)),
        ("problem.batches", None, ("Batches",)),
        ("problem.collating", None, ("IndexedCollator", "IndexedDataset")),
        ("problem.features", None, ("cached_features",)),
        ("problem.problem", None, ("BilevelProblem", "Splits")),
        ("report", "report", ("write_report",)),
        ("report.audit", "report", ("audit",)),
        ("search.objective", "optuna", ("IFTObjective",)),
        ("search.ray", "ray", _RAY),
        ("search.space", None, ("Choice", "Float", "Int", "MetaSpace")),
        ("search.study", "optuna", ("run_study",)),
        ("trial.best", None, ("load_best",)),
        ("trial.progress", None, ("Progress",)),
        ("trial.refit", None, ("refit",)),
        ("trial.session", None, ("run_single",)),
        ("trial.tables", None, ("RunDirectory", "load_results")),
        ("trial.trial", None, ("Trial",)),
    )
    for name in names
}
"""Of each name the module that defines it, and the extra that brings what that module needs."""

_SUBMODULES = ("tasks", "testing")
_ROOMS = ("sklearn",)
"""Loaded when asked for, like `_SUBMODULES`, and in no ``import *``: a library has the name."""

_ALIASES = {"Status": "SolveStatus"}
_RENAMED = {"Knob": "CoarseParameter"}
"""Names of before, by the names of now: their use is answered with a `DeprecationWarning`."""

if not TYPE_CHECKING:  # a type checker would take any misspelt name for one that is found here

    def __getattr__(name: str) -> Any:
        """Load a name when it is first asked for.

        Raises:
            MissingDependencyError: If an optional library that it needs is not installed.
            AttributeError: If there is no such name.
        """
        if name in _RENAMED:
            renamed(f"{__name__}.{name}", _RENAMED[name])
            return _load(_RENAMED[name])
        value = _load(_ALIASES.get(name, name))
        globals()[name] = value  # so that it is asked for once
        return value


def _load(name: str) -> Any:
    if name in _SUBMODULES or name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        close = difflib.get_close_matches(name, _HOMES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
    home, extra = _HOMES[name]
    module = require(home, extra=extra, what=name) if extra else importlib.import_module(home)
    return getattr(module, name)


def _version() -> str:
    import importlib.metadata  # reads every distribution's folder: not at each start

    try:
        return importlib.metadata.version(__name__)
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"  # a source tree that was not installed


def __dir__() -> list[str]:
    """Return the names that are loaded and those that are not yet."""
    return sorted({*globals(), *__all__, "__version__"})


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
    "DiagonalPreconditioner",
    "GaussNewton",
    "Hessian",
    "Identity",
    "Inverse",
    "Neumann",
    "NoPreconditioner",
    "Nystrom",
    "Preconditioner",
    "largest_eigenvalue",
    # problems
    "Batches",
    "BilevelProblem",
    "ClassificationProblem",
    "IndexedCollator",
    "IndexedDataset",
    "Penalty",
    "RegressionProblem",
    "Splits",
    "SupervisedProblem",
    "cached_features",
    "tasks",
    # kinds of hyperparameters
    "AdapterScale",
    "AffineColorAugmentation",
    "AugmentationNetwork",
    "ClassWeights",
    "CoarseParameter",
    "Compose",
    "DistilledData",
    "DomainWeights",
    "DropoutRates",
    "DropoutSite",
    "ExampleScorer",
    "ExampleWeights",
    "HyperKind",
    "L1Decay",
    "LabelSmoothing",
    "LossMixture",
    "PositionWeights",
    "WeightDecay",
    # joint optimisation
    "Budget",
    "Callback",
    "JointOptimizer",
    "MetaConfig",
    "Progress",
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
    "refit",
    "run_ray",
    "run_single",
    # comparisons
    "Comparison",
    "run_comparison",
    "write_report",
    # results and checks
    "DoubleBackwardError",
    "IFTTuneError",
    "MissingDependencyError",
    "StartCheckError",
    "UsageError",
    "audit",
    "load_best",
    "RunDirectory",
    "load_results",
    "testing",
]
