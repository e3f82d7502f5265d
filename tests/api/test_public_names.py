"""The flat API: every name is there, loaded when it is used, and seen by type checkers."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import ift_tune
from ift_tune.base.errors import MissingDependencyError

LOADED = [name for name in ift_tune.__all__ if name not in ift_tune._SUBMODULES]


def test_the_list_of_names_is_the_table_of_homes() -> None:
    listed = [*ift_tune._HOMES, *ift_tune._SUBMODULES, *ift_tune._ALIASES]
    assert sorted(ift_tune.__all__) == sorted(listed)
    assert len(set(ift_tune.__all__)) == len(ift_tune.__all__)


def test_type_checkers_see_the_same_names_in_the_same_homes() -> None:
    tree = ast.parse(Path(ift_tune.__file__).read_text())
    block = next(
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert [seen.pop(name) for name in ift_tune._SUBMODULES] == ["ift_tune", "ift_tune"]
    assert seen == {name: home for name, (home, _) in ift_tune._HOMES.items()}


@pytest.mark.parametrize("name", LOADED)
def test_each_name_is_what_its_home_defines(name: str) -> None:
    defined = ift_tune._ALIASES.get(name, name)
    home, _ = ift_tune._HOMES[defined]
    assert getattr(ift_tune, name) is getattr(importlib.import_module(home), defined)
    assert name in vars(ift_tune)  # the second use does not ask again
    assert name in dir(ift_tune)


@pytest.mark.parametrize("name", ift_tune._SUBMODULES)
def test_submodules_need_no_import_of_their_own(name: str) -> None:
    module = getattr(ift_tune, name)
    assert isinstance(module, ModuleType)
    assert module.__name__ == f"ift_tune.{name}"


def test_every_public_class_and_function_has_an_example() -> None:
    values = {name: getattr(ift_tune, name) for name in LOADED}
    without = [
        name
        for name, value in values.items()
        if (inspect.isclass(value) or inspect.isfunction(value))
        and ">>> " not in (value.__doc__ or "")
    ]
    assert without == []


@pytest.mark.parametrize(("old", "new"), ift_tune._RENAMED.items())
def test_a_name_of_before_still_works_and_says_what_it_is_now(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"ift_tune.{old} is now {new}") as caught:
        assert getattr(ift_tune, old) is getattr(ift_tune, new)
    assert caught[0].filename == __file__
    assert old not in dir(ift_tune)


def test_the_import_is_lazy() -> None:
    code = "import sys; before = set(sys.modules); import ift_tune; dir(ift_tune); print(*before)"
    libraries = "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    command = [sys.executable, "-c", f"{code}\n{libraries}"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    _, imported = found.stdout.splitlines()
    assert set(imported.split()) - sys.stdlib_module_names == {"ift_tune"}


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        getattr(ift_tune, "Nonsense")  # noqa: B009


def test_without_its_library_a_name_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    _ = ift_tune.run_study
    monkeypatch.delattr(ift_tune, "run_study")
    monkeypatch.delitem(sys.modules, "ift_tune.search.study")
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingDependencyError, match=r"run_study needs optuna.*ift_tune\[optuna\]"):
        _ = ift_tune.run_study


def test_the_version_is_that_of_the_installed_distribution(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert ift_tune._version() == importlib.metadata.version("ift_tune")
    assert ift_tune.__version__ == ift_tune._version()

    def missing(_: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert ift_tune._version() == "0+unknown"
