"""Every task on a GPU: the CPU's numbers, a run, and its resumption."""

from __future__ import annotations

import pytest
import torch

from ift_tune import JointOptimizer, MetaConfig, tasks
from ift_tune.implicit.vectors import dot, norm
from ift_tune.joint.inner_loop import InnerLoop
from ift_tune.joint.outer_loop import OuterLoop
from ift_tune.joint.splits import Walks
from ift_tune.problem.batches import to_device
from ift_tune.problem.loaders import once_through
from ift_tune.problem.problem import BilevelProblem

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

RANDOM = ("augment", "dropout")  # a loss that draws gives other numbers on another device


def make(name: str, config: MetaConfig, device: str) -> BilevelProblem:
    """Return a task's problem on a device, with the weights and λ that it has on the CPU."""
    task = tasks.get(name, embedded=True)
    problem = task.make_problem(config, torch.device(device), 0)
    if device != "cpu":
        twin = make(name, config, "cpu")
        problem.model.load_state_dict(twin.model.state_dict())
        problem.hyper.load_state_dict(twin.hyper.state_dict())
    return problem


@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_task_has_the_cpus_hypergradient_and_goes_on_after_a_resumption(name: str) -> None:
    config = tasks.TASKS[name].default_config.updated({"inner_steps": 2})
    on_cpu, on_gpu = make(name, config, "cpu"), make(name, config, "cuda")
    train, val = (next(once_through(split)) for split in (on_cpu.splits.train, on_cpu.splits.val))
    results = []
    for problem in (on_cpu, on_gpu):
        device = problem.weights()[0].device
        batches = to_device(train, device), to_device(val, device)
        inner = InnerLoop(problem, config, Walks(problem.splits, device), device).descent
        results.append(OuterLoop(problem, config, inner).hypergradient(config, *batches))
    mine, theirs = results[0].grads, [g.cpu() for g in results[1].grads]
    assert all(bool(g.isfinite().all()) for g in theirs)
    if not any(word in name for word in RANDOM):
        assert float(dot(mine, theirs)) > 0.99 * float(norm(mine) * norm(theirs))
    joint = JointOptimizer(on_gpu, config)
    assert joint.step()["train_loss"] > 0.0  # the check at the start among it
    state = joint.state_dict()
    # Convolutions choose their algorithm by the clock otherwise, and Adam makes much of little.
    with torch.backends.cudnn.flags(deterministic=True, allow_tf32=False):
        row = joint.step()
        again = JointOptimizer(make(name, config, "cuda"), config)
        again.load_state_dict(state)
        for key, value in again.step().items():
            assert value == pytest.approx(row[key], rel=1e-2, abs=1e-5), key
