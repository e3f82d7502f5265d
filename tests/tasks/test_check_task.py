"""`check_task` takes a task that is as declared, and names what another is not."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from ift_tune import tasks
from ift_tune.base.errors import CheckFailedError
from ift_tune.hyper import WeightDecay
from ift_tune.hyper.supervised import RegressionProblem
from ift_tune.problem.problem import BilevelProblem
from ift_tune.tasks import DataSet, Sizes, Target, Task
from ift_tune.tasks.base import NEUMANN
from ift_tune.tasks.building import make_splits
from ift_tune.testing.contracts import check_task


def line() -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.linspace(-1.0, 1.0, 20)[:, None]
    return inputs, inputs[:, 0].exp()


def build(
    data: tuple[torch.Tensor, torch.Tensor],
    device: torch.device,
    seed: int,
    *,
    weights_seed: int | None = None,
    scale: float = 1.0,
    other_curvature: bool = False,
    forgets_the_seed: bool = False,
) -> BilevelProblem:
    inputs, targets = data
    if weights_seed is not None:
        torch.manual_seed(weights_seed)
    if forgets_the_seed:
        torch.seed()
    model = nn.Sequential(nn.Linear(1, 1), nn.Flatten(0)).to(device)
    parts = [(inputs[i::4], scale * targets[i::4]) for i in range(4)]
    splits = make_splits(
        *(parts[0], parts[1], parts[2], parts[3]), batch_size=3, device=device, seed=seed
    )
    if other_curvature:
        splits = replace(splits, curvature=splits.val)
    return RegressionProblem(model, WeightDecay(model, init=1e-2), splits)


MINE = Task(
    name="line",
    summary="a line through a curve",
    data="line",
    build=build,
    sizes=Sizes(weights=2, hypers=2, train=5, val=5, search=5, test=5),
    target=Target("retrained_test_loss", 0.1, "a line cannot do better"),
    settings={**NEUMANN, "inner_steps": 5, "inner_lr": 0.1},
    budget=tasks.get("digits-cleaning").budget,
    source=DataSet(line),
)


def test_a_task_of_ones_own_with_its_own_data_passes_and_random_numbers_go_on() -> None:
    before = torch.get_rng_state()
    check_task(MINE)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("changes", "law", "what"),
    [
        ({"summary": "two\nlines"}, "declares itself", "summary is 'two"),
        ({"name": "my line"}, "declares itself", "not a word for a command line"),
        ({"sizes": replace(MINE.sizes, test=0)}, "declares itself", "0 test are declared"),
        ({"small": {"width": 3}}, "declares itself", "small sets ['width'], which are no options"),
        ({"settings": {"meta_lrr": 1.0}}, "configuration is valid", "did you mean 'meta_lr'"),
        ({"settings": {"inner_lr": -1.0}}, "configuration is valid", "above 0, got -1.0"),
        ({"build": lambda *parts: build(*parts)}, "travels", "from functions and classes"),
        ({"sizes": replace(MINE.sizes, hypers=3)}, "its sizes", "the problem has 2 hypers, not 3"),
        ({"build": partial(build, forgets_the_seed=True)}, "a seed decides all", "one seed differ"),
        ({"build": partial(build, weights_seed=3)}, "a seed decides all", "same for all seeds"),
        ({"build": partial(build, other_curvature=True)}, "training data", "other examples"),
        ({"build": partial(build, scale=1e30)}, "outer steps on embedded data", "finite"),
        ({"target": Target("test_error", 0.1, "?")}, "outer steps", "'test_error' is not measured"),
    ],
)
def test_what_is_not_as_declared_is_named(changes: Any, law: str, what: str) -> None:
    with pytest.raises(CheckFailedError, match="the task") as caught:
        check_task(replace(MINE, **changes))
    message = str(caught.value)
    assert law in message
    assert what in message


def test_all_that_is_wrong_is_listed_at_once() -> None:
    changed = replace(MINE, summary="", sizes=replace(MINE.sizes, hypers=3))
    with pytest.raises(CheckFailedError) as caught:
        check_task(changed)
    assert len(re.findall("^  - ", str(caught.value), re.MULTILINE)) == 2


def test_sizes_are_of_real_data_which_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IFT_TUNE_DATA", raising=False)
    check_task(tasks.get("mnist-distill", embedded=True))
    with pytest.raises(CheckFailedError, match="mnist: no data root given"):
        check_task(tasks.get("mnist-distill"))
