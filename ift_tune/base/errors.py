"""What users are told: the error tree, checks of arguments, missing libraries, renamed names."""

from __future__ import annotations

import difflib
import importlib
import math
import numbers
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from types import ModuleType
from typing import Any


class IFTTuneError(Exception):
    """Base of every error this package raises on purpose.

    Example:
        >>> import ift_tune
        >>> try:
        ...     ift_tune.Budget(outer_steps=0)
        ... except ift_tune.IFTTuneError as error:
        ...     print(error)
        outer_steps must be an integer of at least 1, got 0
    """


class UsageError(IFTTuneError, ValueError):
    """The call cannot mean anything: a wrong value, name, shape or combination.

    Example:
        >>> import ift_tune
        >>> ift_tune.MetaConfig.from_flat({"tems": 3})
        Traceback (most recent call last):
        ...
        ift_tune.base.errors.UsageError: tems is not a meta-hyperparameter; did you mean 'terms'?
    """


class UnreachableHyperparameterError(UsageError):
    """Some hyperparameters influence neither the gradient of the training loss nor the val loss.

    Attributes:
        names: Those of the hyperparameters.
    """

    def __init__(
        self,
        names: Collection[str],
        mend: str = "Use every hyperparameter in the training loss (or its penalty) without "
        ".detach() or .item(), or leave it to the outer search",
    ) -> None:
        """Name them, and say what to do."""
        self.names, self._mend = tuple(names), mend
        super().__init__(
            f"{', '.join(self.names)}: the gradient of the training loss does not depend on "
            f"{'it' if len(self.names) == 1 else 'them'}. {mend}"
        )

    def __reduce__(
        self,
    ) -> tuple[type[UnreachableHyperparameterError], tuple[tuple[str, ...], str]]:
        """Travel between processes by the names."""
        return type(self), (self.names, self._mend)


class MissingSettingError(UsageError, KeyError):
    """A problem factory asks for a setting of the user's own that was not given."""

    __str__ = Exception.__str__  # a KeyError shows the repr of its message


class StartCheckError(UsageError):
    """The check at the start of a run found a loss or a derivative that is not what it seems.

    Example:
        >>> import torch, ift_tune
        >>> class Hasty(ift_tune.testing.Quadratic):  # its second derivative is half the true one
        ...     def train_loss(self, batch):
        ...         return 0.5 * (super().train_loss(batch) + super().train_loss(batch).detach())
        >>> ift_tune.JointOptimizer(Hasty(), ift_tune.MetaConfig()).step()
        Traceback (most recent call last):
        ...
        ift_tune.base.errors.StartCheckError: the gradient of the training loss is not its ...
    """


class RunExistsError(UsageError, FileExistsError):
    """The run directory holds a run already."""


class DataNotFoundError(UsageError, FileNotFoundError):
    """A task's data set is not where it was looked for."""


class MissingDependencyError(IFTTuneError, ImportError):
    """An optional library is not installed; the message names the extra that brings it.

    Example:
        >>> from ift_tune.base.errors import require
        >>> require("no_such_library", extra="report", what="a figure")
        Traceback (most recent call last):
        ...
        ift_tune.base.errors.MissingDependencyError: a figure needs no_such_library: pip install ...
    """


class DoubleBackwardError(IFTTuneError, RuntimeError):
    """An operation in the training loss has no second derivative, or PyTorch's is wrong.

    Example:
        >>> import torch, ift_tune
        >>> model = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 1))
        >>> hyper = torch.zeros((), requires_grad=True)
        >>> def loss():
        ...     return hyper.exp() * model(torch.ones(1, 2)).square().sum()
        >>> with ift_tune.safe_kernels(model):
        ...     inside = loss()
        >>> _ = ift_tune.hypergradient(inside, inside, model, [hyper])
        >>> ift_tune.hypergradient(loss(), loss(), model, [hyper])
        Traceback (most recent call last):
        ift_tune.base.errors.DoubleBackwardError: the training loss uses weight_norm's kernel ...
    """


class NonFiniteError(IFTTuneError, ArithmeticError):
    """A loss is infinite or NaN: the weights are lost, and going on would only waste time."""


