"""Texts of several kinds that come with Python itself, for mixing them."""

from __future__ import annotations

import ast
import importlib.util
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from ift_tune.base.errors import MissingDependencyError

if TYPE_CHECKING:  # why not always, is said in `base`
    from torch import Tensor

_CODE = (
    *("argparse", "calendar", "configparser", "copy", "csv", "difflib", "ftplib", "gettext"),
    *("imaplib", "mailbox", "optparse", "pprint", "shutil", "tarfile", "tokenize"),
)
_DOCUMENTED = (
    *("ast", "bisect", "cmd", "dataclasses", "doctest", "fractions", "functools", "heapq"),
    *("inspect", "json", "locale", "pickle", "random", "smtplib", "statistics", "string"),
    *("tempfile", "textwrap", "threading", "traceback", "typing", "unittest.mock", "uuid"),
)
_TABLES = ("cp437", "cp850", "cp1250", "cp1251", "cp1252", "koi8_r")
_NAMED = range(0x20, 0x2000)  # code points


@dataclass(frozen=True)
class Texts:
    """Several texts in one alphabet.

    Attributes:
        characters: Of each text, positions in `alphabet`, shape (N,), int64, by its name.
        alphabet: The characters that occur, sorted.
    """

    characters: Mapping[str, Tensor]
    alphabet: str

    @classmethod
    def of(cls, texts: Mapping[str, str]) -> Texts:
        """Number the characters of texts; what is not ASCII becomes a question mark."""
        import numpy as np
        import torch

        codes = {
            name: np.frombuffer(text.encode("ascii", "replace"), dtype=np.uint8)
            for name, text in texts.items()
        }
        found = np.unique(np.concatenate(list(codes.values())))
        places = np.zeros(256, dtype=np.int64)
        places[found] = np.arange(len(found))
        numbered = {name: torch.from_numpy(places[code]) for name, code in codes.items()}
        return cls(numbered, bytes(found).decode("ascii"))


@lru_cache(maxsize=1)  # parsing takes a second, and every trial of a search builds its problem
def library_texts() -> dict[str, str]:
    """Return texts of the running Python, some hundred thousand characters each.

    ``code`` has no docstrings; ``docstrings`` are those of other modules; ``manual`` is the text of
    `help`'s topics; ``tables`` are sources of character encodings; ``names`` those of Unicode.

    Raises:
        MissingDependencyError: If this Python has no sources with it.
    """
    from pydoc_data.topics import topics

    names = (unicodedata.name(chr(code), "") for code in _NAMED)
    return {
        "code": "\n\n".join(_undocumented(_source(name)) for name in _CODE),
        "tables": "\n".join(_source(f"encodings.{name}") for name in _TABLES),
        "names": "\n".join(name for name in names if name),
        "manual": "\n\n".join(topics[name] for name in sorted(topics)),
        "docstrings": "\n\n".join(d for name in _DOCUMENTED for d in _docstrings(_source(name))),
    }


def _source(name: str) -> str:
    spec = importlib.util.find_spec(name)
    loader = None if spec is None else spec.loader
    # Of a file, or of an archive; a Python that is shipped compiled has none.
    source = loader.get_source(name) if loader and hasattr(loader, "get_source") else None
    if source is None:
        raise MissingDependencyError(
            f"this Python has no source of its module {name}: take another one"
        )
    text: str = source
    return text


_Documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _docstrings(source: str) -> list[str]:
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, _Documented))
    return [text for node in nodes if (text := ast.get_docstring(node))]


def _undocumented(source: str) -> str:
    """Return a source without the lines of its docstrings; it is text, and need not run."""
    lines: list[str | None] = list(source.splitlines())
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, _Documented) and ast.get_docstring(node):
            first, last = node.body[0].lineno, node.body[0].end_lineno or 0
            lines[first - 1 : last] = [None] * (last - first + 1)
    return "\n".join(line for line in lines if line is not None)
