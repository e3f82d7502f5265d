"""What this user has written, told from what was brought here: by a signature under a key at home.

Some libraries keep pickles, which run whatever they say when they are read. Who only ships a folder
cannot sign it: the key never leaves the user's own state folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import secrets
from pathlib import Path

from ift_tune.base.files import write_atomically

SIGNATURE = "signature"
"""File in a run directory, and attribute of a study in a storage of the user's own."""

_KEY_BYTES = 32

_log = logging.getLogger(__name__)


def key_file() -> Path:
    """Return where the key is kept: under ``$XDG_STATE_HOME``, by default ``~/.local/state``."""
    state = os.environ.get("XDG_STATE_HOME", "")
    # A relative path is to be ignored, as the XDG specification says.
    home = Path(state) if os.path.isabs(state) else Path("~/.local/state").expanduser()
    return home / "ift_tune" / "key"


def sign(subject: str) -> str | None:
    """Return this user's signature of a text; None, with a note in the log, if no key can be kept.

    Args:
        subject: What is signed, its place included: a copy elsewhere is not signed.
    """
    try:
        return _digest(subject, _key() or _make_key())
    except (OSError, RuntimeError) as error:  # the latter where there is no home
        _log.info("no key can be kept in %s (%s): nothing is signed", key_file().parent, error)
        return None


def is_signed(subject: str, signature: object) -> bool:
    """Return whether a signature is this user's, of this text."""
    with contextlib.suppress(OSError, RuntimeError):
        if isinstance(signature, str) and (key := _key()) is not None:
            return hmac.compare_digest(_digest(subject, key).encode(), signature.encode())
    return False


def sign_folder(folder: Path) -> None:
    """Sign a run directory, at the place where it is."""
    if (signature := sign(_subject(folder))) is not None:
        write_atomically(folder / SIGNATURE, signature.encode())


def is_signed_folder(folder: Path) -> bool:
    """Return whether this user has signed a run directory at this place."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return is_signed(_subject(folder), (folder / SIGNATURE).read_text())
    return False


def _subject(folder: Path) -> str:
    return f"run directory {folder.resolve()}"


def _digest(subject: str, key: bytes) -> str:
    return hmac.new(key, subject.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()


def _key() -> bytes | None:
    """Return the key, None if there is none."""
    file = key_file()
    key = file.read_bytes() if file.exists() else b""
    return key if len(key) == _KEY_BYTES else None


def _make_key() -> bytes:
    """Make a key that only this user can read; of several processes at it, one makes it."""
    file = key_file()
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    ours = file.with_name(f"{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
    handle = os.open(ours, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as opened:
            opened.write(secrets.token_bytes(_KEY_BYTES))
        with contextlib.suppress(FileExistsError):
            os.link(ours, file)  # whole, or not at all
    finally:
        ours.unlink()
    key = _key()
    if key is None:
        raise OSError(f"{file} holds no key: delete it")
    return key
