"""The text tasks: windows of a text, the net that reads them, and learned dropout at work."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from ift_tune import Batches, DropoutRates, JointOptimizer, UsageError, tasks
from ift_tune.hyper.supervised import ClassificationProblem
from ift_tune.tasks.building import CharLSTM, windows
from ift_tune.tasks.datasets import Text
from ift_tune.tasks.language import SITES

COUNTED = Text(torch.arange(1000), "")  # a text in which every character is at its own number
SPLITS = ("train", "val", "search", "test")


@pytest.mark.parametrize("seed", [0, 1])
def test_windows_are_disjoint_stretches_with_their_successors(seed: int) -> None:
    parts = windows(COUNTED, 7, (10, 20, 30, 40), seed)
    assert [inputs.shape for inputs, _ in parts] == [(n, 7) for n in (10, 20, 30, 40)]
    seen: set[int] = set()
    for inputs, targets in parts:
        assert torch.equal(targets, inputs + 1)
        assert torch.equal(inputs.flatten(), torch.arange(inputs.numel()) + inputs[0, 0])
        here = {*inputs.flatten().tolist(), *targets.flatten().tolist()}
        assert not here & seen  # not even a target is in two splits
        seen |= here


def test_the_seed_decides_where_the_text_begins() -> None:
    starts = [int(windows(COUNTED, 5, (2, 2, 2, 2), seed)[0][0][0, 0]) for seed in (0, 0, 1)]
    assert starts[0] == starts[1] != starts[2]


def test_a_short_text_shrinks_all_splits_alike() -> None:
    parts = windows(COUNTED, 10, (100, 100, 100, 200), 0)
    assert [len(inputs) for inputs, _ in parts] == [19, 19, 19, 39]


def test_the_net_reads_from_left_to_right() -> None:
    torch.manual_seed(0)
    net = CharLSTM(characters=6, embedding=3, hidden=4)
    text = torch.randint(6, (2, 8))
    logits = net(text)
    assert logits.shape == (2, 6, 8)
    changed = text.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 6
    differs = (net(changed) != logits).any(dim=1)
    assert not differs[:, :5].any()  # the future is not seen
    assert differs[:, 5:].all()  # the past is


def test_losses_are_means_over_characters() -> None:
    problem = tasks.get("text-dropout", embedded=True).make_problem(
        tasks.get("text-dropout").default_config, "cpu", 0
    )
    assert isinstance(problem.splits.test, Batches)
    batch = problem.splits.test.tensors
    logits = problem.model(batch[0])
    right = logits.movedim(1, -1).log_softmax(-1).gather(-1, batch[1][..., None])
    found = problem.metrics(batch)
    torch.testing.assert_close(found["loss"], -right.mean())
    assert float(found["error"]) == pytest.approx(
        float((logits.argmax(dim=1) != batch[1]).float().mean())
    )
    # ... and so is the training loss, but for the dropout
    assert isinstance(problem, ClassificationProblem)
    assert isinstance(problem.hyper, DropoutRates)
    problem.hyper.set_coarse(dict.fromkeys(SITES, 1e-7))
    loss = F.cross_entropy(logits, batch[1])
    torch.testing.assert_close(problem.train_loss(batch), loss, rtol=1e-3, atol=0.0)


def test_rates_are_of_the_same_sites_one_or_many() -> None:
    few, many = (tasks.get(name) for name in ("text-dropout", "text-dropout-many"))
    assert few.sizes.weights == many.sizes.weights
    characters, options = 65, many.options()
    e, h = options["embedding"], options["hidden"]
    assert few.sizes.hypers == 7
    assert many.sizes.hypers == characters + e + 2 * h + 3 * 4 * h * h + 7
    layer = [4 * h * (inputs + h + 2) for inputs in (e, h)]
    assert many.sizes.weights == characters * e + sum(layer) + (h + 1) * characters


@pytest.mark.parametrize("name", ["text-dropout", "text-dropout-many"])
def test_rates_move_and_validation_is_without_dropout(name: str) -> None:
    task = tasks.get(name, embedded=True)
    problem = task.make_problem(task.default_config, "cpu", 0)
    assert isinstance(problem, ClassificationProblem)
    assert isinstance(problem.hyper, DropoutRates)
    before = [raw.detach().clone() for raw in problem.hypers()]
    joint = JointOptimizer(problem, task.default_config)
    joint.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, problem.hypers(), strict=True))
    batch = next(iter(problem.splits.val))
    assert torch.equal(problem.val_loss(batch), problem.val_loss(batch))
    assert not torch.equal(problem.train_loss(batch), problem.train_loss(batch))


def test_other_rates_are_refused() -> None:
    task = tasks.get("text-dropout", embedded=True, options={"rates": "eight"})
    with pytest.raises(UsageError, match="'seven' or 'many', got 'eight'"):
        task.make_problem(task.default_config, "cpu", 0)


def test_the_study_compares_arms_of_equal_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Path(__file__).parents[2] / "examples" / "language_study.py"
    out = tmp_path / "study"
    options = ("--embedded", "--seeds", "1", "--outer-steps", "2", "--every", "1")
    monkeypatch.setattr(sys, "argv", [str(script), *options, "--out", str(out)])
    runpy.run_path(str(script), run_name="__main__")
    courses = pd.read_parquet(out / "courses.parquet").set_index(["arm", "step"])
    arms = ["no dropout", "frozen"]
    names = ("text-dropout", "text-dropout-many")
    arms += [f"{name} {what}" for name in names for what in ("tuned", "retrained")]
    assert courses.index.tolist() == [(arm, step) for arm in arms for step in (1, 2)]
    rates = courses["rate layer1"]
    assert rates["no dropout", 2] < 1e-5
    assert rates["frozen", 1] == rates["frozen", 2] == pytest.approx(0.1)
    # The first inner steps are the same: only then is a rate moved.
    assert courses["train_loss"]["frozen", 1] == courses["train_loss"]["text-dropout tuned", 1]
    for task in names:
        found = rates[f"{task} tuned", 2]
        assert found != rates[f"{task} tuned", 1] != pytest.approx(0.1)
        assert rates[f"{task} retrained", 1] == rates[f"{task} retrained", 2] == found
    text = (out / "README.md").read_text()
    assert "text-dropout-many retrained" in text
