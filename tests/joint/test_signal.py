"""Signal over noise: against every validation example's own hypergradient, and undisturbing."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ift_tune import (
    BilevelProblem,
    Budget,
    ClassificationProblem,
    Compose,
    ConjugateGradient,
    Dense,
    ExampleWeights,
    Identity,
    Inverse,
    JointOptimizer,
    LabelSmoothing,
    MetaConfig,
    Neumann,
    Nystrom,
    Splits,
    Trial,
    UsageError,
    WeightDecay,
    run_single,
)
from ift_tune.joint.watch import Watch
from ift_tune.trial.diagnoses import diagnose

TRAIN, VAL = 40, 60
CONFIG = MetaConfig(
    inverse=Dense(), inner_steps=30, inner_lr=0.05, meta_lr=0.02, start_check=False, signal_every=1
)


def make(
    _config: MetaConfig,
    _device: torch.device,
    seed: int,
    *,
    normalised: bool = False,
    val_batch: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> ClassificationProblem:
    generator = torch.Generator().manual_seed(seed)
    count = TRAIN + VAL + 40
    inputs = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    targets = (inputs[:, :3] + 1.5 * noise).argmax(1)
    between = [nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)] if normalised else []
    model = nn.Sequential(nn.Linear(5, 4 if normalised else 3), *between).to(dtype)
    hyper = Compose(
        {
            "decay": WeightDecay(model, "tensor", init=0.05),
            "examples": ExampleWeights(TRAIN).to(dtype),
            "smoothing": LabelSmoothing(3, init=0.1).to(dtype),
        }
    ).to(dtype)
    splits = Splits.from_arrays(
        inputs,
        targets,
        sizes={"train": TRAIN, "val": VAL, "search": 20, "test": 20},
        batch_size={"val": val_batch},
        index=True,
        seed=seed,
        dtype=dtype,
    )
    return ClassificationProblem(model, hyper, splits)


def begin(config: MetaConfig, **options: Any) -> JointOptimizer:
    torch.manual_seed(1)
    return JointOptimizer(make(config, torch.device("cpu"), 1, **options), config, seed=4)


def of_each_example(problem: BilevelProblem) -> Tensor:
    """Return the hypergradient of each validation example's loss, shape (VAL, H), written out."""
    w, h = problem.weights(), problem.hypers()
    (train,), (val,) = problem.splits.train, problem.splits.val
    penalty = problem.penalty()
    assert penalty is not None
    loss = problem.train_loss(train) + penalty.value(w)
    slope = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, w, create_graph=True)])
    hessian, mixed = [], []
    for s in slope:
        found = torch.autograd.grad(s, [*w, *h], retain_graph=True)
        flat = [t.reshape(-1) for t in found]
        hessian.append(torch.cat(flat[: len(w)]))
        mixed.append(torch.cat(flat[len(w) :]))
    solution = torch.linalg.solve(torch.stack(hessian), torch.stack(mixed))
    losses = F.cross_entropy(problem.model(val[0]), val[1], reduction="none")
    rows = []
    for each in losses:
        v = torch.cat([g.reshape(-1) for g in torch.autograd.grad(each, w, retain_graph=True)])
        rows.append(-(v @ solution))
    return torch.stack(rows)


def squared_error(rows: Tensor) -> float:
    """Return the squared standard error of the mean of rows, all entries together."""
    return float((rows - rows.mean(0)).square().sum() / (len(rows) * (len(rows) - 1)))


def bootstrapped(rows: Tensor) -> float:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(rows), (2000, len(rows)), generator=generator)
    means = torch.stack([rows[c].mean(0) for c in chosen])
    return float((means - means.mean(0)).square().sum(1).mean())


