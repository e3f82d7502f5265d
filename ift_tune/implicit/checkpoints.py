"""Activation checkpoints: what is run again on the way back must be what was run on the way out.

A checkpoint keeps no activations and runs its part of the model again in the backward pass. By then
the contexts around the loss have ended: modes, buffers, hooks and swapped parameters are others.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch.utils.checkpoint
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from ift_tune.base.exclusive import exclusive

Generator = Callable[..., Iterator[None]]
"""How PyTorch runs a checkpoint without reentrance: what comes before and after the function, given
the function, whether random numbers are kept, the maker of its contexts, and the rest."""

_GENERATOR = "_checkpoint_without_reentrant_generator"


@contextlib.contextmanager
def kept_activations() -> Iterator[None]:
    """Let checkpoints inside keep their activations, so that nothing is run again.

    For second derivatives. The graph of the gradient holds the activations in any case, so a
    checkpoint would save little and be run again in every product; one with ``use_reentrant=True``
    has no second derivative, a selective one can be gone through once.
    """

    def plain(_function: object, _preserve: object, context_fn: Any, *_: Any, **__: Any) -> Any:
        forward, _recompute = context_fn()
        with forward:
            yield

    with _checkpointing(plain):
        yield


@contextlib.contextmanager
def repeated_as_called(*roots: nn.Module) -> Iterator[None]:
    """Let checkpoints inside be run again with the modules as they were when they were called.

    For first derivatives, where checkpoints save memory. What the repetition does to the modules,
    as to BatchNorm's running statistics, is undone: the numbers are those without checkpoints. One
    with ``use_reentrant=True`` is made in the other way, which gives the same gradients.

    Args:
        roots: Their submodules too.
    """
    original: Generator = getattr(torch.utils.checkpoint, _GENERATOR)

    def faithful(
        function: object,
        preserve: object,
        context_fn: Callable[[], tuple[AbstractContextManager[object], ...]],
        determinism: object,
        _debug: object,  # has contexts of its own, for longer messages
        *rest: Any,
        **named: Any,
    ) -> Iterator[None]:
        if _is_traced():  # a compiled graph holds what it needs, and cannot hold our contexts
            return original(function, preserve, context_fn, determinism, _debug, *rest, **named)
        states = _ModuleStates(roots)

        def contexts() -> tuple[AbstractContextManager[object], ...]:
            forward, recompute = context_fn()
            return forward, _Nested(states.restored, lambda: recompute)

        return original(function, preserve, contexts, determinism, False, *rest, **named)

    with _checkpointing(faithful):
        yield


@contextlib.contextmanager
def _checkpointing(generator: Generator) -> Iterator[None]:
    # PyTorch has no setting for this. Users hold `checkpoint` itself by name, so what it calls is
    # replaced, for the whole process: of two threads at once, one would put back the other's.
    names = vars(torch.utils.checkpoint)
    with exclusive():
        before = {name: names[name] for name in (_GENERATOR, "CheckpointFunction")}
        names |= {_GENERATOR: generator, "CheckpointFunction": _NotReentrant}
        try:
            yield
        finally:
            names |= before


def _is_traced() -> bool:
    """Return whether a compiler is at work: it runs the checkpoint on tensors without numbers."""
    return "torch._dynamo" in sys.modules and detect_fake_mode() is not None


class _Nested:
    """A context of contexts, to be entered any number of times, as a graph is gone through."""

    def __init__(self, *makers: Callable[[], AbstractContextManager[object]]) -> None:
        self._makers = makers
        self._open: list[contextlib.ExitStack] = []

    def __enter__(self) -> None:
        with contextlib.ExitStack() as stack:
            for make in self._makers:
                stack.enter_context(make())
            self._open.append(stack.pop_all())

    def __exit__(self, *error: Any) -> bool | None:
        return self._open.pop().__exit__(*error)


class _NotReentrant:
    """Stands in for the function behind ``use_reentrant=True``."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=preserve
        )


class _ModuleStates:
    """All attributes of modules at a moment: modes, hooks, buffers, parameters or stand-ins."""

    def __init__(self, roots: tuple[nn.Module, ...]) -> None:
        modules = dict.fromkeys(m for root in roots for m in root.modules())
        self._attributes = [(m, _copy(vars(m))) for m in modules]
        # As they are now: the call itself is about to write into them.
        self._buffers = _cloned([attributes["_buffers"] for _, attributes in self._attributes])

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Give the modules these attributes inside, and afterwards those of before."""
        before = [(m, dict(vars(m))) for m, _ in self._attributes]
        # Copies again, for a graph may be gone through more than once.
        buffers = _cloned(self._buffers)
        try:
            for (module, attributes), own in zip(self._attributes, buffers, strict=True):
                _replace(module, _copy(attributes) | {"_buffers": own})
            yield
        finally:
            for module, attributes in before:
                _replace(module, attributes)


def _copy(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes, with tables of their own."""
    return {k: v.copy() if isinstance(v, dict) else v for k, v in attributes.items()}


def _cloned(tables: list[dict[str, Tensor | None]]) -> list[dict[str, Tensor | None]]:
    # By identity: a buffer that two modules share must stay shared.
    clones = {id(b): b.clone() for table in tables for b in table.values() if b is not None}
    return [{n: None if b is None else clones[id(b)] for n, b in t.items()} for t in tables]


def _replace(module: nn.Module, attributes: dict[str, Any]) -> None:
    # Past nn.Module.__setattr__, which would sort tensors into its own tables.
    vars(module).clear()
    vars(module).update(attributes)
