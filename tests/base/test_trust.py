"""A key at home: what this user has signed at a place, and nothing that was brought there."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from pathlib import Path

import pytest

from ift_tune.base.trust import (
    SIGNATURE,
    is_signed,
    is_signed_folder,
    key_file,
    sign,
    sign_folder,
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_a_folder_is_signed_where_it_is_and_nowhere_else(tmp_path: Path) -> None:
    mine = folder(tmp_path / "mine")
    assert not is_signed_folder(mine)
    sign_folder(mine)
    assert is_signed_folder(mine)
    copy = Path(shutil.copytree(mine, tmp_path / "copy"))
    assert not is_signed_folder(copy)


def test_another_user_signs_for_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brought = folder(tmp_path / "brought")
    sign_folder(brought)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
    assert not is_signed_folder(brought)  # before there is a key
    sign("something")
    assert not is_signed_folder(brought)


@pytest.mark.parametrize("forged", [b"", b"\xff\xfe", b"0" * 64, "é".encode()])
def test_anything_else_is_no_signature(forged: bytes, tmp_path: Path) -> None:
    sign("there is a key")
    brought = folder(tmp_path / "brought")
    (brought / SIGNATURE).write_bytes(forged)
    assert not is_signed_folder(brought)
    assert not is_signed("text", 3)


def test_the_key_is_the_users_alone(home: Path) -> None:
    first = sign("one")
    assert first == sign("one") != sign("another")
    assert key_file() == home / "ift_tune" / "key"
    assert list(key_file().parent.iterdir()) == [key_file()]
    if sys.platform != "win32":
        assert stat.S_IMODE(key_file().stat().st_mode) == 0o600


def test_an_empty_key_signs_nothing(home: Path) -> None:
    sign("one")
    key_file().write_bytes(b"")
    assert sign("one") is None
    assert not is_signed("one", "")


def test_a_home_that_cannot_be_written_signs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    mine = folder(tmp_path / "mine")
    sign_folder(mine)
    assert not os.listdir(mine)
    assert not is_signed_folder(mine)


def test_a_relative_state_folder_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", "state")
    assert key_file() == tmp_path / ".local/state/ift_tune/key"
