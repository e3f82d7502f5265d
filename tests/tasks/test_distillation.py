"""Distillation: what the images are worth to fresh models, and how they are judged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from ift_tune import JointOptimizer, UsageError, tasks
from ift_tune.base.views import ImageGrid
from ift_tune.tasks import Task
from ift_tune.tasks.building import first_of_each
from ift_tune.tasks.problems import DistillationProblem, fresh_test_error, other_architectures

NAMES = ("digits-distill", "mnist-distill", "mnist-distill-10", "cifar10-distill")


def make(task: Task, seed: int = 0) -> DistillationProblem:
    problem = task.make_problem(task.default_config, "cpu", seed)
    assert isinstance(problem, DistillationProblem)
    return problem


def test_fresh_models_learn_more_from_distilled_images_than_from_real_ones() -> None:
    """Thirty outer steps are enough, for the model they were made for and for others."""
    task = tasks.get("digits-distill", options={"judging": 100})
    problem = make(task)
    joint = JointOptimizer(problem, task.default_config)
    for _ in range(30):
        joint.step()
    found = problem.summary()
    fresh = make(task)
    fresh.hyper.load_state_dict(problem.hyper.state_dict())
    retrained = JointOptimizer(fresh, task.default_config)
    retrained.train_weights(joint.inner_steps)
    error = retrained.evaluate("test")["test_error"]
    assert error < 0.2
    assert error < found["real_images_test_error"] - 0.1
    assert found["mlp_test_error"] < found["real_images_mlp_test_error"] - 0.05


@pytest.mark.parametrize("name", NAMES)
def test_every_task_runs_on_embedded_data_and_draws_its_images(name: str) -> None:
    task = tasks.get(name, embedded=True, options={"judging": 5})
    problem = make(task)
    joint = JointOptimizer(problem, replace(task.default_config, inner_steps=1))
    for _ in range(3):
        assert joint.step()["skipped"] == 0.0
    count = len(problem.splits.train.tensors[0])  # type: ignore[attr-defined]
    (view,) = problem.views()
    assert isinstance(view, ImageGrid)
    assert view.images.shape == (count, *problem.shape)
    assert len(view.captions) == count
    assert len(set(view.captions[: view.columns])) == 10  # a row shows every class
    assert ("horse" in view.captions) == (name == "cifar10-distill")
    errors = {k: v for k, v in problem.summary().items() if k.endswith("_test_error")}
    assert len(errors) == 5
    assert all(0.0 <= error <= 1.0 for error in errors.values())


def test_judging_leaves_random_numbers_weights_and_gradients_alone() -> None:
    problem = make(tasks.get("digits-distill", options={"judging": 3}))
    state = torch.get_rng_state()
    before = [w.detach().clone() for w in (*problem.weights(), *problem.hypers())]
    first = problem.summary()
    torch.rand(5)  # another place in the stream gives the same answers
    assert problem.summary() == first
    torch.set_rng_state(state)
    problem.summary()
    assert torch.equal(torch.get_rng_state(), state)
    after = [*problem.weights(), *problem.hypers()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(tensor.grad is None for tensor in after)


def test_images_may_start_from_real_ones() -> None:
    problem = make(tasks.get("digits-distill", options={"real": 0.5, "noise": 0.0}))
    real, _, index = problem.splits.train.tensors  # type: ignore[attr-defined]
    distilled = problem.hyper.inputs(real, index).detach()
    torch.testing.assert_close(distilled, 0.5 * real)


def test_the_test_error_counts_the_last_smaller_batch() -> None:
    """A model that always says 1, judged on batches of unequal size."""
    constant = nn.Linear(2, 3)
    with torch.no_grad():
        constant.weight.zero_()
        constant.bias.copy_(torch.tensor([0.0, 50.0, 0.0]))
    rows = torch.zeros(4, 2)
    test = [(rows, torch.tensor([1, 1, 1, 0])), (rows[:1], torch.tensor([2]))]
    examples = (rows[:1], torch.tensor([1]))
    error = fresh_test_error(lambda: constant, examples, test, steps=1, lr=1e-6)
    assert error == pytest.approx(2 / 5)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 14)])
def test_other_architectures_take_rows_and_have_curvature_everywhere(
    shape: tuple[int, int, int],
) -> None:
    rows = torch.randn(2, shape[0] * shape[1] * shape[2])
    for build in other_architectures(shape).values():
        model = build()
        assert model(rows).shape == (2, 10)
        assert not any(isinstance(module, nn.ReLU) for module in model.modules())


def test_the_first_of_each_class_come_class_by_class() -> None:
    targets = torch.arange(10).repeat(3)
    inputs = torch.arange(30)[:, None].float()
    chosen, labels = first_of_each((inputs, targets), 2)
    assert labels.tolist() == [*range(10), *range(10)]
    assert chosen.flatten().tolist() == list(range(20))
    with pytest.raises(UsageError, match=r"of one there are 3 among 30: lower per_class"):
        first_of_each((inputs, targets), 4)


def test_names_are_one_for_each_class() -> None:
    with pytest.raises(UsageError, match="names must be 10, with commas between, got 'cat,dog'"):
        tasks.get("cifar10-distill", options={"names": "cat,dog"})