@pytest.mark.parametrize("parts", [2, 4, 12])
def test_the_noise_is_the_standard_error_over_validation_examples(parts: int) -> None:
    joint = begin(CONFIG.updated({"signal_parts": parts}))
    joint.train_weights(400)
    problem, outer = joint.problem, joint._outer
    rows = of_each_example(problem)
    truth = squared_error(rows)
    assert bootstrapped(rows) == pytest.approx(truth, rel=0.05)
    (train,), (val,) = problem.splits.train, problem.splits.val
    measured = []
    for _ in range(300 // parts):
        begun = outer.begin(joint.config, train, val, None, joint._val_parts(val))
        assert begun.signal is not None
        assert begun.signal.parts == parts
        found = begun.signal.signal.read()
        measured.append(sum(found.errors))
        joint.outer_steps += 1  # other parts
    # The length of the whole is the mean's.
    assert sum(found.lengths) == pytest.approx(float(rows.mean(0).square().sum()), rel=1e-8)
    assert sum(measured) / len(measured) == pytest.approx(truth, rel=0.2)


def test_the_column_says_signal_over_noise_of_all_and_of_each_kind() -> None:
    joint = begin(CONFIG.updated({"inner_steps": 400, "signal_parts": VAL}))
    problem = joint.problem
    twin = begin(joint.config)
    twin.train_weights(400)
    rows = of_each_example(twin.problem)
    row = joint.step()
    sizes = [h.numel() for h in problem.hypers()]
    kinds = dict(zip(("decay", "examples", "smoothing"), _columns(sizes), strict=True))
    for name, part in {"": slice(None), **{f".{k}": p for k, p in kinds.items()}}.items():
        error = squared_error(rows[:, part])
        length = float(rows[:, part].mean(0).square().sum())
        expected = math.sqrt(max(0.0, length - error) / error)
        assert row[f"hypergradient_signal{name}"] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def _columns(sizes: list[int]) -> list[slice]:
    assert len(sizes) == 4  # two decays, and two others
    ends = [0, sizes[0] + sizes[1], sizes[0] + sizes[1] + sizes[2], sum(sizes)]
    return [slice(a, b) for a, b in pairwise(ends)]


@pytest.mark.parametrize(
    ("inverse", "changes"),
    [
        (Neumann(terms=3), {}),
        (Neumann(terms=2), {"warm_start": True}),
        (Identity(), {}),
        (Nystrom(rank=4, damping=0.1), {}),
        (ConjugateGradient(max_steps=4), {"curvature": "gauss_newton"}),
        (Neumann(terms=2), {"products": "difference"}),
        pytest.param(Neumann(terms=2), {"memory_budget": 60_000}, marks=pytest.mark.nightly),
    ],
    ids=lambda value: getattr(value, "name", None) or "-".join(value),
)
def test_lambda_is_the_same_with_and_without(inverse: Inverse, changes: dict[str, Any]) -> None:
    usual = CONFIG.updated({"inverse": inverse.name}).updated(
        {"inner_steps": 5, "signal_every": 2, "start_check": True, **changes}
    )
    with_, without = (
        begin(c, normalised="memory_budget" not in changes, val_batch=20)
        for c in (usual, usual.updated({"signal_every": 0}))
    )
    for step in range(1, 3):
        bound = with_.max_step_cost()
        before = with_.cost.gradient_equivalents
        rows = with_.step(), without.step()
        assert with_.cost.gradient_equivalents - before <= bound + 1e-9
        assert ("hypergradient_signal" in rows[0]) == (step % 2 == 0)
        assert "hypergradient_signal" not in rows[1]
        for name in ("train_loss", "hypergradient_norm"):
            assert rows[0][name] == rows[1][name]
    for mine, theirs in zip(with_.problem.hypers(), without.problem.hypers(), strict=True):
        assert torch.equal(mine, theirs)
    assert with_.cost.gradient_equivalents > without.cost.gradient_equivalents


def test_products_by_differences_and_parts_in_micro_batches_measure_the_same() -> None:
    config = CONFIG.updated({"inverse": "neumann", "terms": 3, "alpha": 0.3})
    found = []
    for changes in ({}, {"products": "difference"}, {"memory_budget": 60_000}):
        joint = begin(config.updated(changes), normalised=changes != {"memory_budget": 60_000})
        if changes == {}:
            plain = begin(config)
            plain.train_weights(50)
            found.append(plain.step()["hypergradient_signal"])
        joint.train_weights(50)
        found.append(joint.step()["hypergradient_signal"])
    assert found[2] == pytest.approx(found[1], rel=1e-3)  # both with running statistics
    assert found[3] == pytest.approx(found[0], rel=1e-6)


def test_what_it_costs_is_a_solve_for_each_part() -> None:
    config = CONFIG.updated({"inverse": "neumann", "terms": 3, "alpha": 0.3, "inner_steps": 2})
    with_, without = begin(config), begin(config.updated({"signal_every": 0}))
    costs = [j.step()["gradient_equivalents"] for j in (with_, without)]
    # For each of 4 parts three products and the mixed one, and the validation gradient once more.
    assert costs[0] - costs[1] == pytest.approx(4 * (3 + 1) * 2.0 + VAL / TRAIN)
    assert with_.cost.hvps - without.cost.hvps == 12


@pytest.mark.parametrize("inverse", [Dense(), Nystrom(rank=6), Neumann(terms=3, alpha=0.1)])
def test_the_bound_on_its_cost_counts_shared_work_once(inverse: Inverse) -> None:
    joint = begin(replace(CONFIG, inverse=inverse))
    joint.step()
    bound, before = joint.max_step_cost(), joint.cost.gradient_equivalents
    joint.step()
    spent = joint.cost.gradient_equivalents - before
    assert spent <= bound <= 1.2 * spent


def test_weights_that_begin_anew_do_not_make_lambda_forget_that_its_signal_is_gone() -> None:
    watch = Watch()
    for signal in (0.5, 0.2, 0.1):
        watch.measured(signal)
        watch.begin_anew()
    assert watch.faint == 3
    watch.measured(1.5)
    assert watch.faint == 0


def test_a_signal_that_is_gone_ends_the_trial(tmp_path: Path) -> None:
    config = CONFIG.updated(
        {"inverse": "neumann", "signal_every": 2, "signal_patience": 2, "meta_lr": 0.3}
    )

    def trial() -> Trial:
        budget = Budget(outer_steps=120, retrain=False, eval_every=3)
        made = Trial(make, config, budget, device="cpu", seed=1)
        made.setup()
        return made

    whole, rows = trial(), []
    while whole.stop_reason is None:
        rows.append(whole.step() or {})
    signals = [r["hypergradient_signal"] for r in rows]
    assert len(rows) < 120
    assert whole.stop_reason.value == "done"
    assert signals[-1] < 1.0
    assert signals[-3] < 1.0
    assert "search_loss" in rows[-1]  # the last step of a trial is evaluated
    faint = [s is not None and s < 1.0 for s in signals[1::2]]
    assert not any(a and b for a, b in pairwise(faint[:-1]))
    begun, later = trial(), trial()
    for _ in range(len(rows) - 1):
        begun.step()
    begun.save(tmp_path / "checkpoint.pt")
    later.load(tmp_path / "checkpoint.pt")
    later.step()
    assert later.stop_reason is whole.stop_reason
    later.save(tmp_path / "ended.pt")
    ended = trial()
    ended.load(tmp_path / "ended.pt")
    assert ended.stop_reason is whole.stop_reason


def test_a_batch_that_cannot_be_cut_is_refused_by_name(tmp_path: Path) -> None:
    class Odd(ClassificationProblem):
        def val_loss(self, batch: Any) -> Tensor:
            return super().val_loss(batch[0])

    made = make(CONFIG, torch.device("cpu"), 1)
    splits = made.splits
    (val,) = splits.val
    splits = Splits(splits.train, [(val, torch.zeros(3))], splits.search, splits.test)
    odd = Odd(made.model, made.hyper, splits)
    refused = "leave signal_every out, got tensors with 3 and 60 rows"
    with pytest.raises(UsageError, match=refused):
        JointOptimizer(odd, CONFIG).step()
    later = CONFIG.updated({"signal_every": 4})
    with pytest.raises(UsageError, match=refused):  # before the first step, and anything written
        run_single(lambda *_: odd, Budget(outer_steps=3), config=later, out=tmp_path, device="cpu")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"signal_every": -1}, "signal_every"),
        ({"signal_parts": 1}, "signal_parts"),
        ({"signal_patience": 3}, "set signal_every too"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        MetaConfig(**changes)


def test_memorised_data_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch()
    with caplog.at_level(logging.WARNING):
        for loss, length in [(1.0, 1.0), (5e-4, 5e-3), (5e-4, 5e-3), (0.1, 5e-3)]:
            watch.stepped(loss, 2.0, length, None)
        assert not caplog.records
        for _ in range(5):
            assert watch.stepped(1e-4, 2.0, 4e-3, None)
    assert len(caplog.records) == 1
    assert "reinit_every=5" in caplog.text
    watch.begin_anew()
    assert watch.faint == 0


def test_a_net_that_memorises_is_told_of_and_one_that_begins_anew_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    changes: dict[str, Any] = {"inverse": "neumann", "inner_steps": 10, "signal_every": 0}
    for every, told in ((0, True), (1, False)):
        config = CONFIG.updated({**changes, "reinit_every": every, "inner_lr": 0.02})
        trial = Trial(_memorising, config, Budget(outer_steps=40, retrain=False), device="cpu")
        trial.setup()
        caplog.clear()
        rows = []
        while trial.stop_reason is None:
            rows.append(trial.step() or {})
        assert ("λ gets no signal" in caplog.text) == told
        said = [
            s for s in diagnose(pd.DataFrame(rows)) if s.startswith("the training loss is zero")
        ]
        assert bool(said) == told
        assert all("reinit_every=5" in sentence for sentence in said)


def _memorising(_config: MetaConfig, _device: torch.device, seed: int) -> ClassificationProblem:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(60, 8, generator=generator)
    targets = torch.randint(3, (60,), generator=generator)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
    sizes = {"train": 20, "val": 20, "search": 10, "test": 10}
    splits = Splits.from_arrays(inputs, targets, sizes=sizes, index=True, seed=seed)
    return ClassificationProblem(model, ExampleWeights(20), splits)
