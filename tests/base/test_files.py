"""Files with a digest: read back as they were, or refused by name; older ones are read too."""

from __future__ import annotations

import errno
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ift_tune import UsageError
from ift_tune.base.errors import EnvironmentFaultError
from ift_tune.base.files import (
    fleeting,
    parquet_bytes,
    read_json,
    read_parquet,
    reading,
    signed_json,
    write_atomically,
)

CONTENT = {"seed": 3, "lr": 0.1 + 0.2, "words": "λ", "nested": {"none": None, "list": [1, 2.0]}}


def table() -> pd.DataFrame:
    made = pd.DataFrame(
        {"step": pd.array([1, 2, None], dtype="Int64"), "loss": [0.1, 0.2, 0.3], "arm": ["a"] * 3}
    )
    made.attrs = {"run": {"task": "toy"}}
    return made


def read_or_refusal(read: Callable[[Path], Any], path: Path) -> Any:
    """Return what is read, or the message with which it is refused."""
    try:
        return read(path)
    except UsageError as error:
        return str(error)


def test_a_file_is_on_the_disk_before_its_name_and_the_name_too_unless_it_is_fleeting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut could leave a name without its content."""
    seen: list[bool] = []
    path = tmp_path / "table.csv"
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(path.exists()))
    write_atomically(path, b"1")
    assert seen == [False, True]
    with fleeting():
        write_atomically(path, b"2")
    assert seen == [False, True]
    assert path.read_bytes() == b"2"


def test_json_is_read_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(signed_json(CONTENT))
    assert read_json(path) == CONTENT
    path.write_text(json.dumps(json.loads(path.read_text())))  # by another program, on one line
    assert read_json(path) == CONTENT
    path.write_text(json.dumps(CONTENT))  # of an earlier version
    assert read_json(path) == CONTENT


def test_every_flipped_bit_of_a_json_file_is_harmless_or_noticed(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    whole = signed_json(CONTENT)
    noticed = 0
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1 << (position % 8)
        path.write_bytes(changed)
        found = read_or_refusal(read_json, path)
        noticed += isinstance(found, str)
        assert str(path) in found if isinstance(found, str) else found == CONTENT
    assert noticed > len(whole) // 2


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "\0" * 64, "[" * 100_000])
def test_what_is_no_json_of_ours_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UsageError, match=r"run\.json is damaged: put a copy of it in its place"):
        read_json(tmp_path / "run.json")


def test_parquet_is_read_by_everybody(tmp_path: Path) -> None:
    path = tmp_path / "trials.parquet"
    path.write_bytes(parquet_bytes(table()))
    for found in (read_parquet(path), pd.read_parquet(path)):
        pd.testing.assert_frame_equal(found, table())
        assert found.attrs == table().attrs
    table().to_parquet(path)  # of an earlier version
    pd.testing.assert_frame_equal(read_parquet(path), table())


def test_every_damaged_parquet_file_is_harmless_or_noticed(tmp_path: Path) -> None:
    path, whole, chance = tmp_path / "trials.parquet", parquet_bytes(table()), random.Random(3)
    refused = 0
    for _ in range(300):
        changed = bytearray(whole)
        changed[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(
            changed if chance.random() < 0.7 else whole[: chance.randrange(len(whole))]
        )
        found = read_or_refusal(read_parquet, path)
        if isinstance(found, str):
            assert str(path) in found
            refused += 1
        else:
            pd.testing.assert_frame_equal(found, table())
    assert refused > 250


def test_a_fault_of_the_environment_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFaultError), reading(tmp_path):
        raise OSError(errno.EMFILE, "Too many open files")
    with pytest.raises(UsageError, match="is damaged"):
        read_json(tmp_path)  # a folder in its place
