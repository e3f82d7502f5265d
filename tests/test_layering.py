"""Who may import whom: left to right and never back (DESIGN, section 1)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ift_tune

PACKAGE = Path(ift_tune.__file__).parent

# From the bottom up. Modules of one group may import each other; groups side by side may not.
LAYERS: list[list[set[str]]] = [
    [{"types", "errors"}],
    [{"vectors", "views", "cost", "randomness", "devices", "environment"}],
    [{"penalty", "checkpoint", "tables"}],
    [{"problem", "double_backward"}],
    [{"batches", "curvature", "modes"}],
    [{"inverse"}],
    [{"optimizers", "config"}],
    [{"hyper"}, {"health", "hypergradient", "unrolled"}],
    [{"classification", "regression"}],
    [{"joint", "callbacks"}],
    [{"tasks"}, {"search"}, {"testing"}],
    [{"compare"}, {"studies"}],
    [{"report"}],
    [{"cli"}],
]
PLACES = {
    name: (height, side)
    for height, layer in enumerate(LAYERS)
    for side, group in enumerate(layer)
    for name in group
}
NEVER = {("hyper", "inverse"), ("inverse", "hyper")}
ONLY = {
    "optuna": ("search/",),
    "ray": ("search/ray/", "search/distributions.py"),
    "torchvision": ("tasks/vision.py",),
    "matplotlib": ("report/",),
}
FILES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


def _imports(tree: ast.AST) -> Iterator[str]:
    """Yield the absolute names of everything a file imports, at its top or inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _parse(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text())


def _unit(file: str) -> str:
    """Return the layer unit a file belongs to: its folder, or itself."""
    return Path(file).with_suffix("").parts[0]


def _allowed(source: str, target: str) -> bool:
    if source == target:
        return True
    (height, side), (other_height, other_side) = PLACES[source], PLACES[target]
    below = other_height < height or (other_height, other_side) == (height, side)
    return below and (source, target) not in NEVER


@pytest.mark.parametrize("file", [f for f in FILES if f != "__init__.py"])
def test_no_file_imports_back_or_sideways(file: str) -> None:
    source = _unit(file)
    assert source in PLACES, f"{file} has no place among the layers: give it one in {__file__}"
    for name in _imports(_parse(file)):
        package, _, rest = name.partition(".")
        if package == "ift_tune":
            target = rest.split(".")[0]
            assert target in PLACES, f"{file} imports {target or 'the root'} by {name}"
            assert _allowed(source, target), f"{file} must not import {name}"


@pytest.mark.parametrize(("library", "homes"), ONLY.items())
def test_optional_libraries_are_imported_where_they_are_at_home(
    library: str, homes: tuple[str, ...]
) -> None:
    for file in FILES:
        found = {name.split(".")[0] for name in _imports(_parse(file))}
        assert library not in found or file.startswith(homes), f"{file} imports {library}"


def _at_import(tree: ast.Module) -> Iterator[str]:
    """Yield what runs when the module is imported: not functions, not type checking."""
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Try):
            yield from _imports(node)


@pytest.mark.parametrize(
    ("file", "library"),
    [
        ("search/distributions.py", "optuna"),
        ("search/distributions.py", "ray"),
        ("report/curves.py", "matplotlib"),
    ],
)
def test_some_import_their_library_inside_functions_only(file: str, library: str) -> None:
    everywhere = {name.split(".")[0] for name in _imports(_parse(file))}
    assert library in everywhere
    assert library not in {name.split(".")[0] for name in _at_import(_parse(file))}


def test_the_root_imports_no_optional_library() -> None:
    code = (
        "import sys, ift_tune\n"
        "names = {name.split('.')[0] for name in sys.modules}\n"
        "print(*sorted(names & {'optuna', 'ray', 'torchvision', 'matplotlib'}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


def test_every_public_name_is_there() -> None:
    assert len(set(ift_tune.__all__)) == len(ift_tune.__all__)
    for name in ift_tune.__all__:
        assert getattr(ift_tune, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = ift_tune.Nonsense
