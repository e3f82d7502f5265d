"""A packed comparison has the tables of one by one, whoever diverges, is killed or stays alone."""

from __future__ import annotations

import functools
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from processes import finish, rows_in
from processes import ift_tune as ift_tune_process
from tiny_comparisons import Killed, Killer, assert_same_tables, run
from tiny_comparisons import comparison as of_clouds
from torch import Tensor, nn

import ift_tune
from ift_tune import Budget, Comparison, MetaConfig, Neumann, Nystrom, Splits, UsageError
from ift_tune.joint.packed import Pack
from ift_tune.joint.packed.losses import PackedLosses

OWN = {"run_id", "wall_seconds", "peak_memory_bytes", "device"}
ESTIMATES = {"alpha_lambda_max", "diagnosis"}  # which rounding may move further than the rest
CONFIG = MetaConfig(inverse=Neumann(1, 0.1), inner_steps=3, meta_lr=0.05, inner_lr=0.05)


def splits_of(
    seed: int, dtype: torch.dtype, *, index: bool = False, sizes: tuple[int, ...] = (22, 11, 13, 9)
) -> Splits:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(sum(sizes), 4, generator=generator, dtype=dtype)
    noise = torch.randn(len(inputs), 3, generator=generator, dtype=dtype)
    return Splits.from_arrays(
        inputs,
        (inputs[:, :3] + 0.7 * noise).argmax(1),
        sizes=dict(zip(("train", "val", "search", "test"), sizes, strict=True)),
        batch_size={"train": 6, "val": 5, "search": 4},
        index=index,
        dtype=dtype,
        seed=seed,
    )


class Scaled(nn.Module):
    """A net over inputs that are scaled by a buffer, which another seed has other values of."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.scale: Tensor
        self.register_buffer("scale", 0.5 + torch.rand(4, generator=generator, dtype=dtype))
        torch.manual_seed(seed)  # a factory's draws are put back
        self.layers = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).to(dtype)

    def forward(self, inputs: Tensor) -> Any:
        return self.layers(inputs * self.scale)


def make(
    config: MetaConfig,
    device: torch.device,
    seed: int,
    *,
    dtype: torch.dtype = torch.float64,
    weighted: bool = False,
) -> ift_tune.ClassificationProblem:
    """A small net with other data, initial weights and a buffer for each seed."""
    model = Scaled(seed, dtype)
    hyper: ift_tune.HyperKind = ift_tune.WeightDecay(model, "weight", init=0.02)
    if weighted:
        hyper = ift_tune.Compose(
            {"decay": hyper, "examples": ift_tune.ExampleWeights(22).to(dtype)}
        )
    return ift_tune.ClassificationProblem(model, hyper, splits_of(seed, dtype, index=weighted))


def compared(factory: Any = make, limit: float = 50.0, **changes: Any) -> Comparison:
    whole = Comparison(
        factory,
        Budget(gradient_equivalents=limit),
        config=CONFIG,
        trial_budget=Budget(outer_steps=3),
        training_steps=20,
        device="cpu",
    )
    return replace(whole, **changes)


def same(one: Path, other: Path, tolerance: float) -> pd.DataFrame:
    """Compare both tables, and return that of the trials."""
    for name, keys in (("steps", ["arm", "seed", "trial", "step"]), ("trials", None)):
        mine, theirs = (
            pd.read_parquet(path / f"{name}.parquet")
            .sort_values(keys or ["arm", "seed", "trial"])
            .reset_index(drop=True)
            for path in (one, other)
        )
        columns = [c for c in mine if c not in OWN | ESTIMATES]
        assert set(columns) == {c for c in theirs if c not in OWN | ESTIMATES}
        pd.testing.assert_frame_equal(
            mine[columns], theirs[columns], rtol=tolerance, atol=tolerance * 1e-2
        )
    return theirs


def both(
    whole: Comparison, folder: Path, *arms: str, tolerance: float = 1e-10, **how: Any
) -> pd.DataFrame:
    """Run a comparison one by one and packed, and return the packed one's trials."""
    run(whole, folder / "one", *arms, **how)
    run(whole, folder / "packed", *arms, pack=16, **how)
    return same(folder / "one", folder / "packed", tolerance)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [message for message in caplog.messages if "not packed" in message]


ADAPTIVE = ("random", "tpe", "asha", "none")
STAGED = ("ift", "ift+tpe", "ift+val", "loss-ranking", "random+val", "val")


