"""Killed and resumed on the CPU gives the same bits as never killed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from ift_tune import (
    Batches,
    ClassificationProblem,
    Compose,
    ConjugateGradient,
    ExampleWeights,
    JointOptimizer,
    MetaConfig,
    Neumann,
    Splits,
    WeightDecay,
)
from ift_tune.base.checkpoints import load_checkpoint, save_checkpoint
from ift_tune.base.errors import CheckpointError
from ift_tune.implicit.inverse import INVERSES
from ift_tune.joint.config import OPTIMIZERS
from ift_tune.problem.batches import Loader

ROWS = 14


def _rows(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(ROWS, 4, generator=generator)
    return inputs, torch.randint(3, (ROWS,), generator=generator), torch.arange(ROWS)


def _in_memory() -> Splits:
    return Splits(
        Batches(*_rows(0), batch_size=4, seed=0),
        Batches(*_rows(1), batch_size=4, seed=1),
        Batches(*_rows(2)),
        Batches(*_rows(3)),
        curvature=Batches(*_rows(0), batch_size=9, seed=9),
    )


def _data_loaders(make: Callable[[int], torch.Generator | None]) -> Splits:
    def loader(seed: int) -> Loader:
        data = TensorDataset(*_rows(seed))
        return DataLoader(data, batch_size=4, shuffle=True, generator=make(seed))

    return Splits(*(loader(seed) for seed in range(4)))


def _one_generator_for_all() -> Splits:
    shared = torch.Generator().manual_seed(7)
    return _data_loaders(lambda _: shared)


def _batch_samplers() -> Splits:
    def loader(seed: int) -> Loader:
        data = TensorDataset(*_rows(seed))
        order = RandomSampler(data, generator=torch.Generator().manual_seed(seed))
        return DataLoader(data, batch_sampler=BatchSampler(order, 4, drop_last=False))

    return Splits(*(loader(seed) for seed in range(4)))


class _Own:
    """A loader of one's own over arrays that others read too, with NumPy's numbers."""

    def __init__(self, rows: tuple[np.ndarray, ...], seed: int) -> None:
        self.rows, self.random = rows, np.random.default_rng(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for chosen in np.split(self.random.permutation(ROWS), [4, 8, 12]):
            yield tuple(torch.from_numpy(column[chosen]) for column in self.rows)


def _own_loaders() -> Splits:
    rows = tuple(column.numpy() for column in _rows(0))
    return Splits(*(_Own(rows, seed) for seed in range(4)))


def _one_loader_for_two() -> Splits:
    loader = Batches(*_rows(0), batch_size=4, seed=3)
    whole = Batches(*_rows(2))
    return Splits(loader, Batches(*_rows(1)), whole, whole, curvature=loader)


LOADERS: dict[str, Callable[[], Splits]] = {
    "in memory": _in_memory,
    "shuffled": lambda: _data_loaders(lambda _: None),
    "shuffled, own generators": lambda: _data_loaders(lambda s: torch.Generator().manual_seed(s)),
    "shuffled, one generator for all": _one_generator_for_all,
    "batch samplers with generators": _batch_samplers,
    "loaders of one's own": _own_loaders,
    "one loader for two splits": _one_loader_for_two,
}


def _problem(splits: Splits) -> ClassificationProblem:
    """Return a net with dropout and batch normalisation, and two kinds of hyperparameters."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 3)
    )
    hyper = Compose(
        {"decay": WeightDecay(model, "weight", init=0.05), "examples": ExampleWeights(ROWS)}
    )
    return ClassificationProblem(model, hyper, splits)


def _config(**changes: Any) -> MetaConfig:
    return MetaConfig(**{"inverse": Neumann(terms=2), "inner_steps": 2, **changes})


def _joint(config: MetaConfig, loaders: str = "in memory", seed: int = 1) -> JointOptimizer:
    return JointOptimizer(_problem(LOADERS[loaders]()), config, seed=seed)


def _everything(joint: JointOptimizer) -> dict[str, Tensor]:
    problem = joint.problem
    return {
        f"{part}.{name}": tensor.detach().clone()
        for part, module in (("model", problem.model), ("hyper", problem.hyper))
        for name, tensor in module.state_dict().items()
    }


def _run(joint: JointOptimizer, steps: int) -> list[dict[str, float]]:
    """Step, evaluating now and then as a trial does."""
    found = []
    for _ in range(steps):
        metrics = joint.step()
        if joint.outer_steps % 2 == 0:
            metrics |= joint.evaluate("search", charge=True)
        found.append(metrics)
    return found


