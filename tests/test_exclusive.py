"""Threads that swap what belongs to the process take turns, and never wait for each other's end."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import optuna
import pytest
import torch
from torch import Tensor, nn

import ift_tune
from ift_tune import Budget, IFTObjective, Int, MetaConfig, MetaSpace, Trial, safe_kernels
from ift_tune.base import exclusive as module
from ift_tune.base.exclusive import exclusive
from ift_tune.base.randomness import RandomStream
from ift_tune.implicit.double_backward import Kernels

CPU = torch.device("cpu")
SECONDS = 20.0


def make_random(config: MetaConfig, device: Any, seed: int) -> ift_tune.BilevelProblem:
    inputs = torch.randn(60, 4)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 2))
    rows = ift_tune.Batches(inputs, (inputs[:, 0] > 0).long(), batch_size=20)
    splits = ift_tune.Splits(rows, rows, rows, rows)
    return ift_tune.ClassificationProblem(model, ift_tune.WeightDecay(model, "tensor"), splits)


def in_another_thread(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(timeout=SECONDS)


def value(seed: int) -> float:
    trial = Trial(make_random, MetaConfig(inner_steps=3), Budget(outer_steps=4), seed=seed)
    trial.setup()
    while trial.stop_reason is None:
        trial.step()
    return float(trial.finish()["retrained_test_loss"]) + float(trial.metrics["search_loss"])


def test_trials_in_threads_have_the_values_of_trials_alone() -> None:
    seeds = [0, 1, 0, 1]
    alone = [value(seed) for seed in seeds]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(value, seeds)) == alone


def test_a_study_with_n_jobs_has_the_values_of_one_without(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module._State, "told", False)
    found = []
    for jobs in (1, 3):
        study = optuna.create_study(pruner=optuna.pruners.NopPruner())
        for steps in (2, 2, 3):
            study.enqueue_trial({"inner_steps": steps})
        space = MetaSpace({"inner_steps": Int(1, 5)})
        objective = IFTObjective(make_random, space, Budget(outer_steps=3), device="cpu")
        with caplog.at_level(logging.WARNING, logger="ift_tune"):
            study.optimize(objective, n_trials=3, n_jobs=jobs)
        found.append(sorted((t.params["inner_steps"], t.value) for t in study.trials))
    assert found[0] == found[1]
    assert "run_study(..., workers=2)" in caplog.text


def test_a_trial_does_not_pay_for_the_time_that_it_waited() -> None:
    trial = Trial(make_random, MetaConfig(inner_steps=1), Budget(seconds=1e6), device="cpu")
    trial.setup()
    with ThreadPoolExecutor(1) as pool:
        with exclusive():
            waiting = pool.submit(trial.step)
            threading.Event().wait(0.5)
            assert not waiting.done()
        row = waiting.result(timeout=SECONDS)
    assert row is not None
    assert row["wall_seconds"] < 0.45


def test_kernels_that_threads_choose_are_the_process_s_again_afterwards() -> None:
    before = Kernels.in_force()
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with safe_kernels():
            inside.set()
            leave.wait(SECONDS)

    def look() -> tuple[bool, ...]:
        with safe_kernels():
            return Kernels.in_force().attention

    with ThreadPoolExecutor(2) as pool:
        holding = pool.submit(hold)
        inside.wait(SECONDS)
        looking = pool.submit(look)
        threading.Event().wait(0.05)
        assert not looking.done()
        leave.set()
        holding.result(SECONDS)
        assert looking.result(SECONDS) == (True, False, False, False)
    assert Kernels.in_force() == before


def test_the_same_thread_may_enter_again_and_leaves_it_to_others() -> None:
    with exclusive(), RandomStream(0, CPU).active(), safe_kernels(), exclusive():
        pass
    assert in_another_thread(lambda: float(RandomStream(0, CPU)._state._torch.sum())) > 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit, ZeroDivisionError])
def test_whatever_is_raised_inside_leaves_it_to_others(error: type[BaseException]) -> None:
    with pytest.raises(error), RandomStream(0, CPU).active(), safe_kernels():
        raise error
    assert in_another_thread(lambda: value(0)) == value(0)


def test_a_generator_left_open_holds_up_its_own_thread_not_at_all() -> None:
    def batches() -> Any:
        with exclusive():
            yield 1

    left = batches()
    next(left)
    assert value(0) == value(0)
    del left
    assert in_another_thread(lambda: value(0)) == value(0)


class EntersInBackward(torch.autograd.Function):
    """As an activation checkpoint does that runs its part again, on a GPU in autograd's thread."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        with safe_kernels():
            return 2.0 * grad


def test_a_backward_pass_does_not_wait_for_whoever_waits_for_it() -> None:
    def slope() -> float:
        x = torch.ones((), requires_grad=True)
        (found,) = torch.autograd.grad(EntersInBackward.apply(x), x)  # type: ignore[no-untyped-call]
        return float(found)

    with exclusive():  # the other thread stands for one of autograd's
        assert in_another_thread(slope) == 2.0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore")
def test_a_process_forked_while_another_thread_is_inside_goes_on() -> None:
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with exclusive():
            inside.set()
            leave.wait(SECONDS)

    with ThreadPoolExecutor(1) as pool:
        holding = pool.submit(hold)
        inside.wait(SECONDS)
        child = os.fork()
        if child == 0:
            entered = module._State.lock.acquire(timeout=5.0)
            os._exit(0 if entered else 1)
        _, status = os.waitpid(child, 0)
        leave.set()
        holding.result(SECONDS)
    assert status == 0
