"""What is an adapter in a model: LoRA layers told by their form, and submodules that are named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from ift_tune.base.arguments import require_list
from ift_tune.base.errors import UsageError, nearest

_LORA = ("lora_A", "lora_B", "scaling")
_PEFT = "base_model.model."  # what peft puts before the names of the model that it was given
_FORM = "modules with lora_A, lora_B and scaling"


def label_of(name: str) -> str:
    """Return a module's name as the model has it that was given to peft."""
    return name.rpartition(_PEFT)[2]


def is_lora(module: nn.Module) -> bool:
    """Return whether a module is a LoRA layer: peft's, loralib's, or any of that form."""
    return all(hasattr(module, name) for name in _LORA)


def chosen_modules(model: nn.Module, modules: str | Sequence[str] | None) -> dict[str, nn.Module]:
    """Return the submodules that are meant, in the model's order.

    Args:
        model: Any.
        modules: Names of submodules, or patterns of them; None for all LoRA layers. A pattern means
            the LoRA layers that it fits; one that fits none means any submodules.

    Raises:
        UsageError: If there are none.
    """
    every = {name: module for name, module in model.named_modules() if name}
    lora = [name for name, module in every.items() if is_lora(module)]
    if modules is None:
        if not lora:
            raise UsageError(
                f"the model must have LoRA layers ({_FORM}) to be scaled: add them first, or name "
                "the submodules to be scaled in modules=, got a model without"
            )
        return {name: every[name] for name in lora}
    chosen: set[str] = set()
    named_ones = [modules] if isinstance(modules, str) else modules
    for entry in require_list("modules", named_ones, "names of submodules"):
        fitting = [name for name in every if fnmatchcase(name, str(entry))]
        if entry in every:
            chosen.add(entry)
        elif fitting:
            chosen |= set(fitting) & set(lora) or set(fitting)
        else:
            raise UsageError(
                f"modules must name submodules of the model, or be patterns of their names, got "
                f"{entry!r}{nearest(str(entry), every)}"
            )
    if not chosen:
        raise UsageError("modules must name at least one submodule, got none")
    return {name: module for name, module in every.items() if name in chosen}


def adapter_of(name: str, module: nn.Module, adapter: str | None) -> str | None:
    """Return the key of the adapter in the layer's ``scaling``; None where that is a number.

    Raises:
        UsageError: If it cannot be told, or is not a number.
    """
    scaling: Any = module.scaling
    if isinstance(scaling, Mapping):
        known = list(scaling)
        if adapter is None and len(known) != 1:
            raise UsageError(
                f"adapter must say which of {', '.join(map(repr, known)) or 'no adapters'} is "
                f"scaled in {name}: give adapter=, got None"
            )
        key = known[0] if adapter is None else adapter
        if key not in scaling:
            raise UsageError(
                f"adapter must be one of those of {name}, {', '.join(map(repr, known))}, got "
                f"{adapter!r}"
            )
        scaling = scaling[key]
    else:
        key = None
        if adapter is not None:
            raise UsageError(
                f"adapter must be left out where layers have one without a name, as {name} has, "
                f"got {adapter!r}"
            )
    plain = isinstance(scaling, Tensor) and scaling.numel() == 1 and not scaling.requires_grad
    if not plain and (isinstance(scaling, bool) or not isinstance(scaling, int | float)):
        kind = type(scaling).__name__
        raise UsageError(
            f"the scaling of {name} must be a number, by which its forward multiplies the "
            f"adapter's contribution: make it one, got a {kind}"
        )
    return key
