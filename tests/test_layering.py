"""Who may import whom: from upper floors to lower ones, never back, sideways or in a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import ift_tune

PACKAGE = Path(ift_tune.__file__).parent

FLOORS: list[set[str]] = [  # from the ground up; rooms of one floor do not know each other
    {"base"},
    {"implicit"},
    {"problem"},
    {"joint", "hyper"},
    {"trial", "tasks"},
    {"search"},
    {"compare"},
    {"testing"},
    {"studies"},
    {"report"},
    {"cli", "sklearn"},
]
HEIGHT = {room: height for height, floor in enumerate(FLOORS) for room in floor}
ROOTS = ("__init__", "__main__")  # above all floors
HOMES = {  # of optional libraries
    "optuna": ("search/",),
    "ray": ("search/ray/", "search/space.py"),
    "torchvision": ("tasks/vision.py",),
    "matplotlib": ("report/",),
    "cleanlab": ("studies/cleanlab_ranking.py",),
}
INSIDE_FUNCTIONS = (("search/space.py", "optuna"), ("search/space.py", "ray"))


def _files() -> dict[str, str]:
    """Return every file of the package by its module's name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        file = str(path.relative_to(PACKAGE))
        module = file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        found["ift_tune" if module == "__init__" else f"ift_tune.{module}"] = file
    return found


FILES = _files()


@cache
def _parse(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text())


def _names(tree: ast.AST) -> Iterator[str]:
    """Yield what is imported, at the top, inside functions and for type checking alike."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            yield from (f"{dots}{node.module}.{alias.name}" for alias in node.names)


def _targets(module: str) -> set[str]:
    """Return the modules of the package that a module imports."""
    found = set()
    for name in _names(_parse(FILES[module])):
        while name and name not in FILES:  # a name inside a module
            name = name.rpartition(".")[0]
        if name:
            found.add(name)
    return found - {module}


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def _wrong_ways() -> Iterator[str]:
    """Yield every import that runs up, sideways, or to a room that has no floor."""
    for module, file in FILES.items():
        source = _room(module)
        if source in ROOTS:
            continue
        if source not in HEIGHT:
            yield f"{file}: its room has no floor: give it one in this test"
            continue
        for target in sorted(_targets(module)):
            other = _room(target)
            if other == source or (source == "cli" and other == "__init__"):
                continue  # the root hands on names of all floors but the topmost
            if other in ROOTS or HEIGHT.get(other, len(FLOORS)) >= HEIGHT[source]:
                yield f"{file} must not import {target}"


def _circles() -> Iterator[str]:
    """Yield every set of modules that import each other, each set once (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in _targets(module):
            if target not in index:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], index[target])
        if low[module] == index[module]:
            circle: list[str] = []
            while not circle or circle[-1] != module:
                circle.append(stack.pop())
            found.append(circle)

    for module in FILES:
        if module not in index:
            visit(module)
    yield from (f"circle: {', '.join(sorted(c))}" for c in found if len(c) > 1)


def _strangers() -> Iterator[str]:
    """Yield every file that imports an optional library away from its home, or at its top."""
    for library, homes in HOMES.items():
        for file in FILES.values():
            libraries = {name.split(".")[0] for name in _names(_parse(file))}
            if library in libraries and not file.startswith(homes):
                yield f"{file} imports {library}, which is at home in {' and '.join(homes)}"
    for file, library in INSIDE_FUNCTIONS:
        top = [n for n in _parse(file).body if isinstance(n, ast.Import | ast.ImportFrom | ast.Try)]
        if any(name.split(".")[0] == library for node in top for name in _names(node)):
            yield f"{file} imports {library} at its top: it must work without"


def _relative() -> Iterator[str]:
    for file in FILES.values():
        yield from (
            f"{file} imports {name}: imports are absolute"
            for name in _names(_parse(file))
            if name.startswith(".")
        )


def _scattered() -> Iterator[str]:
    """Yield every file whose imports do not stand together, those for type checking last."""
    for file in FILES.values():
        code = [n for n in _parse(file).body if not isinstance(n, ast.Expr)]  # docstrings
        kinds = [_kind_of(node) for node in code]
        if kinds != sorted(kinds) or kinds.count(1) > 1:
            yield f"{file}: its imports are scattered"


def _kind_of(node: ast.stmt) -> int:
    if isinstance(node, ast.Import | ast.ImportFrom):
        return 0
    return 1 if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" else 2


def test_imports_run_down_the_floors_without_circles() -> None:
    violations = [*_wrong_ways(), *_circles(), *_strangers(), *_relative(), *_scattered()]
    assert not violations, "\n".join(violations)


def test_no_module_stands_loose_at_the_top() -> None:
    assert {path.name for path in PACKAGE.iterdir() if path.is_file()} == {
        "__init__.py",
        "__main__.py",
        "py.typed",
    }


def test_the_root_imports_no_heavy_library() -> None:
    code = (
        "import sys, ift_tune\n"
        "names = {name.split('.')[0] for name in sys.modules}\n"
        "heavy = {'torch', 'pandas', 'optuna', 'ray', 'torchvision', 'matplotlib', 'scipy'}\n"
        "print(*sorted(names & heavy))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


def test_every_public_name_is_there() -> None:
    assert len(set(ift_tune.__all__)) == len(ift_tune.__all__)
    for name in ift_tune.__all__:
        assert getattr(ift_tune, name) is not None
    assert set(ift_tune.__all__) <= set(dir(ift_tune))
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = ift_tune.Nonsense  # type: ignore[attr-defined]
