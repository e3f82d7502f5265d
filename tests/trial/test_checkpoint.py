"""Checkpoints: atomic, versioned, and data only."""

from __future__ import annotations

import math
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from ift_tune.base.checkpoints import (
    FORMAT,
    fingerprint,
    load_checkpoint,
    save_checkpoint,
)
from ift_tune.base.errors import CheckpointError
from ift_tune.base.files import write_atomically

STATE: dict[str, Any] = {
    "tensor": torch.tensor([0.1, math.pi, math.inf], dtype=torch.float64),
    "float": 0.1 + 0.2,
    "none": None,
    "nested": {"list": [1, (2, "three")], "ordered": OrderedDict(a=True)},
}


def _saved(folder: Path) -> Path:
    path = folder / "checkpoint.pt"
    save_checkpoint(path, STATE)
    return path


def test_a_state_comes_back_to_the_bit(tmp_path: Path) -> None:
    found = load_checkpoint(_saved(tmp_path))
    assert torch.equal(found.pop("tensor"), STATE["tensor"])
    assert found == {k: v for k, v in STATE.items() if k != "tensor"}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_the_old_checkpoint_survives_a_state_that_cannot_be_saved(tmp_path: Path) -> None:
    path = _saved(tmp_path)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        save_checkpoint(path, {"tensor": torch.zeros(3), "code": lambda: None})
    assert torch.equal(load_checkpoint(path)["tensor"], STATE["tensor"])


def test_the_old_checkpoint_survives_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _saved(tmp_path)

    def half(content: Any, target: BinaryIO) -> None:
        target.write(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(path, {"tensor": torch.zeros(3)})
    assert torch.equal(load_checkpoint(path)["tensor"], STATE["tensor"])


def test_an_atomic_write_leaves_the_old_content_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.csv"
    write_atomically(path, b"old")
    with monkeypatch.context() as patch:

        def fail(_descriptor: int) -> None:
            raise OSError("no space left on device")

        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="no space left"):
            write_atomically(path, b"a much longer new content")
    assert path.read_bytes() == b"old"
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.3, 0.5, 0.9, 0.999])
def test_a_file_cut_short_is_refused(kept: float, tmp_path: Path) -> None:
    path = _saved(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt cannot be read"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "content", [b"", b"a", b".", b"]b", b"hello\n", b"step,loss\n1,0.5\n", b"\x80\x02.", b"PK"]
)
def test_a_file_of_anything_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "content",
    [
        {"format": FORMAT + 1, "state": {}},
        {"state": {}},
        {"model": 1},
        [1, 2],
        torch.zeros(2),
        None,
    ],
)
def test_another_format_is_refused(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=f"reads format {FORMAT}"):
        load_checkpoint(path)


class _Code:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("plain_pickle", [False, True])
def test_code_in_a_checkpoint_is_never_run(plain_pickle: bool, tmp_path: Path) -> None:
    path, victim = tmp_path / "checkpoint.pt", tmp_path / "executed"
    content = {"format": FORMAT, "state": {"code": _Code(victim)}}
    if plain_pickle:
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    assert not victim.exists()


def test_the_error_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="delete it to start that trial again"):
        load_checkpoint(path)


# The hash of tensors


def test_equal_values_have_one_fingerprint() -> None:
    values = torch.arange(6.0).reshape(2, 3)
    parameter = torch.nn.Parameter(values.clone())
    transposed = values.T.contiguous().T
    assert not transposed.is_contiguous()
    assert fingerprint([values]) == fingerprint([parameter]) == fingerprint([transposed])
    assert torch.equal(values, torch.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize(
    "other",
    [
        [torch.tensor([1.0, math.nextafter(2.0, 3.0)], dtype=torch.float64), torch.tensor(3)],
        [torch.tensor([2.0, 1.0], dtype=torch.float64), torch.tensor(3)],
        [torch.tensor(3), torch.tensor([1.0, 2.0], dtype=torch.float64)],
        [torch.tensor([1.0, 2.0]), torch.tensor(3)],
        [torch.tensor([1.0, 2.0], dtype=torch.float64)],
        [torch.tensor([1.0, math.nan], dtype=torch.float64), torch.tensor(3)],
        [],
    ],
    ids=["last bit", "order in one", "order", "type", "fewer", "nan", "none"],
)
def test_other_values_have_another_fingerprint(other: list[torch.Tensor]) -> None:
    mine = [torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor(3)]
    assert fingerprint(mine) == fingerprint([t.clone() for t in mine])
    assert fingerprint(mine) != fingerprint(other)


def test_a_checkpoint_keeps_the_fingerprint(tmp_path: Path) -> None:
    tensors = [torch.tensor([math.nan, -0.0, math.inf]), torch.zeros(0), torch.tensor(True)]
    save_checkpoint(tmp_path / "c.pt", {"tensors": tensors})
    assert fingerprint(load_checkpoint(tmp_path / "c.pt")["tensors"]) == fingerprint(tensors)
