"""What is an adapter in a model: LoRA layers told by their form, and submodules that are named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from ift_tune.base.arguments import require_list
from ift_tune.base.errors import UsageError, nearest

_FACTORS = ("lora_A", "lora_B")
_PART = "lora_"  # what the names of an adapter's tensors in a layer begin with
_PEFT = "base_model.model."  # what peft puts before the names of the model that it was given
_FORM = "modules with lora_A, lora_B and scaling"


def labels_of(names: Iterable[str]) -> list[str]:
    """Return modules' names as the model has them that was given to peft.

    Where two would then have the same, as of two such models in one, all names are left as they
    are.
    """
    names = list(names)
    found = [name.rpartition(_PEFT)[2] for name in names]
    return found if len(set(found)) == len(set(names)) else names


def is_lora(module: nn.Module) -> bool:
    """Return whether a module is a LoRA layer: peft's, loralib's, or any of that form."""
    return _has_factors(module) and hasattr(module, "scaling")


def _has_factors(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in _FACTORS)


def owners_of(model: nn.Module, parameters: Iterable[str]) -> list[str]:
    """Return the name of the module that each parameter is part of: of an adapter, the LoRA layer.

    The modules tell which are LoRA layers, not their names: a block may call one ``lora_q``. A
    layer with both factors is one here, whatever it multiplies their product by.

    Args:
        model: Any.
        parameters: Names of parameters of it.
    """
    # Modules that are there twice too: a parameter is named by the first of its own names.
    every = model.named_modules(remove_duplicate=False)
    layers = {name for name, module in every if _has_factors(module)}
    return [_owner_of(parameter.split("."), layers) for parameter in parameters]


def _owner_of(path: Sequence[str], layers: set[str]) -> str:
    for depth in range(len(path) - 1, -1, -1):  # from the inside: what a layer wraps may be one too
        if path[depth].startswith(_PART) and (name := ".".join(path[:depth])) in layers:
            return name
    return ".".join(path[:-1])


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
