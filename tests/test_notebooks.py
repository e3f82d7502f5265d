"""The notebooks run from the first cell to the last, and find what their texts promise."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = Path(__file__).parent.parent / "examples" / "notebooks"
FILES = sorted(NOTEBOOKS.glob("*.ipynb"))

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def cells(path: Path) -> list[dict[str, Any]]:
    """Return the cells of a notebook's file."""
    found: list[dict[str, Any]] = json.loads(path.read_text())["cells"]
    return found


def executed(name: str, folder: Path, names: str) -> tuple[dict[str, Any], str]:
    """Run a notebook with this Python, in a folder.

    Args:
        name: Of the file.
        folder: Where it runs.
        names: An expression of what to return, with its variables.

    Returns:
        The value, and all that was shown as HTML.
    """
    nbformat = pytest.importorskip("nbformat", reason="install 'ift_tune[notebooks]'")
    nbclient = pytest.importorskip("nbclient", reason="install 'ift_tune[notebooks]'")
    pytest.importorskip("ipykernel", reason="install 'ift_tune[notebooks]'")
    book = nbformat.read(NOTEBOOKS / name, as_version=4)
    last = f"import json, sys; print(json.dumps([sys.executable, {names}]))"
    book.cells.append(nbformat.v4.new_code_cell(last))
    client = nbclient.NotebookClient(
        book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    printed = [
        output["text"] for output in book.cells[-1].outputs if output.get("name") == "stdout"
    ]
    executable, value = json.loads("".join(printed))
    assert Path(executable).resolve() == Path(sys.executable).resolve()
    return value, "".join(output.get("data", {}).get("text/html", "") for output in outputs)


@pytest.mark.nightly
def test_wrong_labels_are_found_and_the_refitted_model_is_better(tmp_path: Path) -> None:
    found, shown = executed(
        "noisy_labels.ipynb",
        tmp_path,
        "dict(auc=found, precision=float(precision), plain=plain, weighted=weighted)",
    )
    assert found["auc"] > 0.95
    assert found["precision"] > 0.9
    assert found["weighted"] < found["plain"] - 0.01
    assert "Run done after 40 outer steps" in shown
    assert "trial 0 done after 40 outer steps" in shown
    assert "training labels are suspect" in shown
    assert (tmp_path / "runs/noisy-labels/audit/audit.html").exists()


@pytest.mark.nightly
def test_the_pareto_search_has_a_front(tmp_path: Path) -> None:
    found, shown = executed(
        "pareto_search.ipynb", tmp_path, 'dict(front=front.to_dict("list"), n=len(complete))'
    )
    front = found["front"]
    assert found["n"] == 12
    assert len(front["trial"]) >= 2
    assert min(front["search_error"]) < 0.12
    pairs = sorted(zip(front["gradient_equivalents"], front["search_error"], strict=True))
    errors = [error for _, error in pairs]
    assert errors == sorted(errors, reverse=True)
    assert "Search digits-weight-decay: 12 trials (12 done)" in shown
    assert "trials</td><td>" in shown


def test_the_search_of_the_page_on_notebooks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (NOTEBOOKS.parents[1] / "docs/notebooks.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    for text, short in {"outer_steps=20": "outer_steps=2", "n_trials=4": "n_trials=2"}.items():
        assert text in block
        block = block.replace(text, short)
    scope: dict[str, Any] = {}
    exec(block, scope)
    assert repr(scope["result"]).startswith("Search custom: 2 trials (2 done)")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_notebooks_are_stored_without_outputs_and_for_any_python(path: Path) -> None:
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    assert len(code) >= 5
    assert [cell["outputs"] for cell in code] == [[]] * len(code)
    assert {cell["execution_count"] for cell in code} == {None}
    assert json.loads(path.read_text())["metadata"]["kernelspec"]["name"] == "python3"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_documents_that_notebooks_name_are_there(path: Path) -> None:
    text = "".join("".join(cell["source"]) for cell in cells(path))
    named = re.findall(r"`(docs/[\w-]+\.md)`", text)
    assert named
    assert [name for name in named if not (NOTEBOOKS.parents[1] / name).exists()] == []
