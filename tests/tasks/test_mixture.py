"""The mixture of texts: what Python brings, how it is cut, and what the weights lead to."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from ift_tune import (
    Batches,
    DomainWeights,
    JointOptimizer,
    MissingDependencyError,
    UsageError,
    tasks,
)
from ift_tune.tasks import datasets, texts
from ift_tune.tasks.building import CharConvolution
from ift_tune.tasks.mixture import PARTS
from ift_tune.tasks.texts import Texts, library_texts

SMALL = tasks.get("text-mixture", embedded=True)


def make(**options: Any) -> Any:
    task = tasks.get("text-mixture", embedded=True, options=options)
    return task.make_problem(task.default_config, "cpu", 3)


def test_python_brings_texts_of_several_kinds() -> None:
    found = library_texts()
    assert set(found) == set(PARTS) - {"shakespeare", "descriptions"}
    assert min(len(text) for text in found.values()) > 50_000
    assert "Copy data from src to dst in the most" not in found["code"]  # of shutil's docstrings
    assert "LATIN SMALL LETTER A" in found["names"]
    assert "charmap" in found["tables"]
    assert "def copyfile(" in found["code"]
    assert "def heappush" not in found["docstrings"]


def test_every_module_that_is_read_is_there_in_all_pythons() -> None:
    for name in (*texts._CODE, *texts._DOCUMENTED):
        assert name.partition(".")[0] in sys.stdlib_module_names
        assert len(texts._source(name)) > 1000


def test_a_python_without_sources_is_named() -> None:
    with pytest.raises(MissingDependencyError, match="no source of its module _thread"):
        texts._source("_thread")
    with pytest.raises(MissingDependencyError, match="no_such_module"):
        texts._source("no_such_module")


def test_texts_share_an_alphabet() -> None:
    found = Texts.of({"one": "abba", "two": "bé"})
    assert found.alphabet == "?ab"
    assert {name: c.tolist() for name, c in found.characters.items()} == {
        "one": [1, 2, 2, 1],
        "two": [2, 0],
    }


def test_windows_are_of_the_sources_that_the_weights_know() -> None:
    problem = make()
    kind, train = problem.hyper, problem.splits.train
    assert isinstance(kind, DomainWeights)
    assert isinstance(train, Batches)
    # Without the target, and without Shakespeare, which embedded data lack: 17 parts of 66.
    assert kind.names == ("code", "tables", "names", "manual", "descriptions")
    assert kind.table is not None
    assert torch.bincount(kind.table).tolist() == [27, 15, 12, 8, 4]
    data = datasets.load("texts", embedded=True)

    def text(places: torch.Tensor) -> str:
        return "".join(data.alphabet[i] for i in places.tolist())

    whole = [text(data.characters[name]) for name in kind.names]
    for windows, source in zip(train.tensors[0], kind.table.tolist(), strict=True):
        assert text(windows) in whole[source]


@pytest.mark.parametrize("target", ["manual", "code"])
def test_the_target_is_no_source_and_its_splits_are_disjoint(target: str) -> None:
    problem = make(target=target, length=40)  # none occurs twice by chance
    assert target not in problem.hyper.names
    parts = [getattr(problem.splits, name).tensors[0] for name in ("val", "search", "test")]
    starts = [{tuple(window.tolist()) for window in part} for part in parts]
    assert len(set.union(*starts)) == sum(len(part) for part in parts)


def test_it_starts_where_it_is_told() -> None:
    assert make().hyper.weights().tolist() == pytest.approx([1.0] * 5, rel=1e-4)
    assert make(init="uniform").hyper().tolist() == pytest.approx([0.2] * 5, rel=1e-4)
    with pytest.raises(UsageError, match=r"'proportional' or 'uniform', got 'equal'"):
        make(init="equal")
    with pytest.raises(UsageError, match=r"no text 'manuel' to be the target; did you mean"):
        make(target="manuel")


def test_the_net_sees_a_few_characters_before_each() -> None:
    torch.manual_seed(0)
    net, text = CharConvolution(7, 3, 4, width=3), torch.randint(7, (2, 9))
    logits = net(text)
    assert logits.shape == (2, 7, 9)
    changed = text.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 7
    differs = (net(changed) != logits).any(dim=1).any(dim=0)
    assert differs.tolist() == [False] * 4 + [True] * 3 + [False] * 2


def test_it_finds_the_text_that_is_most_like_the_target() -> None:
    """Prose about Python is learned from prose, not from tables or names."""
    sizes = {"length": 24, "train": 200, "val": 60, "hidden": 12, "embedding": 6}
    problem = make(**sizes)
    settings = {"meta_lr": 0.3, "inner_steps": 15}
    joint = JointOptimizer(problem, SMALL.default_config.updated(settings))
    for _ in range(12):
        joint.step()
    weights = dict(zip(problem.hyper.names, problem.hyper.weights().tolist(), strict=True))
    assert weights["manual"] > 1.5
    assert max(weights["names"], weights["tables"]) < 1.0
