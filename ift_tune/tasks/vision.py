"""The one place that imports torchvision.

torchvision's Linux wheel is built for CUDA. Beside a CPU build of PyTorch its compiled operators do
not load, and `import torchvision` then fails with "operator torchvision::nms does not exist",
because it registers shape functions for two operators that are not there. Declaring those two
schemas first is enough for its datasets, models and transforms; the operators themselves stay
unusable, and nothing here calls them.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from ift_tune.base.errors import require

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[torch.library.Library] = []  # keeps the declarations alive


def torchvision_part(name: str) -> ModuleType:
    """Return a part of torchvision, whatever build of PyTorch it stands beside.

    Args:
        name: The submodule: ``"datasets"``, ``"models"`` or ``"transforms"``.

    Raises:
        MissingDependencyError: If torchvision is not installed.
    """
    try:
        return require(f"torchvision.{name}", extra="vision", what="this task")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for operator in ("nms", "qnms"):
        library.define(operator + _SCHEMA)  # type: ignore[no-untyped-call]
    _declared.append(library)
    return importlib.import_module(f"torchvision.{name}")
