"""Which exceptions are faults of the environment: those that a system has raised, and no others."""

from __future__ import annotations

from pathlib import Path

import pytest

from ift_tune.base.errors import EnvironmentFaultError
from ift_tune.base.faults import fault_of
from ift_tune.base.files import reading


def wrapped(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("unable to write: errno = 28, error message = 'No space left on device'"),
        RuntimeError("cannot share memory: Too many open files (24)"),
        wrapped(ValueError("a loader died"), OSError(24, "Too many open files")),
    ],
)
def test_what_the_system_refuses_is_one_however_it_is_wrapped(error: Exception) -> None:
    assert fault_of("training", error) is not None


@pytest.mark.parametrize(
    "error",
    [
        ValueError("the upload was refused: File too large"),
        ValueError("No such device: cuda:9"),
        FileNotFoundError(2, "No such file or directory"),
        KeyError("errno 28 of 1000"[:5]),
    ],
)
def test_a_mistake_that_sounds_like_one_is_none(error: Exception) -> None:
    assert fault_of("training", error) is None


def test_causes_in_a_circle_come_to_an_end() -> None:
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    assert fault_of("training", one) is None


def test_what_was_handled_and_hidden_is_no_cause() -> None:
    error = ValueError("mine")
    error.__context__, error.__suppress_context__ = OSError(28, "No space left on device"), True
    assert fault_of("training", error) is None


def test_a_file_that_may_not_be_read_is_not_damaged(tmp_path: Path) -> None:
    refused = pytest.raises(EnvironmentFaultError, match=r"steps\.csv cannot be read \(Permission")
    with refused, reading(tmp_path / "steps.csv"):
        raise PermissionError(13, "Permission denied")