@pytest.mark.parametrize(
    "arms",
    [ADAPTIVE, pytest.param(STAGED, marks=pytest.mark.nightly)],
    ids=["black-box", "ift and staged"],
)
def test_tables_are_those_of_one_by_one(
    arms: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = compared(functools.partial(make, weighted=arms is STAGED))
    trials = both(whole, tmp_path, *arms, seeds=2)
    assert not said(caplog)
    assert set(trials["arm"]) == set(arms)
    spent = trials.groupby(["arm", "seed"])["gradient_equivalents"].sum()
    assert ((spent > 0) & (spent <= 50.0 + 1e-9)).all()


@pytest.mark.nightly
def test_single_precision_is_single_precision(tmp_path: Path) -> None:
    whole = compared(functools.partial(make, dtype=torch.float32), 40.0)
    both(whole, tmp_path, "ift", "random", "val", seeds=2, tolerance=1e-5)


def test_steps_are_taken_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    train = PackedLosses.train

    def noted(self: PackedLosses, weights: Tensor, *others: Any) -> Tensor:
        rows.append(len(weights))
        return train(self, weights, *others)

    monkeypatch.setattr(PackedLosses, "train", noted)
    run(compared(limit=30.0), tmp_path / "run", "ift", "random", seeds=3, pack=4)
    assert max(rows) == 4  # of six searches
    assert sum(rows) / len(rows) > 2.0


def overflowing(
    config: MetaConfig, device: torch.device, seed: int
) -> ift_tune.ClassificationProblem:
    """The problem, but one seed's training inputs are so large that its loss is not finite."""
    problem = make(config, device, seed)
    if seed == 1:
        problem.splits.train.tensors[0].mul_(1e308)  # type: ignore[attr-defined]
    return problem


def test_who_diverges_leaves_the_others_alone(tmp_path: Path) -> None:
    trials = both(compared(overflowing, 12.0), tmp_path, "ift", "random", seeds=3)
    reasons = trials.groupby("seed")["stop_reason"].agg(set)
    assert "nonfinite" in reasons[1]
    assert reasons[0] | reasons[2] <= {"done", "pruned"}


@pytest.mark.parametrize(
    ("event", "number", "then"),
    [("step", 9, 16), pytest.param("step", 13, 1, marks=pytest.mark.nightly)],
)
def test_killed_and_resumed(
    event: str, number: int, then: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ift_tune.trial.runner.CHECKPOINT_SECONDS", 0.0)
    whole, arms = compared(limit=30.0), ("ift", "random")
    run(whole, tmp_path / "whole", *arms, seeds=2)
    callbacks = [Killer(event, number)]
    with pytest.raises(Killed):
        run(whole, tmp_path / "killed", *arms, seeds=2, pack=16, callbacks=callbacks)
    left = [*tmp_path.glob("killed/cells/*/trial-*/checkpoint.pt")]
    assert event != "step" or len(left) > 1  # several were under way
    assert len([*tmp_path.glob("killed/cells/*/finished")]) < 4
    run(whole, tmp_path / "killed", *arms, seeds=2, pack=then, resume=True)
    same(tmp_path / "whole", tmp_path / "killed", 1e-10)


def test_an_error_of_the_problem_ends_the_comparison_and_saves_the_rest(tmp_path: Path) -> None:
    def broken(*arguments: Any) -> ift_tune.ClassificationProblem:
        if len([*tmp_path.glob("run/cells/*/trial-*1")]) > 1:
            raise RuntimeError("no more of it")
        return make(*arguments)

    with pytest.raises(RuntimeError, match="no more of it"):
        run(compared(broken), tmp_path / "run", "random", "tpe", seeds=2, pack=16)
    statuses = ift_tune.load_results(tmp_path / "run").trials["status"]
    assert {"failed", "interrupted"} <= set(statuses)


# What is not packed


def test_loaders_run_one_by_one_to_the_bit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = of_clouds(30.0, batches="mini")  # from a DataLoader
    run(whole, tmp_path / "one", "ift", "random")
    run(whole, tmp_path / "packed", "ift", "random", pack=16)
    (message,) = said(caplog)
    assert "one by one" in message
    assert "DataLoader for Splits.train" in message
    assert_same_tables(tmp_path / "one", tmp_path / "packed")


class Counted(ift_tune.Callback):
    """Has a hook of the optimisation."""

    steps = 0

    def on_outer_step_end(self, joint: ift_tune.JointOptimizer, metrics: dict[str, float]) -> None:
        self.steps += 1


@pytest.mark.parametrize(
    ("changes", "hooks", "told"),
    [
        pytest.param(
            *({"config": replace(CONFIG, inverse=Nystrom(rank=2))}, [], "the inverse 'nystrom'"),
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            *({"config": replace(CONFIG, warm_start=True)}, [], "warm_start=True"),
            marks=pytest.mark.nightly,
        ),
        ({}, [Counted()], "Counted has hooks of the optimisation"),
    ],
    ids=["inverse", "warm start", "hooks"],
)
def test_what_ift_cannot_pack_leaves_the_other_arms_packed(
    changes: dict[str, Any],
    hooks: list[Counted],
    told: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows: list[int] = []
    train = PackedLosses.train

    def noted(self: PackedLosses, weights: Tensor, *others: Any) -> Tensor:
        rows.append(len(weights))
        return train(self, weights, *others)

    monkeypatch.setattr(PackedLosses, "train", noted)
    both(compared(limit=30.0, **changes), tmp_path, "ift", "random", seeds=2, callbacks=hooks)
    (message,) = said(caplog)
    assert message.startswith("trials of ift take their steps by themselves")
    assert told in message
    assert 2 in rows  # those of random search
    assert all(hook.steps > 0 for hook in hooks)


def reading_settings(
    config: MetaConfig, device: torch.device, seed: int
) -> ift_tune.ClassificationProblem:
    """Another problem for each learning rate: what is searched decides how labels are smoothed."""
    problem = make(config, device, seed)
    model, smoothing = problem.model, min(5.0 * config.inner_lr, 0.9)

    class Smoothed(ift_tune.ClassificationProblem):
        def train_loss(self, batch: Any) -> Tensor:
            return nn.functional.cross_entropy(
                self.model(batch[0]), batch[1], label_smoothing=smoothing
            )

    return Smoothed(model, problem.hyper, problem.splits)


def measuring_settings(
    config: MetaConfig, device: torch.device, seed: int
) -> ift_tune.ClassificationProblem:
    """The same for what is measured."""
    problem = make(config, device, seed)
    rate = config.inner_lr

    class Measured(ift_tune.ClassificationProblem):
        def metrics(self, batch: Any) -> dict[str, Any]:
            return super().metrics(batch) | {"rate_loss": self.val_loss(batch) * rate}

    return Measured(problem.model, problem.hyper, problem.splits)


def judging_settings(
    config: MetaConfig, device: torch.device, seed: int
) -> ift_tune.ClassificationProblem:
    """The same for what λ learns from."""
    problem = make(config, device, seed)
    rate = config.meta_lr

    class Judged(ift_tune.ClassificationProblem):
        def val_loss(self, batch: Any) -> Tensor:
            return super().val_loss(batch) * (1.0 + rate)

    return Judged(problem.model, problem.hyper, problem.splits)


@pytest.mark.parametrize(
    ("factory", "arm", "told"),
    [
        (reading_settings, "random", "gradient"),
        pytest.param(
            *(measuring_settings, "random", "search_rate_loss"), marks=pytest.mark.nightly
        ),
        (judging_settings, "ift+tpe", "validation loss"),
    ],
)
def test_a_trial_of_another_problem_is_found_out_and_goes_on_by_itself(
    factory: Any, arm: str, told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limit = 90.0 if arm == "ift+tpe" else 30.0  # the bound on a first step is high
    whole = compared(factory, limit, trial_budget=Budget(outer_steps=2))
    trials = both(whole, tmp_path, arm, "none", seeds=2)
    (message,) = said(caplog)
    assert message.startswith(f"trials of {arm} take")
    assert f"a {told} that differs" in message
    assert (trials["status"] != "failed").all()


def growing(config: MetaConfig, device: torch.device, seed: int) -> Any:
    """Each seed has more training examples than the one before."""
    problem = make(config, device, seed)
    problem.splits = splits_of(seed, torch.float64, sizes=(20 + seed, 11, 13, 9))
    return problem


def drawing(config: MetaConfig, device: torch.device, seed: int) -> Any:
    problem = make(config, device, seed)
    problem.model = nn.Sequential(problem.model, nn.Dropout(0.1))
    problem.hyper = ift_tune.WeightDecay(problem.model, "weight", init=0.02)
    return problem


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"problem_factory": growing}, "other sizes of Splits.train"),
        ({"problem_factory": drawing}, "draws random numbers"),
        ({"config": replace(CONFIG, inner_optimizer="rmsprop")}, "optimizer 'rmsprop'"),
        ({"budget": Budget(seconds=0.2)}, "a budget in seconds cannot be packed"),
        ({"trial_budget": Budget(seconds=0.2)}, "a budget in seconds cannot be packed"),
    ],
    ids=["sizes", "dropout", "optimizer", "seconds", "seconds of a trial"],
)
def test_what_no_trial_can_pack_is_said_and_runs_one_by_one(
    changes: dict[str, Any],
    told: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(PackedLosses, "evaluate", None)  # no pack measures anything
    results = run(compared(limit=15.0, **changes), tmp_path / "run", "random", seeds=2, pack=16)
    (message,) = said(caplog)
    assert message.startswith("the searches run one by one")
    assert told in message
    assert results.trials["best_value"].notna().any()


def test_a_pack_that_fails_saves_all_and_goes_on_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, arms = compared(limit=30.0), ("ift", "random")
    run(whole, tmp_path / "one", *arms, seeds=2)
    train, left = PackedLosses.train, [14]

    def failing(self: PackedLosses, *arguments: Any) -> Tensor:
        left[0] -= 1
        if left[0] == 0:
            raise torch.OutOfMemoryError("as a GPU says it")
        return train(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(PackedLosses, "train", failing)
        with pytest.raises(UsageError, match="a smaller --pack"):
            run(whole, tmp_path / "packed", *arms, seeds=2, pack=16)
    run(whole, tmp_path / "packed", *arms, seeds=2, resume=True)
    same(tmp_path / "one", tmp_path / "packed", 1e-10)


def test_ray_does_not_pack(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leave pack out, got pack=4"):
        run(compared(), tmp_path / "run", "random", backend="ray", pack=4)
    assert not (tmp_path / "run").exists()


# The command and its processes

CLOUDS = ("terms=1", "meta_lr=0.1", "inner_steps=2", "inner_lr=0.1")
COMMAND = [
    *("compare", "tiny_comparisons:make_packable", "--arms", "random,none", "--budget", "20"),
    *("--training-steps", "6", "--device", "cpu", "--quiet", "--seeds", "3"),
]


@pytest.mark.nightly
def test_the_command_packs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: list[int] = []
    advance = Pack.advance

    def noted(self: Pack, members: Any) -> None:
        taken.append(len(members))
        advance(self, members)

    monkeypatch.setattr(Pack, "advance", noted)
    assert finish(*COMMAND, "--out", str(tmp_path / "no"), "--pack", "0") == 2
    assert "pack must be an integer of at least 1" in capsys.readouterr().err
    assert finish(*COMMAND, "--out", str(tmp_path / "run"), "--pack", "6") == 0
    assert max(taken) == 6


@pytest.mark.nightly
def test_the_command_is_killed_and_resumed(tmp_path: Path) -> None:
    whole = of_clouds(90.0, batches="drop", metric=None, task="tiny_comparisons.make_packable")
    run(whole, tmp_path / "one", "random", "none", seeds=3)
    total, out = rows_in(*tmp_path.glob("one/cells/*/trial-*")), tmp_path / "killed"
    settings = [part for key in CLOUDS for part in ("--set", key)]
    command = [*COMMAND, *settings, "--budget", "90", "--pack", "6", "--out", str(out)]
    path = f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    with ift_tune_process(*command, environment={"PYTHONPATH": path}) as process:
        hit = process.hit(
            signal.SIGKILL, lambda: rows_in(*out.glob("cells/*/trial-*")) > total // 8, 0.02
        )
    assert hit.status == -signal.SIGKILL
    assert rows_in(*out.glob("cells/*/trial-*")) < total
    assert finish(*command, "--resume") == 0
    same(tmp_path / "one", out, 1e-4)


@pytest.mark.nightly
def test_workers_have_a_pack_each(tmp_path: Path) -> None:
    for name, more in (("one", ()), ("packed", ("--pack", "8", "--workers", "2"))):
        assert finish(*COMMAND, "--out", str(tmp_path / name), *more) == 0
    same(tmp_path / "one", tmp_path / "packed", 1e-4)
    owners = {path.read_text() for path in tmp_path.glob("packed/cells/*/owner")}
    assert len(owners) == 2
