"""Whether kinds of hyperparameters have been made of the model that a problem trains."""

from __future__ import annotations

from torch import nn

from ift_tune.base.errors import UsageError

_SHOWN = 3  # parameters that an error names


def refuse_other_models(model: nn.Module, hyper: nn.Module) -> None:
    """Refuse a kind that has been made of another model than the problem's.

    λ of a decay, say, belongs to the weights of one model one by one: to those of another it would
    be given by their places. A copy of the model has the same weights in the same places.

    Args:
        model: That of the problem.
        hyper: Its hyperparameters: a kind, or what holds some.

    Raises:
        UsageError: If there is such a kind.
    """
    for kind in hyper.modules():
        source = getattr(kind, "made_of", None)
        if isinstance(source, nn.Module) and not _stands_for(source, model):
            raise UsageError(
                f"{type(kind).__name__} must be made of the model that the problem trains, or of a "
                f"part of it: make it of problem.model, which has {_told(model)}, got one of a "
                f"model with {_told(source)}"
            )


def _stands_for(source: nn.Module, model: nn.Module) -> bool:
    """Return whether a module is in a model, shares weights with it, or is a copy of it."""
    if any(part is source for part in model.modules()):
        return True
    own = {id(parameter) for parameter in model.parameters()}
    return any(id(p) in own for p in source.parameters()) or _form(source) == _form(model)


def _form(module: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(p.shape)) for name, p in module.named_parameters()]


def _told(module: nn.Module) -> str:
    form = _form(module)
    more = f" and {len(form) - _SHOWN} more" if len(form) > _SHOWN else ""
    return ", ".join(f"{name} {shape}" for name, shape in form[:_SHOWN]) + more
