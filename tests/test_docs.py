"""What the documents show works, and they name nothing that is not there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from optuna.trial import TrialState
from torch.nn.functional import linear

import ift_tune
from ift_tune import JointOptimizer, tasks
from ift_tune.cli import app

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(document: str) -> list[str]:
    """Return the Python of a document, piece by piece."""
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), flags=re.DOTALL)


def test_a_column_of_ones_own_is_added() -> None:
    task = tasks.get("digits-weight-decay")
    problem = task.make_problem(task.default_config, "cpu", 0)
    scope: dict[str, Any] = {"ift_tune": ift_tune, "problem": problem}
    column, _ = blocks("docs/callbacks.md")
    exec(column, scope)
    joint = scope["joint"]
    assert isinstance(joint, JointOptimizer)
    measured = joint.step()["largest_decay"]
    assert measured == joint.problem.summary()["max"] > 0.0


def test_a_model_that_averages_its_weights_does_so_in_every_training() -> None:
    scope: dict[str, Any] = {}
    exec(blocks("docs/callbacks.md")[1], scope)
    model, inputs = scope["Averaged"](), torch.randn(60, 10)
    splits = ift_tune.Splits.from_arrays(inputs, inputs[:, :3].argmax(dim=1), batch_size=10)
    problem = ift_tune.ClassificationProblem(model, ift_tune.LabelSmoothing(3), splits)
    joint = JointOptimizer(problem, ift_tune.MetaConfig(inner_steps=5, inner_lr=0.1))
    before = model.average.clone()
    joint.baseline_step()
    trained = model.average.clone()
    assert not torch.equal(trained, before)
    assert joint.step()["hypergradient_norm"] > 0.0  # the average has the gradient of the weights
    assert not torch.equal(model.average, trained)
    averaged = linear(inputs, model.average, model.layer.bias)
    torch.testing.assert_close(model.eval()(inputs), averaged)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_the_studies_of_the_page_on_optuna_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    studies, heartbeat = blocks("docs/optuna.md")
    exec(studies, scope)
    exec(heartbeat, scope)
    grid, evolved = scope["grid"].study, scope["evolved"].study
    assert len({tuple(t.params.values()) for t in grid.trials}) == len(grid.trials) == 12
    assert len(evolved.get_trials(states=[TrialState.COMPLETE])) == 8
    assert evolved.trials[0].params["terms"] == 2
    assert evolved.metric_names == ["search_loss"]


def test_error_against_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("docs/objectives.md")
    short = {"outer_steps=30": "outer_steps=2", "n_trials=60": "n_trials=3"}
    for text, shorter in short.items():
        assert text in block
        block = block.replace(text, shorter)
    scope: dict[str, Any] = {}
    exec(block, scope)
    result = scope["result"]
    assert list(result.front) == [
        *("trial", "search_error", "gradient_equivalents", "terms", "inner_steps")
    ]
    assert set(result.front["trial"]) == set(result.trials.loc[result.trials["pareto"], "trial"])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_that_are_there(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text())
    gone = [
        target
        for target in targets
        if not target.startswith("http") and not (document.parent / target).exists()
    ]
    assert gone == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_are_there(document: Path) -> None:
    named = re.findall(r"`((?:\w+/)+\w+\.py)`", document.read_text())
    places = (ROOT, ROOT / "ift_tune")
    assert [name for name in named if not any((place / name).exists() for place in places)] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_names_of_the_package_are_there(document: Path) -> None:
    named = set(re.findall(r"\bift_tune\.([A-Za-z]\w*)", document.read_text()))
    rooms = {path.name for path in (ROOT / "ift_tune").iterdir()}
    assert named - set(dir(ift_tune)) - rooms == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_and_their_options_are_there(document: Path) -> None:
    commands = getattr(typer.main.get_command(app), "commands")  # noqa: B009  # typed privately
    wrong = []
    # A command goes on over lines that end in a backslash, up to a comment, a quote or a pipe.
    text = document.read_text().replace("\\\n", " ")
    for name, rest in re.findall(r"ift-tune ([a-z][a-z-]+)([^\n`'|#;]*)", text):
        if name not in commands:
            wrong.append(name)
            continue
        options = {option for param in commands[name].params for option in param.opts}
        wrong += [word for word in re.findall(r"--[a-z][a-z-]+", rest) if word not in options]
    assert set(wrong) - {"--help"} == set()


def test_data_and_models_as_they_are_shown() -> None:
    scope: dict[str, Any] = {}
    for block in blocks("docs/data.md"):
        exec(block, scope)
    assert isinstance(scope["joint"], JointOptimizer)
    assert scope["weights"].count == scope["features"].shape[0] * 6 // 10
