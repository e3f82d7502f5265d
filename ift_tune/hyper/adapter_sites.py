"""Where a scale acts on an adapter: a LoRA layer's contribution, or what a submodule returns."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ift_tune.base.errors import UsageError
from ift_tune.hyper.adapter_layers import adapter_of, chosen_modules, is_lora
from ift_tune.problem.batches import tensors_of

Scale = Callable[[], Tensor]
"""The scale at the present λ, a scalar."""


class AdapterSite(abc.ABC):
    """A place in a model that is multiplied by a scale at every call, in training and evaluation.

    The scale is in the model by hooks, so that whoever calls the model has it. They hold nothing
    but λ: a copy of model and kind together has hooks of its own.

    Attributes:
        name: Of the module.
        called: Whether a call of the model has come by here. A module whose weights another one
            uses itself is never called, and its scale does nothing.
        reached: Whether what came out then depended on the scale.
    """

    called = reached = False
    packable: ClassVar[bool] = True
    """Says of the hooks that what they do depends on the call and on λ alone."""

    def __init__(self, name: str, module: nn.Module, scale: Scale) -> None:
        """Put the scale into a module, in the place of any that an earlier kind has put there."""
        self.name, self.module, self.scale = name, module, scale
        for site in _sites_of(module):
            site.remove()
        self.install()

    @property
    def acts(self) -> bool:
        """Whether the scale is still there."""
        return self in _sites_of(self.module)

    def remove(self) -> None:
        """Take the scale out of the module."""
        for hooks in (self.module._forward_pre_hooks, self.module._forward_hooks):
            for number in [n for n, hook in hooks.items() if _owner(hook) is self]:
                del hooks[number]
                self.module._forward_hooks_always_called.pop(number, None)

    @abc.abstractmethod
    def install(self) -> None:
        """Register the hooks."""

    @abc.abstractmethod
    def foldable(self) -> list[Tensor]:
        """Return the weights that the scale can be multiplied into, the output is linear in them.

        Raises:
            UsageError: If there are none.
        """


class LoraSite(AdapterSite):
    """The contribution of a LoRA layer: its ``scaling`` is multiplied while it is called."""

    def __init__(self, name: str, module: nn.Module, scale: Scale, adapter: str | None) -> None:
        """Find which adapter of the layer is meant.

        Args:
            name: Of the layer.
            module: The layer.
            scale: Of it.
            adapter: Its key in ``scaling``, where the layer has adapters by name; None for the
                only one.

        Raises:
            UsageError: If it is not there, or there are several, or ``scaling`` is no number.
        """
        self.adapter = adapter_of(name, module, adapter)
        self._own: Any = None
        self._put: Tensor | None = None
        super().__init__(name, module, scale)

    def install(self) -> None:
        """Multiply before each call, and put back what was there after it, whatever happens."""
        self.module.register_forward_pre_hook(self.before)
        self.module.register_forward_hook(self.after, always_call=True)

    def before(self, module: nn.Module, _inputs: Any) -> None:
        """Let the layer find the scaled number.

        Raises:
            UsageError: If the layer has been merged into its base, where no scale reaches it.
        """
        if getattr(module, "merged", False):
            raise UsageError(
                f"{self.name} must not be merged while a scale acts on it: unmerge it, with "
                "merge_weights=False where it merges in evaluation mode, or call fold() before "
                "merging; got merged weights"
            )
        present = self.scaling
        # After a call that ended in a KeyboardInterrupt, the scaled number is still there.
        if self._put is None or present is not self._put:
            self._own = present
        self._put = self._own * self.scale()
        self._set(self._put)

    def after(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        """Put the layer's own number back."""
        if self._put is not None:
            self._set(self._own)
            self.called = self.called or output is not None  # None where it has raised
            # An adapter that is switched off, or not the active one, is not multiplied by anything.
            if not self.reached and self._put.requires_grad:
                self.reached = _depends(output, self._put)
            self._own = self._put = None

    @property
    def scaling(self) -> Any:
        """The number by which the layer multiplies this adapter's contribution now."""
        found: Any = self.module.scaling
        return found if self.adapter is None else found[self.adapter]

    def _set(self, value: Any) -> None:
        if self.adapter is None:
            self.module.scaling = value
        else:
            scalings: Any = self.module.scaling
            scalings[self.adapter] = value

    def alpha(self, rank: int, scale: float) -> float:
        """Return the alpha by which a layer of this rank would multiply as this one does."""
        stable: Any = getattr(self.module, "use_rslora", False)
        if isinstance(stable, Mapping):
            stable = stable.get(self.adapter, False)
        return float(self.scaling) * scale * (math.sqrt(rank) if stable else rank)

    def foldable(self) -> list[Tensor]:
        """Return the second factor, and its bias if it has one.

        Raises:
            UsageError: If it is no linear layer.
        """
        second = self._factor()
        return (
            [second]
            if isinstance(second, Tensor)
            else _linear(f"the lora_B of {self.name}", second)
        )

    def _factor(self) -> Any:
        """Return the second factor, B: a module or a tensor."""
        for name in ("lora_B", "lora_embedding_B"):
            found: Any = getattr(self.module, name, None)
            if self.adapter is None and found is not None:
                return found
            if found is not None and self.adapter in found:
                return found[self.adapter]
        raise UsageError(f"{self.name} must have a lora_B of its adapter, got none")


