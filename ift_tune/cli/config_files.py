"""What is written in a configuration file: YAML, JSON or TOML, or the run.json of a run."""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ift_tune.base.arguments import shown
from ift_tune.base.command import COMMAND
from ift_tune.base.errors import UsageError
from ift_tune.base.files import parse_json

if TYPE_CHECKING:
    import yaml

T = TypeVar("T")
RUN = {"task", "digest"}  # keys that a run.json has, and no file of flags


def read_config(path: Path, command: str) -> tuple[dict[str, Any], bool]:
    """Return what a file sets, by the names of flags, and whether it is the run.json of a run.

    Args:
        path: The file; its ending says what it is written in.
        command: That it is for.

    Raises:
        UsageError: If it cannot be read, is damaged, or is the run.json of another command.
    """
    readers: dict[str, Callable[[str], Any]] = {
        ".yaml": _from_yaml,
        ".yml": _from_yaml,
        ".json": _from_json,
        ".toml": _from_toml,
    }
    if path.suffix.lower() not in readers:
        raise UsageError(f"--config takes a .yaml, .json or .toml file, got {str(path)!r}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        found = readers[path.suffix.lower()](text)
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        said = " ".join((why or type(error).__name__).split())
        raise UsageError(f"--config {path} cannot be read: mend it, got {said}") from error
    if found is None:
        return {}, False
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UsageError(
            f"--config {path} must hold the names of flags with their values, as in 'seed: 3', "
            f"got {shown(found)}"
        )
    if found.keys() >= RUN:
        return _of_run(path, text, command), True
    return found, False


def _of_run(path: Path, text: str, command: str) -> dict[str, Any]:
    """Return the settings of the command that a run.json notes."""
    try:
        noted = parse_json(text).get(COMMAND)
    except ValueError as error:
        raise UsageError(
            f"--config {path} was changed after the run wrote it: restore it, or copy what it has "
            f"under {COMMAND!r} into a file of your own, got {error}"
        ) from error
    if not isinstance(noted, dict) or len(noted) != 1:
        raise UsageError(
            f"--config {path} is of a run that was begun in Python, or by an earlier version: name "
            f"its flags in a file of your own ('set:' takes what it has under 'config'), got no "
            f"{COMMAND!r} in it"
        )
    ((name, settings),) = noted.items()
    if name != command:
        raise UsageError(f"--config {path} is of ift-tune {name}: give it to that, got {command}")
    return dict(settings)


def _from_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_without_twins)


def _without_twins(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(k for k in keys if keys.count(k) > 1)!r} is there twice")
    return found


def _from_toml(text: str) -> Any:
    if sys.version_info < (3, 11):
        raise ValueError("Python reads TOML from 3.11 on; write YAML or JSON")
    import tomllib

    return tomllib.loads(text)


def _from_yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


# What a plain text of YAML 1.2 may be besides a text, by the first letters of it.
_CORE = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
)


def _resolving(kind: type[T]) -> type[T]:
    """Let a loader or dumper of PyYAML take plain texts for what they are in YAML 1.2."""
    resolver: Any = kind
    for name, pattern, first in _CORE:
        resolver.add_implicit_resolver(
            f"tag:yaml.org,2002:{name}", re.compile(f"(?:{pattern})$"), first
        )
    return kind


@functools.cache
def _loader() -> type[yaml.SafeLoader]:
    """Return a loader of plain values as YAML 1.2 has them.

    By the rules of 1.1, which PyYAML follows, ``1:20`` is the number 80, ``1e-3`` a text, ``no``
    is false and ``010`` is 8: what is meant as a range, a number or a word would be another one.
    """
    import yaml

    class CoreLoader(yaml.SafeLoader):
        yaml_implicit_resolvers = {}  # noqa: RUF012  (as PyYAML declares it)

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            found: Any = self.construct_pairs(node, deep=True)
            if not all(isinstance(key, Hashable) for key, _ in found):
                raise ValueError("a list or mapping stands where a name should")
            return _without_twins(found)

    def whole(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
        written = str(loader.construct_scalar(node))
        return int(written, {"0o": 8, "0x": 16}.get(written[:2], 10))

    def number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
        return float(re.sub(r"\.(?=[in])", "", str(loader.construct_scalar(node)).lower()))

    CoreLoader.add_constructor("tag:yaml.org,2002:int", whole)
    CoreLoader.add_constructor("tag:yaml.org,2002:float", number)
    return _resolving(CoreLoader)


def as_yaml(value: Mapping[str, Any]) -> list[str]:
    """Return names and plain values as lines of YAML, read alike by the rules of 1.1 and 1.2."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes a text that either would take for something else."""

    return yaml.dump(
        dict(value), Dumper=_resolving(Dumper), allow_unicode=True, sort_keys=False, width=10**6
    ).splitlines()