class CheckpointError(IFTTuneError, RuntimeError):
    """A checkpoint is damaged, of another version, or of another problem."""


class WorkerError(IFTTuneError, RuntimeError):
    """A process that ran trials failed or died; the message holds its traceback or exit status."""


class Interrupted(IFTTuneError):
    """The user asked to stop; everything is saved and can be resumed."""


class EnvironmentFaultError(Interrupted, OSError):
    """The environment let go: a full disk, a lost folder, too many open files.

    Nobody's code is wrong: the trial is interrupted, not failed, and what was written is valid.

    Example:
        >>> from ift_tune.base.files import write_atomically
        >>> from pathlib import Path
        >>> write_atomically(Path("runs/that/is/gone/table.csv"), b"")
        Traceback (most recent call last):
        ift_tune.base.errors.EnvironmentFaultError: ...table.csv cannot be written (No such file ...
    """


class CheckFailedError(IFTTuneError, AssertionError):
    """`testing.check_hypergradient` found a hypergradient that is not the true one."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name closest to `name`, else all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


_LARGEST = 2**63


def require_integer(name: str, value: object, least: int) -> None:
    """Raise a `UsageError` unless `value` is an integer, NumPy's too, of at least `least`."""
    if isinstance(value, numbers.Integral) and int(value) >= _LARGEST:
        raise UsageError(f"{name} must be below 2**63, as tables hold it, got {value!r}")
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise UsageError(f"{name} must be an integer of at least {least}, got {value!r}")


def require_number(
    name: str, value: object, *, above: float | None = None, least: float | None = None
) -> None:
    """Raise a `UsageError` unless `value` is a finite number above, or at least, a bound."""
    bound = f"above {above:g}" if above is not None else f"of at least {least:g}"
    if (
        isinstance(value, bool)
        or not isinstance(value, numbers.Real)
        or not _is_finite(value)
        or (above is not None and value <= above)
        or (least is not None and value < least)
    ):
        raise UsageError(f"{name} must be a finite number {bound}, got {value!r}")


def _is_finite(value: numbers.Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def require(module: str, *, extra: str, what: str) -> ModuleType:
    """Import a module of an optional library.

    Args:
        module: Its dotted name, of the library or of one of ours that needs it.
        extra: The extra of this package that brings it.
        what: What needs it, for the error: the subject of "... needs matplotlib".

    Raises:
        MissingDependencyError: If a library is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        library = (error.name or module).partition(".")[0]
        raise MissingDependencyError(
            f"{what} needs {library}: pip install 'ift_tune[{extra}]'"
        ) from error


def renamed(old: str, new: str, *, stacklevel: int = 3) -> None:
    """Warn, at the caller's caller by default, that a public name has been replaced."""
    warnings.warn(f"{old} is now {new}", DeprecationWarning, stacklevel=stacklevel)


def renamed_method(
    old: str,
    new: str | Callable[..., Any],
    keywords: Mapping[str, str] | None = None,
) -> Callable[..., Any]:
    """Return a method that warns and calls the one that has replaced it.

    A class keeps an old name by ``knobs = renamed_method("knobs", "coarse_space")``.

    Args:
        old: The old name.
        new: The new one, looked up on the instance; or the function itself, where subclasses may
            override the old name and call ``super().knobs()``.
        keywords: The present name of each keyword that had another.
    """
    name = new if isinstance(new, str) else new.__name__
    now = keywords or {}

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        renamed(f"{type(self).__name__}.{old}", name)
        given = {now.get(k, k): value for k, value in kwargs.items()}
        if isinstance(new, str):
            return getattr(self, new)(*args, **given)
        return new(self, *args, **given)

    method.__name__ = method.__qualname__ = old
    method.__doc__ = f"Deprecated: use `{name}`."
    return method


def lazy_names(
    module: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return a package's ``__getattr__`` and ``__dir__``, which load names when they are asked for.

    Args:
        module: The package, its ``__name__``.
        homes: The module of each name.
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return getattr(importlib.import_module(homes[name]), name)

    def names() -> list[str]:
        return sorted({*vars(sys.modules[module]), *homes})

    return load, names
