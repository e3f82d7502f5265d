"""Which module or operation may be behind a wrong second derivative, by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.weight_norm import WeightNorm

from ift_tune.implicit.hidden_curvature import WRONG_KERNELS, graph_nodes, is_checkpointed

_LOW_PRECISION = (torch.bfloat16, torch.float16)


def name_culprits(loss: Tensor, model: nn.Module) -> list[str]:
    """Return what lies on the way to a loss and may make autograd's products differ from it.

    For the words of an error, once a product *has* been found wrong: much of it is harmless in
    most models. A hook on a tensor inside the model leaves no trace that could be read.

    Args:
        loss: With its graph.
        model: Whose modules and parameters are named.

    Returns:
        A phrase for each, the likeliest first; none where nothing suspicious is found.

    Example:
        >>> import torch
        >>> from ift_tune.implicit.culprits import name_culprits
        >>> class Cube(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         ctx.x = x.detach()
        ...         return x**3
        ...     @staticmethod
        ...     def backward(ctx, gradient):
        ...         return 3 * ctx.x**2 * gradient
        >>> model = torch.nn.Linear(2, 1)
        >>> name_culprits(Cube.apply(model(torch.ones(1, 2))).sum(), model)
        ['the custom function Cube: its backward must differentiate by what save_for_backward kept']
    """
    nodes = list(graph_nodes(loss))
    found = [
        *_kernels(nodes, model),
        *_custom_functions(nodes),
        *_hooks(model),
        *_signs(model),
        *_checkpoints(nodes),
        *_precision(nodes),
    ]
    return list(dict.fromkeys(found))


def _kernels(nodes: Iterable[Any], model: nn.Module) -> Iterator[str]:
    for kernel in sorted({n.name() for n in nodes} & set(WRONG_KERNELS)):
        where = [name for name, m in model.named_modules() if _has_weight_norm(m)]
        place = f" of {', '.join(where)}" if where and "WeightNorm" in kernel else ""
        yield (
            f"{WRONG_KERNELS[kernel]}{place}: compute the losses inside `ift_tune.safe_kernels()`"
        )


def _has_weight_norm(module: nn.Module) -> bool:
    """Return whether a module's weight is normalised, in the old form or as a parametrisation."""
    if any(isinstance(hook, WeightNorm) for hook in module._forward_pre_hooks.values()):
        return True
    # The parametrisation's class is private: its name is all there is.
    return parametrize.is_parametrized(module) and any(
        type(p).__name__ == "_WeightNorm"
        for chain in module.parametrizations.values()  # type: ignore[operator]
        for p in chain
    )


def _custom_functions(nodes: Iterable[Any]) -> Iterator[str]:
    for node in nodes:
        function = getattr(node, "_forward_cls", None)
        # PyTorch's own that mark a module's backward hooks pass gradients on as they are.
        if function is None or function.__module__.startswith("torch."):
            continue
        yield (
            f"the custom function {function.__name__}: its backward must differentiate by what "
            "save_for_backward kept"
        )


def _hooks(model: nn.Module) -> Iterator[str]:
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks:
            yield (
                f"a gradient hook on {name}: it acts on every product with the Hessian too; change "
                "gradients in the optimiser"
            )
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            yield f"a hook on {name} after its gradient is accumulated: it may move the weight"
    for name, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            yield (
                f"a backward hook of {name or 'the model'} ({type(module).__name__}): it acts on "
                "every product with the Hessian too"
            )


def _signs(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        # Householder reflections end in signs, and they are kept on the weight's diagonal.
        if type(module).__name__ == "_Orthogonal" and "householder" in str(
            getattr(module, "orthogonal_map", "")
        ):
            yield (
                f"orthogonal with householder at {name}: its diagonal holds signs, and jumps; "
                "orthogonal_map='cayley' is smooth"
            )


def _checkpoints(nodes: Iterable[Any]) -> Iterator[str]:
    if any(is_checkpointed(node) for node in nodes):
        yield (
            "an activation checkpoint: it runs its part of the model again in every product, in "
            "whatever mode the model is then; compute the losses inside `ift_tune.safe_kernels()`"
        )


def _precision(nodes: Iterable[Any]) -> Iterator[str]:
    for node in nodes:
        for entry in getattr(node, "_input_metadata", ()):
            if entry.dtype in _LOW_PRECISION:
                yield (
                    f"values in {str(entry.dtype).removeprefix('torch.')}, as under autocast: "
                    "differences below a hundredth are rounding"
                )
                return
