"""Running statistics of normalisation layers, as the functions of the weights that they are.

In evaluation mode a layer of batch normalisation divides by statistics that are constants to
autograd, though training computes them from activations, and so from the weights. A validation
gradient that holds them constant is the gradient of another function: retrained at another λ, the
network has other statistics. What trains in evaluation mode, or with momentum 0, has statistics
that are constants indeed, and they stay so here.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.overrides import TorchFunctionMode

_log = logging.getLogger(__name__)

# The functions and not the modules: subclasses, layers of other libraries and a user's own end in
# them. Each is told by the name of the argument that asks for the statistics of its inputs.
_FLAGS: Mapping[Callable[..., Any], str] = {
    F.batch_norm: "training",
    F.instance_norm: "use_input_stats",
}
_SIGNATURES = {function: inspect.signature(function) for function in _FLAGS}


class _Call(NamedTuple):
    """A normalisation that moved its running statistics.

    Attributes:
        inputs: Shape (B, C, ...), with their graph.
        momentum: The share of the new statistics.
        over: The dimensions that are averaged at once; others, but for the channels, afterwards.
    """

    inputs: Tensor
    momentum: float
    over: list[int]

    def moments(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the mean and the unbiased variance, shape (C,) each."""
        variance, mean = torch.var_mean(self.inputs.to(dtype), self.over)
        if mean.ndim > 1:  # of each instance: the running statistics are the means over them
            variance, mean = variance.mean(dim=0), mean.mean(dim=0)
        return mean, variance


