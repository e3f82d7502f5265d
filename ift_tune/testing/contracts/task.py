"""What holds for every task."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from dataclasses import asdict

import torch
from torch import Tensor

from ift_tune.base.errors import CheckFailedError, nearest
from ift_tune.joint.budget import Budget
from ift_tune.joint.config import MetaConfig
from ift_tune.joint.joint import JointOptimizer
from ift_tune.problem.batches import Batches, tensors_of
from ift_tune.problem.loaders import once_through
from ift_tune.problem.problem import BilevelProblem
from ift_tune.tasks.base import Task
from ift_tune.testing.contracts.laws import (
    Laws,
    check_laws,
    is_line,
    require,
    require_numbers,
    require_views,
    require_words,
)

_SPLITS = ("train", "val", "search", "test")
_STEPS = 3


def check_task(task: Task) -> None:
    """Check that a task is what it declares, and that its problem can be trained.

    It is checked that the sizes are those of the problem, on the real data, which must be there;
    and all else on embedded data: that its default configuration is valid and takes three outer
    steps, after which everything measured is finite and λ has moved; that its target is measured;
    that equal seeds give equal problems and other seeds others; that it can be pickled.

    Args:
        task: A built-in task or one of your own. Its sizes are not checked where it stands on
            embedded data, as ``tasks.get(name, embedded=True)`` gives it.

    Raises:
        CheckFailedError: If it is not so; all that is not is named.

    Example:
        >>> from ift_tune import tasks
        >>> from ift_tune.testing.contracts import check_task
        >>> check_task(tasks.get("digits-weight-decay"))
    """
    laws = {name: law for name, law in _LAWS.items() if law is not _has_its_sizes}
    check_laws(f"the task {task.name!r}", laws if task.embedded else _LAWS, lambda: task)


def _make(task: Task, seed: int = 0) -> BilevelProblem:
    small = task if task.embedded else task.on_embedded_data()
    return small.make_problem(small.default_config, "cpu", seed)


def _is_declared(task: Task) -> None:
    for name in ("name", "summary", "data"):
        text = getattr(task, name)
        require(is_line(text), f"{name} is {text!r}, not a line")
    require(" " not in task.name, f"the name {task.name!r} is not a word for a command line")
    for name, size in asdict(task.sizes).items():
        require(type(size) is int and size > 0, f"{size!r} {name} are declared")
    require(math.isfinite(task.target.value), f"the target is {task.target.value}")
    require(isinstance(task.budget, Budget), f"the budget is a {type(task.budget).__name__}")
    unknown = set(task.small) - set(task.options())
    require(not unknown, f"small sets {sorted(unknown)}, which are no options")


def _has_a_valid_configuration(task: Task) -> None:
    config = task.default_config
    require(MetaConfig.from_flat(config.to_flat()) == config, "its settings do not come back")


def _travels(task: Task) -> None:
    try:
        again = pickle.loads(pickle.dumps(task))
        factory = pickle.loads(pickle.dumps(task.make_problem))
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        text = f"it cannot be pickled ({error}): build it from functions and classes of a module"
        raise CheckFailedError(text) from error
    require(again == task and factory.__self__ == task, "pickled, it is another task")


def _has_its_sizes(task: Task) -> None:
    problem = task.make_problem(task.default_config, "cpu", 0)
    found = {
        "weights": sum(w.numel() for w in problem.weights()),
        "hypers": sum(h.numel() for h in problem.hypers()),
        **{name: _size(problem, name) for name in _SPLITS},
    }
    declared = asdict(task.sizes)
    wrong = [f"{found[k]} {k}, not {declared[k]}" for k in declared if found[k] != declared[k]]
    require(not wrong, f"the problem has {', '.join(wrong)}")


def _size(problem: BilevelProblem, split: str) -> float:
    loader = getattr(problem.splits, split)
    return sum(problem.batch_size(batch) for batch in once_through(loader))


def _is_decided_by_the_seed(task: Task) -> None:
    before = torch.get_rng_state()
    one, same, other = (list(_content(_make(task, seed))) for seed in (1, 1, 2))
    require(torch.equal(torch.get_rng_state(), before), "building it draws from others' numbers")
    require(
        len(one) == len(same) and all(map(torch.equal, one, same)),
        "two problems of one seed differ",
    )
    require(not torch.equal(one[0], other[0]), "initial weights are the same for all seeds")


def _content(problem: BilevelProblem) -> Iterator[Tensor]:
    """Yield everything a seed decides: weights, λ, all examples and the first training batch."""
    yield from (t.detach() for t in (*problem.weights(), *problem.hypers()))
    for name in _SPLITS:
        for batch in once_through(getattr(problem.splits, name)):
            yield from tensors_of(batch)
    yield from tensors_of(next(iter(problem.splits.train)))


def _has_curvature_of_training_data(task: Task) -> None:
    splits = _make(task).splits
    if isinstance(splits.curvature, Batches) and isinstance(splits.train, Batches):
        pairs = zip(splits.curvature.tensors, splits.train.tensors, strict=True)
        same = all(torch.equal(a, b) for a, b in pairs)
        require(same, "curvature batches are of other examples than the training split")


def _learns(task: Task) -> None:
    problem = _make(task)
    problem.validate()
    factory = (task if task.embedded else task.on_embedded_data()).make_problem
    joint = JointOptimizer(problem, task.default_config, problem_factory=factory)
    before = [h.detach().clone() for h in problem.hypers()]
    measured: dict[str, float] = {}
    for step in range(_STEPS):
        measured = dict(joint.step())
        require(measured["skipped"] == 0.0, f"outer step {step} is skipped: λ stays as it is")
    measured |= joint.evaluate("search") | joint.evaluate("test")
    infinite = [name for name, value in measured.items() if not math.isfinite(value)]
    require(not infinite, f"after {_STEPS} outer steps {', '.join(infinite)} are not finite")
    moved = any(not torch.equal(a, b) for a, b in zip(before, problem.hypers(), strict=True))
    require(moved, f"{_STEPS} outer steps leave λ as it was")
    target = task.target.metric.removeprefix("retrained_")
    require(
        target in measured,
        f"its target {task.target.metric!r} is not measured{nearest(target, measured)}",
    )
    require_numbers(problem.summary())
    require_words(problem.words())
    require_views(problem.views())


_LAWS: Laws[Task] = {
    "it declares itself": _is_declared,
    "its default configuration is valid": _has_a_valid_configuration,
    "it travels to other processes": _travels,
    "its sizes are those of the problem": _has_its_sizes,
    "a seed decides all": _is_decided_by_the_seed,
    "curvature is that of training data": _has_curvature_of_training_data,
    f"{_STEPS} outer steps on embedded data are finite": _learns,
}
