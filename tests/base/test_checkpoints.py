"""A checkpoint is loaded as it was saved or refused by name, whatever has happened to the file."""

from __future__ import annotations

import itertools
import logging
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from ift_tune.base.checkpoints import (
    drop_generations,
    generations,
    load_checkpoint,
    load_latest,
    previous,
    save_checkpoint,
)
from ift_tune.base.errors import CheckpointError

STATE: dict[str, Any] = {
    "weights": torch.randn(40, 5, generator=torch.Generator().manual_seed(0)),
    "odd": torch.arange(7, dtype=torch.int8),
    "steps": 12,
    "words": ["a", ("b", None)],
}


def is_the_state(found: dict[str, Any]) -> bool:
    return found.keys() == STATE.keys() and all(
        torch.equal(found[k], v) if isinstance(v, torch.Tensor) else found[k] == v
        for k, v in STATE.items()
    )


def loaded_right(path: Path) -> bool:
    """Return whether a file is loaded as it was saved; False if it is refused by name."""
    try:
        found = load_checkpoint(path)
    except CheckpointError as error:
        return str(path) not in str(error)
    assert is_the_state(found)
    return True


@pytest.mark.parametrize("part", range(4))
def test_a_flipped_bit_is_never_loaded(part: int, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, STATE)
    content = path.read_bytes()
    generator = random.Random(part)
    bits = 8 * len(content)
    # At random, and each bit of the end, where the digest stands.
    flips = [generator.randrange(bits) for _ in range(150)]
    flips += range(bits - 8 * 75 + part, bits, 4)
    for bit in flips:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        assert not loaded_right(path), bit


def test_every_length_of_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, STATE)
    content = path.read_bytes()
    for length in {*range(0, len(content), 31), *range(len(content) - 60, len(content))}:
        path.write_bytes(content[:length])
        assert not loaded_right(path), length
    path.write_bytes(content + b"more")
    assert not loaded_right(path)


def test_a_block_of_zeros_is_refused(tmp_path: Path) -> None:
    """As a power cut leaves it, where a file system has the length and not the content."""
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, STATE)
    content = path.read_bytes()
    for start in range(0, len(content) - 64, 64):
        if any(content[start : start + 64]):
            path.write_bytes(content[:start] + bytes(64) + content[start + 64 :])
            assert not loaded_right(path), start


def test_the_file_is_an_ordinary_one_of_pytorch(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, STATE)
    for mmap in (False, True):
        assert is_the_state(torch.load(path, weights_only=True, mmap=mmap)["state"])
    assert zipfile.ZipFile(path).testzip() is None


def test_files_of_before_there_was_a_digest_are_read_and_their_checksums_hold(
    tmp_path: Path,
) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save({"format": 2, "state": STATE}, path)
    assert loaded_right(path)
    content = path.read_bytes()
    values = STATE["weights"].numpy().tobytes()
    place = content.index(values)
    for offset in range(0, len(values), 97):
        damaged = bytearray(content)
        damaged[place + offset] ^= 4
        path.write_bytes(damaged)
        assert not loaded_right(path)


def test_the_generation_before_stands_in_for_a_damaged_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "checkpoint.pt"
    for step in range(3):
        save_checkpoint(path, {"step": step}, generations=True)
    assert generations(path) == [path, previous(path)]
    got: list[int] = []

    def load(file: Path) -> None:
        got.append(load_checkpoint(file)["step"])

    assert load_latest(path, load) == path
    path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        assert load_latest(path, load) == previous(path)
    assert got == [2, 1]
    assert f"{path} cannot be read" in caplog.text
    path.unlink()  # killed between the two renamings
    assert load_latest(path, load) == previous(path)
    previous(path).write_bytes(b"")
    with pytest.raises(CheckpointError, match="delete it to start that trial again"):
        load_latest(path, load)
    drop_generations(path)
    assert load_latest(path, load) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("first", "second"), [*itertools.product([1, 2], repeat=2)])
def test_writes_of_any_length_have_the_same_digest(first: int, second: int, tmp_path: Path) -> None:
    """The digest leaves out the last two bytes, however they arrive."""
    from ift_tune.base.checkpoints import _Signed

    whole = bytes(range(50))
    with (tmp_path / "file").open("wb") as raw:
        one, other = _Signed(raw), _Signed(raw)
        one.write(whole)
        other.write(whole[: -first - second])
        other.write(whole[-first - second : -second])
        other.write(whole[-second:])
    assert one.digest() == other.digest()