class RunningStatistics:
    """How the running statistics of a model depend on its weights, seen in a training loss.

    The dependence costs no further pass through the model: the inputs of its normalisations are
    kept from the training loss, and their moments are part of its graph.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from ift_tune.problem.normalisation import RunningStatistics
        >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1, affine=False))
        >>> statistics, rows = RunningStatistics(model), torch.tensor([[1.0], [2.0], [3.0]])
        >>> with statistics.observed():
        ...     _ = model(rows)
        >>> _ = model.eval()
        >>> with statistics.followed():
        ...     model(rows).sum().backward()
    """

    def __init__(self, model: nn.Module) -> None:
        """Know of no statistics yet."""
        self._model = model
        self._calls: dict[str, list[_Call]] = {}

    @contextlib.contextmanager
    def observed(self) -> Iterator[None]:
        """Keep what moves running statistics inside, where the training loss is computed.

        Other buffers that the loss moves are held constant by the validation gradient, and named in
        a warning: of averages of weights, codebooks and the like the dependence is not known.
        """
        before = {name: (b, b._version) for name, b in self._model.named_buffers()}
        if not before:
            yield
            return
        names = {id(buffer): name for name, (buffer, _) in before.items()}
        known = _singular_vectors(self._model)

        def keep(function: Callable[..., Any], given: dict[str, Any]) -> None:
            name = names.get(id(given["running_mean"]))
            if name is None or not given[_FLAGS[function]]:
                return
            known.update((id(given["running_mean"]), id(given["running_var"])))
            if given["momentum"] > 0.0:  # with 0 the statistics are constants, in training too
                inputs = given["input"]
                first = 0 if function is F.batch_norm else 2
                over = [d for d in range(first, inputs.ndim) if d != 1]
                self._calls.setdefault(name, []).append(_Call(inputs, given["momentum"], over))

        with _Normalisations(keep):
            yield
        now = dict(self._model.named_buffers())
        moved = [
            name
            for name, (buffer, version) in before.items()
            if buffer.is_floating_point()
            and id(buffer) not in known
            and (now.get(name) is not buffer or buffer._version != version)
        ]
        if moved:
            _warn_of(", ".join(moved))

    @contextlib.contextmanager
    def followed(self, *, settled: bool = False) -> Iterator[None]:
        """Let evaluation inside, where the validation loss is computed, depend on the weights too.

        Args:
            settled: Whether the values are those of the training batch, where the running
                statistics arrive if the weights stay. Else they are the running statistics
                themselves, and only the derivative is the batch's: what is reported is then the
                loss of the model as it is evaluated, and a small batch adds noise but no bias.
        """
        if not self._calls:
            yield
            return
        names = {id(buffer): name for name, buffer in self._model.named_buffers()}

        def normalise(function: Callable[..., Any], given: dict[str, Any]) -> Tensor | None:
            calls = self._calls.get(names.get(id(given["running_mean"]), ""))
            if calls is None or given[_FLAGS[function]]:
                return None
            running = given["running_mean"], given["running_var"]
            mean, variance = _settled(calls, running[0].dtype)
            if not settled:
                mean = running[0] + (mean - mean.detach())
                variance = running[1] + (variance - variance.detach())
            return _normalised(given, mean, variance)

        with _Normalisations(normalise):
            yield

    @contextlib.contextmanager
    def apart(self) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """Let evaluation inside depend on running statistics as on leaf tensors of their own.

        So no graph of a training loss need be in memory with that of a validation loss: see
        `pulled`.

        Yields:
            The leaf tensors, by the names of the buffers of the means; filled as they are used.
        """
        leaves: dict[str, tuple[Tensor, Tensor]] = {}
        names = {id(buffer): name for name, buffer in self._model.named_buffers()}
        if not names:
            yield leaves
            return

        def normalise(function: Callable[..., Any], given: dict[str, Any]) -> Tensor | None:
            name = names.get(id(given["running_mean"]))
            if name is None or given[_FLAGS[function]]:
                return None
            if name not in leaves:
                values = given["running_mean"], given["running_var"]
                leaves[name] = tuple(v.detach().clone().requires_grad_() for v in values)
            return _normalised(given, *leaves[name])

        with _Normalisations(normalise):
            yield leaves

    def pulled(self, slopes: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor | None:
        """Return the sum of the statistics seen in training, times constants.

        Its gradient is what a validation loss with these slopes by the statistics gains by them.

        Args:
            slopes: By the names of the buffers of the means; others count as zero.

        Returns:
            A scalar with the graph of the training loss; None where no statistics were seen.
        """
        total = None
        for name, (by_mean, by_variance) in slopes.items():
            if (calls := self._calls.get(name)) is None:
                continue  # a constant: it trains in evaluation mode, or with momentum 0
            mean, variance = _settled(calls, by_mean.dtype)
            part = (by_mean * mean).sum() + (by_variance * variance).sum()
            total = part if total is None else total + part
        return total


class _Normalisations(TorchFunctionMode):
    """Shows each normalisation to a function, which may return what takes its result's place."""

    def __init__(self, show: Callable[[Callable[..., Any], dict[str, Any]], Tensor | None]) -> None:
        super().__init__()
        self._show = show

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SIGNATURES:
            given = _SIGNATURES[func].bind(*args, **kwargs)
            given.apply_defaults()
            shown = self._show(func, given.arguments)
            if shown is not None:
                return shown
        return func(*args, **kwargs)


def _settled(calls: list[_Call], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return where the moving average of such calls, over and over, comes to rest."""
    # A layer that is called several times moves as often, and the last call counts most.
    shares, rest = [], 1.0
    for call in reversed(calls):
        shares.append(call.momentum * rest)
        rest *= 1.0 - call.momentum
    moments = [call.moments(dtype) for call in reversed(calls)]
    mean, variance = (
        torch.stack([share / sum(shares) * m for share, m in zip(shares, kind, strict=True)]).sum(0)
        for kind in zip(*moments, strict=True)
    )
    return mean, variance


def _normalised(given: Mapping[str, Any], mean: Tensor, variance: Tensor) -> Tensor:
    """Return what evaluation mode does; PyTorch's kernel has no derivative by the statistics."""
    inputs: Tensor = given["input"]
    shape = [1, -1, *[1] * (inputs.ndim - 2)]
    scale = torch.rsqrt(variance + given["eps"])
    if given["weight"] is not None:
        scale = scale * given["weight"]
    outputs = (inputs - mean.view(shape)) * scale.view(shape)
    if given["bias"] is not None:
        outputs = outputs + given["bias"].view(shape)
    return outputs.to(inputs.dtype)


def _singular_vectors(model: nn.Module) -> set[int]:
    """Return the identities of the buffers of spectral norms.

    They follow the weights as well, but a singular value does not change with them to first order.
    """
    found: set[int] = set()
    for module in model.modules():
        if isinstance(module, _SpectralNorm):
            found.update(id(buffer) for buffer in module.buffers(recurse=False))
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                found.update(id(getattr(module, f"{hook.name}_{side}")) for side in "uv")
    return found


@functools.cache
def _warn_of(names: str) -> None:
    """Say once what the validation gradient misses, and not in every outer step."""
    _log.warning(
        "the training loss moves buffers of the model other than running statistics of "
        "normalisations: %s. The validation gradient takes them for constants; if they follow the "
        "weights, as averages and codebooks do, it misses that part",
        names,
    )
