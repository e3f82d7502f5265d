"""A state of λ that says what its numbers stand for, and is refused where they stand for others."""

from __future__ import annotations

import abc
import json
import math
from typing import Any

import torch
from torch import Tensor, nn

from ift_tune.base.errors import UsageError

_KEY = "_extra_state"  # what PyTorch calls it, behind the name of the module


class NamedState(nn.Module, abc.ABC):
    """What a kind inherits whose numbers have names in an order that its arguments tell.

    Loaded by another order the numbers would be those of other things, in silence. Nothing is put
    into this kind's order: the moments of λ's optimiser and its warm starts, which a checkpoint
    holds beside it, go by position too.
    """

    @abc.abstractmethod
    def meaning(self) -> dict[str, list[Any]]:
        """Return what each number of λ stands for: its name, and numbers that λ is bounded by."""

    def get_extra_state(self) -> Tensor:
        """Return the meaning as text in a tensor.

        So all of a state are tensors, which whoever copies, compares or writes one relies on.
        """
        text = json.dumps(self.meaning(), ensure_ascii=False)
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Raise a `UsageError` unless a state that is loaded means what this kind means."""
        theirs, own = json.loads(bytes(state.tolist())), self.meaning()
        for what, values in own.items():
            if not _alike(theirs.get(what), values):
                raise UsageError(
                    f"{type(self).__name__}: the state that is loaded must be of the same {what}, "
                    "in the same order: make the kind with those of the state, "
                    f"{theirs.get(what)}, got {values}"
                )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Before any number is loaded; PyTorch asks for it afterwards. States of earlier versions
        # have none, which would be a missing key.
        if (told := state_dict.get(prefix + _KEY)) is not None:
            self.set_extra_state(told)
        else:
            state_dict[prefix + _KEY] = self.get_extra_state()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _alike(theirs: Any, own: list[Any]) -> bool:
    """Return whether names are equal, and numbers but for rounding."""
    if not isinstance(theirs, list) or len(theirs) != len(own):
        return False
    return all(
        math.isclose(one, other, rel_tol=1e-6) if isinstance(other, float) else one == other
        for one, other in zip(theirs, own, strict=True)
    )