class OutputSite(AdapterSite):
    """What a submodule returns; of a tuple, the first."""

    def install(self) -> None:
        """Multiply after each call."""
        self.module.register_forward_hook(self.multiplied)

    def multiplied(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        """Return the output, scaled.

        Raises:
            UsageError: If it is no tensor.
        """
        first, *rest = output if isinstance(output, tuple) else (output,)
        if not isinstance(first, Tensor):
            raise UsageError(
                f"{self.name} must return a tensor to be scaled: name a submodule that does, got "
                f"a {type(first).__name__}"
            )
        scaled = first * self.scale()
        self.called = self.reached = True
        return (scaled, *rest) if isinstance(output, tuple) else scaled

    def foldable(self) -> list[Tensor]:
        """Return weight and bias of a linear layer or a convolution, or of the last in a sequence.

        Raises:
            UsageError: If the module is something else.
        """
        last: nn.Module = self.module
        # A block that is a Sequential with a forward of its own may add its inputs, or what not.
        while isinstance(last, nn.Sequential) and _is_plain(last) and len(last):
            last = last[-1]
        return _linear(self.name, last)


def find_sites(
    model: nn.Module,
    modules: str | Sequence[str] | None,
    adapter: str | None,
    scale: Callable[[int], Scale],
) -> list[AdapterSite]:
    """Put a scale on each of the adapters of a model.

    Args:
        model: Any.
        modules: Which; see `chosen_modules`.
        adapter: Which of the adapters of a layer; see `LoraSite`.
        scale: That of each site, by its number.

    Raises:
        UsageError: If there are none.
    """
    chosen = chosen_modules(model, modules)
    for name, module in chosen.items():  # all of them are looked at before the first is changed
        if is_lora(module):
            adapter_of(name, module, adapter)
    found: list[AdapterSite] = []
    for number, (name, module) in enumerate(chosen.items()):
        if is_lora(module):
            found.append(LoraSite(name, module, scale(number), adapter))
        else:
            found.append(OutputSite(name, module, scale(number)))
    return found


def _linear(name: str, module: Any) -> list[Tensor]:
    """Return weight and bias of a plain linear layer or convolution.

    Raises:
        UsageError: If it is something else: the output may not be linear in what else it has.
    """
    if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and _is_plain(module):
        own = dict(module.named_parameters())
        if "weight" in own and set(own) <= {"weight", "bias"}:
            return list(own.values())
    raise UsageError(
        f"{name} must end in a plain linear layer or a convolution for a scale to be folded into "
        f"it: keep the kind beside the model instead, got a {type(module).__name__}"
    )


def _is_plain(module: nn.Module) -> bool:
    """Return whether a module does what PyTorch says: no forward of a subclass is in the way."""
    return type(module).forward.__module__.startswith("torch.nn.")


def _depends(output: Any, scaled: Tensor) -> bool:
    """Return whether a call has made its output from the scaled number, by its graph."""
    start = scaled.grad_fn
    if start is None or torch.compiler.is_compiling():
        return True  # it cannot be told, and is taken on trust
    earliest, seen = start._sequence_nr(), set()
    waiting = [t.grad_fn for t in tensors_of(output) if t.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node is start:
            return True
        # What was there before the call cannot lead to it: so only the call's own graph is walked.
        if node not in seen and node._sequence_nr() >= earliest:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions if following is not None]
    return False


def _owner(hook: Any) -> Any:
    return getattr(hook, "__self__", None)


def _sites_of(module: nn.Module) -> list[AdapterSite]:
    """Return the sites whose hooks a module has."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    owners = [owner for hook in hooks if isinstance(owner := _owner(hook), AdapterSite)]
    return list({id(owner): owner for owner in owners}.values())
