"""Where dropout acts: the outputs of a submodule, or the entries of a parameter."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from ift_tune.base.errors import UsageError, nearest

Factors: TypeAlias = Callable[[Sequence[int]], Tensor]
"""``factors(shape)``: fresh random factors of a shape that the rates broadcast to, each about 0
or about 1/(1 − p)."""


@dataclass(frozen=True)
class DropoutSite:
    """How the outputs of a submodule, or a parameter, are dropped.

    Attributes:
        per: What has a rate of its own. Of a submodule: the whole ``"site"``, or each ``"unit"``
            of the outputs' last dimension. Of a parameter: the ``"site"``, each ``"row"`` of the
            first dimension, or each ``"weight"``.
        shared: Whether what is dropped is dropped together. Of a submodule: a unit at all places
            of a sequence, for outputs (B, places, ..., units): variational or locked dropout. Of
            a parameter: whole rows; of an embedding matrix they are words (both Gal and
            Ghahramani 2016, "A theoretically grounded application of dropout in RNNs").
        units: Size of the outputs' last dimension, for ``per="unit"`` where the submodule does
            not tell; 0 asks it.

    Example:
        >>> import torch, ift_tune
        >>> lstm = torch.nn.LSTM(5, 4, batch_first=True)
        >>> model = torch.nn.ModuleDict({"lstm": lstm})
        >>> outputs = ift_tune.DropoutSite("unit", shared=True)  # one mask for a whole sequence
        >>> weights = ift_tune.DropoutSite("weight")  # DropConnect on the recurrent weights
        >>> ift_tune.DropoutRates(model, {"lstm": outputs, "lstm.weight_hh_l0": weights}).count
        70
    """

    per: Literal["site", "unit", "row", "weight"] = "site"
    shared: bool = False
    units: int = 0


@dataclass(frozen=True)
class Place(abc.ABC):
    """A site found in a model. It keeps names only, so a copied model can take the model's place.

    Attributes:
        name: Of the submodule or parameter.
        site: How it is dropped.
    """

    name: str
    site: DropoutSite

    @abc.abstractmethod
    def shape(self, model: nn.Module) -> tuple[int, ...]:
        """Return the shape of the rates, which broadcasts to what is dropped.

        Raises:
            UsageError: If the site asks for what this place does not have.
        """

    @abc.abstractmethod
    def dropping(self, model: nn.Module, factors: Factors) -> AbstractContextManager[None]:
        """Return a context in which the model runs with factors at this place."""

    def _refuse_other_than(self, *allowed: str) -> None:
        if self.site.per not in allowed:
            raise UsageError(
                f"{self.name}: per must be {' or '.join(map(repr, allowed))} here, "
                f"got {self.site.per!r}"
            )


class Outputs(Place):
    """The outputs of a submodule; of a tuple, as recurrent layers return it, the first."""

    def shape(self, model: nn.Module) -> tuple[int, ...]:
        """Return (), or (units,)."""
        self._refuse_other_than("site", "unit")
        module = model.get_submodule(self.name)
        if self.site.shared and getattr(module, "batch_first", True) is False:
            raise UsageError(f"{self.name}: a shared mask needs outputs with batch_first=True")
        if self.site.per == "site":
            return ()
        units = self.site.units or _units(module)
        if not units:
            raise UsageError(
                f"{self.name}: a {type(module).__name__} does not tell how many units it has: "
                "give DropoutSite(per='unit', units=...)"
            )
        return (units,)

    @contextlib.contextmanager
    def dropping(self, model: nn.Module, factors: Factors) -> Iterator[None]:
        """Multiply what the submodule returns, with fresh factors at every call."""
        (units,) = self.shape(model) or (0,)

        def drop(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            first, *rest = output if isinstance(output, tuple) else (output,)
            if not isinstance(first, Tensor) or (units and first.shape[-1:] != (units,)):
                found = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
                wanted = f"a tensor whose last dimension is {units}" if units else "a tensor"
                raise UsageError(f"{self.name}: dropout needs {wanted}, got {found}")
            shape: Sequence[int] = first.shape
            # A mask is a draw of the weights, and these are the same at all places of a sequence
            # (Gal and Ghahramani 2016): so it is broadcast along them.
            if self.site.shared and first.ndim > 2:
                shape = (shape[0], *[1] * (first.ndim - 2), shape[-1])
            dropped = first * factors(shape)
            return (dropped, *rest) if isinstance(output, tuple) else dropped

        handle = model.get_submodule(self.name).register_forward_hook(drop)
        try:
            yield
        finally:
            handle.remove()


class Entries(Place):
    """The entries of a parameter: DropConnect (Wan et al. 2013)."""

    def shape(self, model: nn.Module) -> tuple[int, ...]:
        """Return (), (rows, 1, ...), or the parameter's own shape."""
        self._refuse_other_than("site", "row", *(() if self.site.shared else ("weight",)))
        shape = tuple(model.get_parameter(self.name).shape)
        return {"site": (), "row": _rows(shape), "weight": shape}[self.site.per]

    @contextlib.contextmanager
    def dropping(self, model: nn.Module, factors: Factors) -> Iterator[None]:
        """Let a product stand in for the parameter, or for what now stands in for it.

        Inside `torch.func.functional_call` that is a tensor, not a parameter. ``get_parameter``
        and ``nn.Module.__setattr__`` refuse those, hence the module's own table.
        """
        path, _, leaf = self.name.rpartition(".")
        owner = model.get_submodule(path)
        weight: Tensor = getattr(owner, leaf)
        shape = _rows(weight.shape) if self.site.shared else weight.shape
        try:
            _put(owner, leaf, weight * factors(shape))
            yield
        finally:
            _put(owner, leaf, weight)


def find(model: nn.Module, name: str, site: DropoutSite) -> Place:
    """Return the submodule or parameter of that name as a place of dropout.

    Raises:
        UsageError: If there is none; the nearest name is given.
    """
    modules = [path for path, _ in model.named_modules() if path]
    parameters = [path for path, _ in model.named_parameters(remove_duplicate=False)]
    if name in parameters:
        return Entries(name, site)
    if name in modules:
        return Outputs(name, site)
    raise UsageError(
        f"the model has no submodule or parameter {name!r}{nearest(name, modules + parameters)}"
    )


def _units(module: nn.Module) -> int:
    """Return the size of the last dimension of a module's outputs; 0 if it is not known."""
    if isinstance(module, nn.RNNBase):
        return (module.proj_size or module.hidden_size) * (1 + module.bidirectional)
    for attribute in ("out_features", "embedding_dim"):
        if hasattr(module, attribute):
            return int(getattr(module, attribute))
    return 0


def _rows(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of one number for each row."""
    return (*shape[:1], *[1] * (len(shape) - 1))


def _put(owner: nn.Module, leaf: str, weight: Tensor) -> None:
    """Make a tensor the parameter `leaf`, in its place in the order."""
    owner._parameters[leaf] = weight  # type: ignore[assignment]
    if isinstance(owner, nn.RNNBase):
        owner._init_flat_weights()  # its own list of its weights; a stale one cannot be deep-copied
