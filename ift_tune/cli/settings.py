"""An option of a command as a configuration file sets it, and as a command line does."""

from __future__ import annotations

import contextlib
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.core import TyperOption

from ift_tune.base.arguments import shown
from ift_tune.base.errors import UsageError
from ift_tune.base.urls import HIDDEN, without_secrets

_WORDS = {bool: "true or false", int: "a whole number", float: "a number"}


@dataclass(frozen=True)
class Setting:
    """An option or argument of a command, as a file sets it.

    Attributes:
        name: Of the parameter of the function.
        key: In a file: the flag without its dashes.
        kind: One of bool, int, float, str, Path and list.
        metavar: How its value is written on a command line; empty where the kind says it.
        help: What it is.
    """

    name: str
    key: str
    kind: type
    metavar: str
    help: str

    @classmethod
    def of(cls, param: Any, hint: Any) -> Setting:
        """Return the setting of a parameter that is annotated so."""
        if isinstance(hint, types.UnionType):
            (hint,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
        flag = param.opts[0] if isinstance(param, TyperOption) else param.name
        return cls(
            param.name,
            flag.lstrip("-").replace("_", "-"),
            typing.get_origin(hint) or hint,
            param.metavar or "",
            param.help or "",
        )

    @property
    def is_mapping(self) -> bool:
        """Whether it is repeated for pairs, as ``--set KEY=VALUE``."""
        return self.metavar.startswith("KEY=")

    @property
    def takes_lists(self) -> bool:
        """Whether the values of a pair may be several, as ``--vary KEY=A,B``."""
        return "RANGE" in self.metavar

    @property
    def is_joined(self) -> bool:
        """Whether its values stand in one word with commas between."""
        return self.metavar.endswith(",...")

    def value_of(self, written: Any, path: Path) -> Any:
        """Return what a file has for it as a command line would give it.

        Raises:
            UsageError: If it is of another type.
        """
        if self.kind is list:
            return self._texts(written, path)
        if self.is_joined and isinstance(written, list):
            return ",".join(
                self._text(each, path, "a list of words or numbers") for each in written
            )
        if self.is_joined and _is_scalar(written):
            return _as_text(written)
        if self.kind in (str, Path):
            return self._word(written, path)
        fits = isinstance(written, int) if self.kind is float else False
        if isinstance(written, bool) != (self.kind is bool) or not (
            fits or isinstance(written, self.kind)
        ):
            raise self._wrong(path, _WORDS[self.kind], written)
        return written

    def refuse_hidden(self, value: Any, path: Path) -> None:
        """Raise a `UsageError` if a value is a URL whose secrets are hidden."""
        if isinstance(value, str) and "://" in value and HIDDEN in value:
            raise UsageError(
                f"no file has the password of {value}: name the whole URL by --{self.key}, or "
                f"IFT_TUNE_STORAGE, got {self.key} in {path}"
            )

    def plain(self, value: Any) -> Any:
        """Return a value of the command's as a file sets it, without secrets."""
        if self.is_mapping:
            pairs = (text.partition("=") for text in value or ())
            return {key: _read_back(text) for key, _, text in pairs}
        if self.kind is list:
            return list(value or ())
        if isinstance(value, Path):
            return str(value)
        return without_secrets(value) if isinstance(value, str) else value

    def _texts(self, written: Any, path: Path) -> list[str]:
        if isinstance(written, dict) and self.is_mapping:
            pairs = list(self._flat(written, path))
            if twice := {key for key, _ in pairs if [k for k, _ in pairs].count(key) > 1}:
                raise UsageError(f"{self.key} in {path} must have {min(twice)} once, got it twice")
            return [f"{key}={self._of_pair(key, each, path)}" for key, each in pairs]
        form = "a mapping, as in {terms: 5}" if self.is_mapping else "a list of texts"
        if isinstance(written, str):
            return [written]
        if not isinstance(written, list):
            raise self._wrong(path, form, written)
        return [self._word(each, path, form) for each in written]

    def _flat(self, written: dict[Any, Any], path: Path, before: str = "") -> Iterator[Any]:
        """Yield the pairs, those of a mapping in the mapping under ``name.key``.

        So ``user: {size: 5}`` is ``user.size: 5``, which TOML takes for the former by itself.
        """
        for key, each in written.items():
            if isinstance(each, dict) and each and isinstance(key, str):
                yield from self._flat(each, path, f"{before}{key}.")
            elif before and not isinstance(key, str):
                raise self._wrong(path, "a mapping of names", written)
            else:
                yield (f"{before}{key}" if before else key), each

    def _of_pair(self, key: Any, written: Any, path: Path) -> str:
        several = " or a list of them" if self.takes_lists else ""
        form = f"a mapping of names to a text, a number or a truth value{several}"
        if not isinstance(key, str) or not key or "=" in key:
            raise self._wrong(path, form, {key: written})
        if isinstance(written, list) and self.takes_lists:
            if len(written) < 2 or any("," in str(each) for each in written):
                raise self._wrong(path, f"{form}, of two or more without commas in them", written)
            return ",".join(self._text(each, path, form) for each in written)
        return self._text(written, path, f"{form}: in {key}")

    def _word(self, written: Any, path: Path, form: str = "") -> str:
        if not isinstance(written, str):
            quoted = "a text in quotes" if _is_scalar(written) else "a text"
            raise self._wrong(path, form or quoted, written)
        return written

    def _text(self, written: Any, path: Path, form: str) -> str:
        if not _is_scalar(written):
            raise self._wrong(path, form, written)
        return _as_text(written)

    def _wrong(self, path: Path, form: str, written: object) -> UsageError:
        return UsageError(f"{self.key} in {path} must be {form}, got {shown(written)}")


def _is_scalar(value: object) -> bool:
    return isinstance(value, str | int | float)


def _as_text(value: Any) -> str:
    """Return a value as a command line has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _read_back(text: str) -> Any:
    """Return the number or truth value that a command takes a text for, else the text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            value = kind(text)
            return value if math.isfinite(value) else text
    return text
