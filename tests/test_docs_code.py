"""Every block of Python in the documents runs: the jobs as they stand, the rest with short runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from sklearn.datasets import load_digits

import ift_tune
from ift_tune import Batches, ClassificationProblem, MetaConfig, Splits

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"```(python|text)\n(.*?)```", flags=re.DOTALL)
NUMBER = re.compile(r"-?\d*\.?\d+(?:e-?\d+)?")
Scope = dict[str, Any]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def error(run: str, column: str) -> float:
    """Return a measurement of a run's only trial."""
    return float(ift_tune.load_results(f"runs/{run}").trials[column].iloc[0])


def gains(run: str, by: float, measured: str = "test_error") -> bool:
    """Return whether a retraining with what was learned beats the plain training."""
    return error(run, f"retrained_{measured}") < error(run, f"baseline_{measured}") - by


JOBS: dict[str, Callable[[Scope], bool]] = {
    # What each page claims of its own run; the numbers that it shows may differ by the machine.
    "wrong-labels": lambda s: gains("labels", 0.005) and s["wrong"][s["suspects"]].mean() > 0.8,
    "data-sources": lambda s: gains("sources", 0.2) and s["best"].hyper()[1] > 0.7,
    "classes": lambda s: gains("classes", 0.02) and s["weights"][9] > 3 * s["weights"][0],
    "features": lambda s: (
        gains("features", 0.005)
        and s["decays"][s["chance"]].median() > 2 * s["decays"][~s["chance"]].median()
    ),
    "decay": lambda s: (
        gains("layers", 0.3, "test_loss")
        and s["layers"]["retrained_test_loss"] < s["one"]["retrained_test_loss"] - 0.1
        and s["decays"][2] > 10 * max(s["decays"][:2])
        and s["optimizer"].param_groups[4]["weight_decay"] == 2 * s["decays"][2]
    ),
    "augmentation": lambda s: (
        gains("augment", 0.1) and 0.08 < s["best"].hyper.summary()["translation"] < 0.3
    ),
    "distillation": lambda s: error("distilled", "retrained_test_error") < 0.16,
    "optimiser": lambda s: s["final"].measure("test")["error"] < 0.1,
}
DAILY = ("wrong-labels", "data-sources", "classes", "features")  # the others take longer


def run(document: str, scope: Scope, shorter: Mapping[str, str] = {}) -> Scope:
    """Run a document's blocks one after the other, with less work where a text says how much."""
    for _, code in (found for found in BLOCK.findall(text_of(document)) if found[0] == "python"):
        for long, short in shorter.items():
            code = code.replace(long, short)
        exec(compile(code, document, "exec"), scope)
    return scope


def text_of(document: str) -> str:
    return (ROOT / document).read_text()


def words(text: str) -> list[str]:
    """Return a text's words, with a sign in the place of each number."""
    return NUMBER.sub("#", text).split()


def test_every_job_has_its_claims() -> None:
    pages = {path.stem for path in (ROOT / "docs" / "jobs").glob("*.md")}
    assert pages == {*JOBS, "index"}