def _assert_resumes(make: Callable[[], JointOptimizer], before: int, path: Path) -> None:
    """Compare a run that was never stopped with one saved after `before` steps."""
    joint = make()
    _run(joint, before)
    save_checkpoint(path, joint.state_dict())
    expected = _run(joint, 4)

    resumed = make()
    resumed.load_state_dict(load_checkpoint(path))
    torch.manual_seed(987)  # what others draw meanwhile does not matter
    assert _run(resumed, 4) == expected
    ours, theirs = _everything(resumed), _everything(joint)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert resumed.outer_steps == joint.outer_steps
    assert resumed.inner_steps == joint.inner_steps
    assert resumed.status is joint.status
    assert resumed.skips == joint.skips
    assert resumed.cost == joint.cost


@pytest.mark.parametrize("loaders", sorted(LOADERS))
@pytest.mark.parametrize("before", [0, 1, 3])
def test_every_kind_of_loader_goes_on(loaders: str, before: int, tmp_path: Path) -> None:
    _assert_resumes(lambda: _joint(_config(), loaders), before, tmp_path / "c.pt")


@pytest.mark.parametrize("warm_start", [False, True])
@pytest.mark.parametrize("name", sorted(INVERSES))
def test_every_inverse_goes_on(name: str, warm_start: bool, tmp_path: Path) -> None:
    inverse = INVERSES[name]()
    warm_start = warm_start and inverse.refines
    config = _config(inverse=inverse, warm_start=warm_start)
    _assert_resumes(lambda: _joint(config), 2, tmp_path / "c.pt")


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimiser_goes_on(optimizer: str, curvature: str, tmp_path: Path) -> None:
    config = _config(meta_optimizer=optimizer, inner_optimizer=optimizer, curvature=curvature)
    _assert_resumes(lambda: _joint(config), 2, tmp_path / "c.pt")


def test_skips_in_a_row_go_on(tmp_path: Path) -> None:
    config = _config(inverse=Neumann(terms=5, alpha=1e5))
    joint = _joint(config)
    assert [metrics["skipped"] for metrics in _run(joint, 2)] == [1.0, 1.0]
    _assert_resumes(lambda: _joint(config), 2, tmp_path / "c.pt")


@pytest.mark.parametrize("loaders", sorted(LOADERS))
@pytest.mark.parametrize("before", [0, 2])
def test_a_run_can_be_taken_back(loaders: str, before: int) -> None:
    joint = _joint(_config(warm_start=True), loaders)
    _run(joint, before)
    state = joint.state_dict()
    expected = _run(joint, 3)
    joint.load_state_dict(state)
    assert _run(joint, 3) == expected


def test_looking_at_the_training_split_does_not_change_what_follows_a_resume(
    tmp_path: Path,
) -> None:
    joint = _joint(_config())
    joint.step()
    joint.evaluate("train")
    save_checkpoint(tmp_path / "c.pt", joint.state_dict())
    expected = _run(joint, 4)
    resumed = _joint(_config())
    resumed.load_state_dict(load_checkpoint(tmp_path / "c.pt"))
    assert _run(resumed, 4) == expected


def _tensors(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, dict):
        return [t for value in state.values() for t in _tensors(value)]
    if isinstance(state, list | tuple):
        return [t for value in state for t in _tensors(value)]
    return []


def test_a_state_shares_no_tensor_with_the_run_it_is_of() -> None:
    config = _config(inverse=ConjugateGradient(max_steps=3), warm_start=True)
    joint = _joint(config)
    joint.step()
    state = joint.state_dict()
    before = [t.clone() for t in _tensors(state)]
    assert len(before) > 20
    _run(joint, 2)
    assert all(torch.equal(a, b) for a, b in zip(_tensors(state), before, strict=True))


def test_loading_shares_no_tensor_with_the_state() -> None:
    """Two runs from one state in one process, as population-based training makes them."""
    config = _config(inverse=ConjugateGradient(max_steps=3), warm_start=True)
    joint = _joint(config)
    joint.step()
    state = joint.state_dict()
    before = [t.clone() for t in _tensors(state)]
    one, two = _joint(config), _joint(config)
    one.load_state_dict(state)
    two.load_state_dict(state)
    expected = _run(one, 3)
    assert _run(two, 3) == expected
    assert all(torch.equal(a, b) for a, b in zip(_tensors(state), before, strict=True))


def test_loading_leaves_the_global_numbers_alone() -> None:
    joint = _joint(_config(), "shuffled")
    joint.step()
    state = joint.state_dict()
    numbers = torch.get_rng_state()
    joint.load_state_dict(state)
    assert torch.equal(numbers, torch.get_rng_state())


