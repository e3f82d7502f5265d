"""A frozen part of a model at work: it neither trains nor draws nor mixes, or it is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ift_tune.base.errors import UsageError
from ift_tune.base.randomness import RandomStream
from ift_tune.problem.batches import tensors_of, to_device
from ift_tune.problem.modes import preserved_buffers
from ift_tune.problem.outputs import call_model

_CLOSE = {"rtol": 1e-3, "atol": 1e-4}  # kernels may sum in another order for other batch sizes
_DROPOUTS = (nn.modules.dropout._DropoutNd, nn.RReLU)


class FrozenPart:
    """A module whose features of an example are the same at each call.

    What modules say of themselves is looked at when it is made, and the rest at its first batch.
    """

    def __init__(self, backbone: nn.Module) -> None:
        """Take the module.

        Raises:
            UsageError: If it says that it trains, is random or mixes the examples of a batch.
        """
        _require_frozen(backbone)
        self.backbone = backbone
        self._looked = False

    def features(self, inputs: Any) -> Tensor:
        """Return the features of a batch, on the device of the backbone.

        Raises:
            UsageError: If they are not what may be kept.
        """
        device = _device(self.backbone)
        inputs = inputs if device is None else to_device(inputs, device)
        if not self._looked:
            self._look(inputs)
            self._looked = True
        with torch.no_grad(), preserved_buffers(self.backbone):
            return self._call(inputs)

    def _call(self, inputs: Any) -> Tensor:
        """Return what the backbone makes of inputs.

        Raises:
            UsageError: If it is not one tensor with a row for each example.
        """
        try:
            labels: Mapping[str, Any] | None = {} if isinstance(inputs, Mapping) else None
            found = call_model(self.backbone, inputs, labels).outputs
        except UsageError as error:
            raise UsageError(
                f"the backbone must return its features as one tensor: wrap it in a module that "
                f"picks it; {error}"
            ) from error
        if found is None or not found.ndim:
            raise UsageError(
                "the backbone must return a row of features for each example, got a single number"
            )
        return found

    def _look(self, inputs: Any) -> None:
        """Look at the first batch for what the modules do not tell.

        Raises:
            UsageError: If features have a gradient, are random, or depend on the rest of the batch.
        """
        device = next((t.device for t in tensors_of(inputs)), torch.device("cpu"))
        found: list[Tensor] = []
        for seed in (0, 1):
            drawn = RandomStream(seed, device).aside()
            with torch.enable_grad(), preserved_buffers(self.backbone), drawn:
                found.append(self._call(inputs))
        if found[0].requires_grad:
            raise UsageError(
                "features that are kept must not depend on anything that is learned: leave "
                "adapters and scales out of the frozen part, got features with a gradient"
            )
        if not torch.allclose(found[0], found[1], equal_nan=True, **_CLOSE):
            raise UsageError(
                "features that are kept must be the same at each call: call backbone.eval() and "
                "leave out what draws random numbers, got other features of the same inputs"
            )
        half = len(found[0]) // 2
        rows = _first(inputs, len(found[0]), half) if half else None
        if rows is not None:
            with torch.no_grad(), preserved_buffers(self.backbone):
                alone = self._call(rows)
            same = alone.shape == found[0][:half].shape
            if not same or not torch.allclose(alone, found[0][:half], equal_nan=True, **_CLOSE):
                raise UsageError(
                    "features that are kept must be those of each example by itself: call "
                    "backbone.eval(), got other features of an example in another batch"
                )


def _first(inputs: Any, rows: int, half: int) -> Any:
    """Return the first rows of inputs; None where it cannot be told what a row is."""
    if isinstance(inputs, Tensor):
        return inputs[:half] if inputs.ndim and len(inputs) == rows else None
    if not isinstance(inputs, Mapping):
        return None
    if any(isinstance(v, Tensor) and v.shape[:1] != (rows,) for v in inputs.values()):
        return None
    return {k: v[:half] if isinstance(v, Tensor) else v for k, v in inputs.items()}


def _device(module: nn.Module) -> torch.device | None:
    """Return where a module is; None if it has no tensors."""
    return next((t.device for t in (*module.parameters(), *module.buffers())), None)


def _require_frozen(backbone: nn.Module) -> None:
    """Raise a `UsageError` if a module says that it trains, is random or mixes the examples."""
    trained = [name for name, p in backbone.named_parameters() if p.requires_grad]
    if trained:
        raise UsageError(
            "the backbone must be frozen for its features to be kept: call "
            "backbone.requires_grad_(False), or leave what is trained out of it, got "
            f"{len(trained)} trained tensors such as {trained[0]}"
        )
    for name, module in backbone.named_modules():
        if not module.training:
            continue
        dropping = isinstance(module, _DROPOUTS) and getattr(module, "p", 1.0) > 0.0
        between = isinstance(module, nn.RNNBase) and module.dropout > 0.0
        mixing = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if dropping or between or mixing:
            what = "statistics of the batch" if mixing else "dropout"
            raise UsageError(
                f"the backbone must be in evaluation mode for its features to be kept: call "
                f"backbone.eval(), got {what} in {name or 'it'}, a {type(module).__name__}"
            )