@pytest.mark.parametrize(
    "job", [j if j in DAILY else pytest.param(j, marks=pytest.mark.nightly) for j in JOBS]
)
def test_a_job_runs_as_it_stands(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed up to a block of text is the text, but for the numbers."""
    scope: Scope = {}
    shown = ""
    for kind, text in BLOCK.findall(text_of(f"docs/jobs/{job}.md")):
        if kind == "python":
            exec(compile(text, job, "exec"), scope)
            shown += capsys.readouterr().out
        elif job != "distillation":  # which draws a picture
            assert words(shown) == words(text)
            shown = ""
    assert JOBS[job](scope)


@dataclass
class Shown:
    """How a document's blocks are run: with which names before them, and which work cut short."""

    before: Callable[[], Scope] = dict
    shorter: Mapping[str, str] = field(default_factory=dict)
    after: Callable[[Scope], bool] = bool


def digits_problem(config: MetaConfig, device: Any, seed: int) -> ClassificationProblem:
    """Weights of examples on a few digits."""
    inputs, targets = digits()
    train = Batches(inputs[:60], targets[:60], torch.arange(60))
    others = (Batches(inputs[i : i + 60], targets[i : i + 60]) for i in (60, 120, 180))
    return ClassificationProblem(
        torch.nn.Linear(64, 10), ift_tune.ExampleWeights(60), Splits(train, *others)
    )


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    pixels, labels = load_digits(return_X_y=True)
    return torch.as_tensor(pixels / 16, dtype=torch.float32), torch.as_tensor(labels)


def with_a_run() -> Scope:
    """Return the names that a page takes for granted after a run."""
    config = MetaConfig(inner_steps=2)
    ift_tune.run_single(
        digits_problem, ift_tune.Budget(outer_steps=2), out="runs/mine", config=config
    )
    inputs, targets = digits()
    losses = torch.ones(60)
    return {
        "ift_tune": ift_tune,
        "torch": torch,
        "pandas": pd,
        "make_problem": digits_problem,
        "inputs": inputs[:5],
        "targets": targets[:5],
        "index": torch.arange(60),
        "losses": losses,
    }


def for_using() -> Scope:
    space = ift_tune.MetaSpace({"meta_lr": ift_tune.Float(0.01, 0.1)})
    return {
        "ift_tune": ift_tune,
        "make_problem": digits_problem,
        "inputs": digits()[0],
        "space": space,
    }


class Scaling(ift_tune.HyperKind):
    """A kind of one's own: a factor of the inputs."""

    name = "scaling"

    def __init__(self, inputs: torch.Tensor) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.zeros((), dtype=inputs.dtype))

    def inputs(self, inputs: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
        return inputs * (1.0 + self.factor)

    def summary(self) -> dict[str, float]:
        return {"factor": float(self.factor.detach())}


def for_kinds() -> Scope:
    inputs, targets = digits()
    splits = Splits(*(Batches(inputs[i : i + 20], targets[i : i + 20]) for i in (0, 20, 40, 60)))
    model = torch.nn.Linear(64, 10)
    return {
        "ift_tune": ift_tune,
        "model": model,
        "splits": splits,
        "MyKind": Scaling,
        "new_inputs": inputs[:3],
        "inputs": inputs[:8],
        "targets": targets[:8],
    }


def for_a_table() -> Scope:
    Path("mine.csv").write_text(
        "size,colour,target\n1,red,yes\n2,blue,no\n,red,no\n4,blue,yes\n5,red,no\n6,red,yes\n"
    )
    return {}


PAGES = {
    "README.md": Shown(
        before=lambda: dict(zip("Xy", digits(), strict=True)),
        shorter={"outer_steps=20": "outer_steps=2"},
        after=lambda s: 0 <= error("mine", "baseline_test_error") <= 1,
    ),
    "docs/jobs/index.md": Shown(
        before=for_a_table,
        after=lambda s: s["X"].shape == (6, 3) and abs(s["X"].mean()) < 1e-9 and max(s["y"]) == 1,
    ),
    "docs/own-model.md": Shown(after=lambda s: s["joint"].problem.hyper.count == 650),
    "docs/using.md": Shown(
        before=for_using,
        shorter={
            "outer_steps=200, patience=20": "outer_steps=3",
            "outer_steps=20, patience=5": "outer_steps=2",
            "n_trials=10": "n_trials=2",
        },
        after=lambda s: s["final"].measure("test")["error"] <= 1.0,
    ),
    "docs/audit.md": Shown(
        before=with_a_run,
        shorter={"seeds=3": "folds=0, products=0"},
        after=lambda s: len(s["rows"]) == 60 and float(s["loss"]) == pytest.approx(1.0),
    ),
    "docs/kinds.md": Shown(
        before=for_kinds,
        shorter={"MyKind(...)": "MyKind(inputs)", "channels=3": "channels=1"},
        after=lambda s: s["weights"].shape == (3,),
    ),
    "docs/choosing.md": Shown(
        before=lambda: {"ift_tune": ift_tune, "torch": torch},
        after=lambda s: issubclass(s["MyProblem"], ClassificationProblem),
    ),
    "docs/comparing.md": Shown(
        before=lambda: {"make_problem": digits_problem},
        shorter={
            "20_000": "60",
            "training_steps=1000": "training_steps=10",
            "seeds=10, workers=2": "seeds=2",
        },
        after=lambda s: s["ARMS"][0].name == "qmc" and Path("runs/mine/report.html").is_file(),
    ),
}


@pytest.mark.parametrize("document", PAGES)
def test_a_page_s_blocks_run(document: str) -> None:
    page = PAGES[document]
    text = text_of(document)
    assert [long for long in page.shorter if long not in text] == []
    assert page.after(run(document, page.before(), page.shorter))


def test_every_document_with_code_is_run_by_a_test() -> None:
    """By this file or by another one that names it."""
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    for path in documents:
        if "```python" in path.read_text() and path.parent.name != "jobs":
            assert f'{path.name}"' in tests, path.name