def _other_model() -> JointOptimizer:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    return JointOptimizer(ClassificationProblem(model, WeightDecay(model), _in_memory()), _config())


@pytest.mark.parametrize(
    "other",
    [
        _other_model,
        lambda: _joint(_config(inner_optimizer="sgd")),
        lambda: _joint(_config(meta_optimizer="rmsprop")),
        lambda: _joint(_config(), "shuffled"),
    ],
    ids=["model", "inner optimiser", "meta optimiser", "loaders"],
)
def test_the_state_of_another_problem_or_configuration_is_refused(
    other: Callable[[], JointOptimizer],
) -> None:
    stranger = other()
    stranger.step()
    with pytest.raises(CheckpointError, match="belongs to another"):
        _joint(_config()).load_state_dict(stranger.state_dict())


def test_an_incomplete_state_is_refused() -> None:
    joint = _joint(_config())
    joint.step()
    for key in ("model", "random", "cursors"):
        state = joint.state_dict()
        del state[key]
        with pytest.raises(CheckpointError):
            _joint(_config()).load_state_dict(state)


# Inheriting from a run with another configuration


def _heir(state: dict[str, Any], **changes: Any) -> JointOptimizer:
    heir = _joint(_config(**changes), seed=2)
    heir.inherit(state)
    return heir


@pytest.mark.parametrize(
    "changes",
    [
        {"meta_lr": 0.5, "inner_lr": 0.02},
        {"inner_steps": 3, "inverse": ConjugateGradient(max_steps=2), "warm_start": True},
        {"meta_optimizer": "sgd"},
        {"inner_optimizer": "sgd"},
    ],
    ids=["rates", "steps and inverse", "meta optimiser", "inner optimiser"],
)
def test_an_heir_has_the_weights_lambda_progress_and_cost(changes: dict[str, Any]) -> None:
    donor = _joint(_config())
    _run(donor, 3)
    heir = _heir(donor.state_dict(), **changes)
    ours, theirs = _everything(heir), _everything(donor)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (heir.outer_steps, heir.inner_steps) == (donor.outer_steps, donor.inner_steps)
    assert heir.cost == donor.cost
    before = heir.cost.gradient_equivalents
    _run(heir, 2)
    assert heir.outer_steps == donor.outer_steps + 2
    assert heir.inner_steps == donor.inner_steps + 2 * heir.config.inner_steps
    assert heir.cost.gradient_equivalents > before
    assert donor.outer_steps == 3


def test_an_heir_has_its_own_settings_and_a_fresh_optimiser_of_lambda() -> None:
    donor = _joint(_config(inverse=Neumann(terms=5, alpha=1e5)))
    _run(donor, 2)
    assert donor.skips == 2
    heir = _heir(donor.state_dict(), meta_lr=0.5, inner_lr=0.02)
    state = heir.state_dict()
    assert state["outer_optimizer"]["state"] == {}
    assert state["outer_optimizer"]["param_groups"][0]["lr"] == 0.5
    assert state["inner_optimizer"]["param_groups"][0]["lr"] == 0.02
    assert (heir.skips, heir.status) == (0, None)
    assert state["warm_solution"] is None
    assert state["warm_eigenpair"] is None


def test_the_inner_optimiser_goes_on_in_the_heir_if_it_is_of_the_same_kind() -> None:
    donor = _joint(_config())
    _run(donor, 3)
    state = donor.state_dict()
    theirs = _tensors(state["inner_optimizer"]["state"])
    ours = _tensors(_heir(state, inner_lr=0.02).state_dict()["inner_optimizer"]["state"])
    assert len(theirs) > 10
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    other = _heir(state, inner_optimizer="rmsprop").state_dict()
    assert other["inner_optimizer"]["state"] == {}


def test_heirs_share_no_tensor_with_the_state_nor_with_each_other() -> None:
    donor = _joint(_config())
    _run(donor, 2)
    state = donor.state_dict()
    before = [t.clone() for t in _tensors(state)]
    one, two = _heir(state, meta_lr=0.5), _heir(state, meta_lr=0.5)
    expected = _run(one, 3)
    assert _run(two, 3) == expected
    assert all(torch.equal(a, b) for a, b in zip(_tensors(state), before, strict=True))


def test_the_state_of_another_problem_cannot_be_inherited() -> None:
    with pytest.raises(CheckpointError, match="belongs to another problem"):
        _heir(_other_model().state_dict())
    for key in ("model", "hyper", "inner_optimizer"):
        state = _joint(_config()).state_dict()
        del state[key]
        with pytest.raises(CheckpointError, match="belongs to another problem"):
            _heir(state)
