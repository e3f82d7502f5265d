"""Packed trials have the tables of one by one, whoever leaves or is killed; or they are refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ift_tune
from ift_tune import Budget, Choice, Float, Int, MetaConfig, MetaSpace, Splits, UsageError
from ift_tune.joint import outer_loop
from ift_tune.joint.packed.losses import PackedLosses
from ift_tune.joint.start_check import check_start
from ift_tune.trial.tables import RunDirectory

OWN = {"run_id", "wall_seconds", "peak_memory_bytes", "device"}
# Extreme Ritz values of nearly dependent vectors: rounding is all that tells some of them apart.
ESTIMATES = {"alpha_lambda_max", "diagnosis"}
SPACE: dict[str, Any] = {
    "meta_lr": Float(0.01, 0.3, log=True),
    "inner_lr": Float(0.003, 0.03, log=True),
    "inner_steps": Int(2, 5),
}
SERIES: dict[str, Any] = {**SPACE, "terms": Int(0, 4)}


def _splits(dtype: torch.dtype, *, index: bool = False) -> Splits:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(60, 5, generator=generator, dtype=dtype)
    targets = (inputs[:, :3] + 0.3 * torch.randn(60, 3, generator=generator, dtype=dtype)).argmax(1)
    sizes = {"train": 24, "val": 12, "search": 14, "test": 10}
    return Splits.from_arrays(
        inputs, targets, sizes=sizes, batch_size={"train": 7, "search": 6}, index=index, dtype=dtype
    )


def _model(dtype: torch.dtype) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def decay(
    _config: MetaConfig, _device: torch.device, _seed: int, *, per: Any, dtype: torch.dtype
) -> ift_tune.BilevelProblem:
    model = _model(dtype)
    hyper = ift_tune.WeightDecay(model, per, init=0.01)
    return ift_tune.ClassificationProblem(model, hyper, _splits(dtype))


def weighed(
    _config: MetaConfig, _device: torch.device, _seed: int, *, dtype: torch.dtype
) -> ift_tune.BilevelProblem:
    model = _model(dtype)
    hyper = ift_tune.Compose(
        {
            "weights": ift_tune.ExampleWeights(24, init=0.7).to(dtype),
            "smoothing": ift_tune.LabelSmoothing(3).to(dtype),
            "l1": ift_tune.L1Decay(model, "tensor", init=0.01, exclude="bias"),
        }
    )
    return ift_tune.ClassificationProblem(model, hyper, _splits(dtype, index=True))


def scored(
    _config: MetaConfig, _device: torch.device, _seed: int, *, dtype: torch.dtype
) -> ift_tune.BilevelProblem:
    sources = [k % 5 % 3 for k in range(24)]
    hyper = ift_tune.Compose(
        {
            "sources": ift_tune.DomainWeights(sources, max_repetition=1.8).to(dtype),
            "inputs": ift_tune.ExampleScorer(5, hidden=3).to(dtype),
            "losses": ift_tune.ExampleScorer(sees="loss", hidden=2).to(dtype),
        }
    )
    return ift_tune.ClassificationProblem(_model(dtype), hyper, _splits(dtype, index=True))


def search(
    factory: Callable[..., ift_tune.BilevelProblem],
    out: Path,
    pack: int,
    *,
    space: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    steps: int = 4,
    n_trials: int = 5,
    **options: Any,
) -> Any:
    budget = Budget(outer_steps=steps, retrain=options.pop("retrain", False))
    return ift_tune.run_study(
        factory,
        MetaSpace(SERIES if space is None else space),
        budget,
        n_trials=n_trials,
        out=out,
        config=MetaConfig.from_flat(settings or {}),
        device="cpu",
        sampler="random",
        pack=pack,
        **options,
    )


def same_tables(one: Path, other: Path, tolerance: float) -> None:
    for name, keys in (("trials", ["trial"]), ("steps", ["trial", "step"])):
        mine, theirs = (
            pd.read_parquet(path / f"{name}.parquet").sort_values(keys).reset_index(drop=True)
            for path in (one, other)
        )
        own = OWN | ESTIMATES
        columns = [c for c in mine if c not in own]
        assert set(columns) == {c for c in theirs if c not in own}
        pd.testing.assert_frame_equal(
            mine[columns], theirs[columns], rtol=tolerance, atol=tolerance * 1e-2
        )


@pytest.mark.parametrize(
    "dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.nightly)], ids=str
)
@pytest.mark.parametrize(
    ("factory", "space", "settings"),
    [
        (partial(decay, per="weight"), SERIES, {}),
        (partial(decay, per="channel"), SPACE, {"inverse": "conjugate_gradient", "damping": 0.1}),
        (weighed, SPACE | {"alpha": Float(0.05, 0.5)}, {"inner_optimizer": "momentum"}),
        (partial(decay, per="model"), SPACE, {"inverse": "identity", "inner_optimizer": "sgd"}),
        (scored, SPACE | {"alpha": Float(0.05, 0.5)}, {"terms": 2}),
    ],
    ids=["neumann", "conjugate_gradient", "alpha", "identity", "scored"],
)
def test_tables_are_those_of_one_by_one(
    factory: Any, space: Any, settings: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    made = partial(factory, dtype=dtype)
    for pack in (1, 3):
        search(made, tmp_path / str(pack), pack, space=space, settings=settings)
    same_tables(tmp_path / "1", tmp_path / "3", 1e-10 if dtype is torch.float64 else 1e-5)


def convex(
    _config: MetaConfig, _device: torch.device, _seed: int, *, dtype: torch.dtype
) -> ift_tune.BilevelProblem:
    model = nn.Linear(5, 3).to(dtype)
    hyper = ift_tune.WeightDecay(model, "weight", init=0.1)
    return ift_tune.ClassificationProblem(model, hyper, _splits(dtype))


def test_a_series_tells_each_its_next_step_size(tmp_path: Path) -> None:
    space = SPACE | {"terms": Int(3, 9), "alpha_scale": Float(0.5, 1.5)}
    made = partial(convex, dtype=torch.float64)
    for pack in (1, 4):
        search(made, tmp_path / str(pack), pack, space=space, steps=6)
    same_tables(tmp_path / "1", tmp_path / "4", 1e-10)
    steps = pd.read_parquet(tmp_path / "4" / "steps.parquet")
    taken = steps.groupby("trial")["hvps"].diff().dropna()
    terms = steps["terms"][taken.index]
    # The terms, and one where a claim to have converged is looked into: no power iteration.
    assert ((taken - terms) <= 1).all()


def test_settings_of_the_inner_loop_hold_for_each(tmp_path: Path) -> None:
    settings = {"clip_norm": 0.2, "accumulate": 2, "inner_warmup": 3, "inner_schedule": "cosine"}
    space = SPACE | {
        "inverse": Choice(("neumann", "identity")),
        "inner_optimizer": Choice(("adam", "sgd")),
    }
    made = partial(decay, per="tensor", dtype=torch.float64)
    for pack in (1, 4):
        search(made, tmp_path / str(pack), pack, space=space, settings=settings, retrain=True)
    same_tables(tmp_path / "1", tmp_path / "4", 1e-10)


@pytest.mark.parametrize("optimizer", ["adam", pytest.param("momentum", marks=pytest.mark.nightly)])
def test_weights_begin_anew_for_each(optimizer: str, tmp_path: Path) -> None:
    settings = {"inner_schedule": "cosine", "inner_warmup": 2, "inner_optimizer": optimizer}
    space = SERIES | {"reinit_every": Int(0, 3), "reinit_below": Choice((0.0, 0.9))}
    made = partial(weighed, dtype=torch.float64)
    for pack in (1, 3):
        found = search(made, tmp_path / str(pack), pack, space=space, settings=settings, steps=6)
    same_tables(tmp_path / "1", tmp_path / "3", 1e-10)
    assert len(set(found.trials["reinit_every"])) > 1
    assert 0 < (found.trials["reinit_below"] == 0.9).sum() < 5  # empty where it is off


def test_the_signal_is_measured_for_each(tmp_path: Path) -> None:
    settings = {"signal_every": 2, "signal_parts": 3, "signal_patience": 2}
    made = partial(weighed, dtype=torch.float64)
    for pack in (1, 3):
        found = search(made, tmp_path / str(pack), pack, settings=settings, steps=6)
    same_tables(tmp_path / "1", tmp_path / "3", 1e-8)
    measured = found.steps.groupby("step")["hypergradient_signal"].count()
    assert measured[2] == 5
    assert measured[1] == 0
    assert found.steps["hypergradient_signal.smoothing"].notna().any()


def test_the_pruned_and_the_diverged_leave_the_others_alone(tmp_path: Path) -> None:
    space = {"inner_lr": Choice((0.01, 1e200)), "inner_steps": Int(2, 5), "terms": Int(0, 4)}
    made = partial(decay, per="weight", dtype=torch.float64)
    settings = {"inner_optimizer": "sgd"}
    for pack in (1, 4):
        found = search(made, tmp_path / str(pack), pack, space=space, settings=settings, n_trials=8)
    same_tables(tmp_path / "1", tmp_path / "4", 1e-10)
    assert {"nonfinite", "done"} <= set(found.trials["stop_reason"])


def test_pruned_trials_make_room(tmp_path: Path) -> None:
    class Odd(optuna.pruners.BasePruner):
        def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
            return trial.number % 2 == 1 and trial.last_step is not None and trial.last_step >= 2

    made = partial(decay, per="weight", dtype=torch.float64)
    for pack in (1, 2):
        found = search(made, tmp_path / str(pack), pack, pruner=Odd())
    same_tables(tmp_path / "1", tmp_path / "2", 1e-10)
    assert (found.trials["status"] == "pruned").sum() == 2


class _Stop(ift_tune.Callback):
    """Ends the process's loop in the middle of the search, as a kill would."""

    def __init__(self, after: int) -> None:
        self.left = after

    def on_trial_step(self, number: int, row: dict[str, Any]) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "then", [3, pytest.param(1, marks=pytest.mark.nightly)], ids=["packed", "unpacked"]
)
def test_a_killed_search_is_resumed(
    then: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ift_tune.trial.runner.CHECKPOINT_SECONDS", 0.0)
    made = partial(decay, per="weight", dtype=torch.float64)
    search(made, tmp_path / "whole", 1)
    with pytest.raises(KeyboardInterrupt):
        search(made, tmp_path / "killed", 3, callbacks=[_Stop(8)])
    left = RunDirectory(tmp_path / "killed", resume=True)
    assert any((left.trial(n).path / "checkpoint.pt").exists() for n in range(3))
    search(made, tmp_path / "killed", then, resume=True)
    same_tables(tmp_path / "whole", tmp_path / "killed", 1e-10)


class _Branching(ift_tune.ClassificationProblem):
    def train_loss(self, batch: Any) -> Tensor:
        loss = super().train_loss(batch)
        return loss if loss.item() > 0.0 else 2.0 * loss


class _Counting(ift_tune.ClassificationProblem):
    calls = 0

    def train_loss(self, batch: Any) -> Tensor:
        self.calls += 1
        return super().train_loss(batch).mul(1.0 + 0.01 * self.calls)


class _Captured(ift_tune.BilevelProblem):
    """Reads its weights from a list of its own, past the model."""

    def __init__(self) -> None:
        self.model, self.hyper = nn.Linear(5, 3), nn.ParameterList([torch.tensor(-2.0)])
        self.splits = _splits(torch.float32)
        self.own = self.model.weight

    def train_loss(self, batch: Any) -> Tensor:
        raw: Tensor = next(iter(self.hyper.parameters()))
        logits = F.linear(batch[0], self.own) + self.model(batch[0])
        return F.cross_entropy(logits, batch[1]) + raw.exp() * self.own.square().sum()

    def val_loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])


def _of(kind: type[ift_tune.ClassificationProblem], model: nn.Module | None = None) -> Any:
    model = _model(torch.float32) if model is None else model
    return kind(model, ift_tune.WeightDecay(model, "tensor", init=0.01), _splits(torch.float32))


def _with_loader() -> Any:
    problem = _of(ift_tune.ClassificationProblem)
    rows = torch.utils.data.TensorDataset(*_splits(torch.float32).train.tensors)  # type: ignore[attr-defined]
    loader = torch.utils.data.DataLoader(rows, batch_size=6)
    old = problem.splits
    problem.splits = Splits(loader, old.val, old.search, old.test)
    return problem


def _uneven() -> Any:
    problem = _of(ift_tune.ClassificationProblem)
    problem.splits.train.shuffle = False
    return problem


def _hooked() -> Any:
    problem = _of(ift_tune.ClassificationProblem)
    next(iter(problem.model.children())).register_forward_hook(lambda *_: None)
    return problem


def _compiled() -> Any:
    problem = _of(ift_tune.ClassificationProblem)
    problem.model = torch.compile(problem.model)
    return problem


class _OwnOptimizer(ift_tune.ClassificationProblem):
    def configure_inner(self, weights: list[Tensor], config: Any) -> Any:
        return torch.optim.SGD(weights, lr=0.1)


CLASSES = ift_tune.ClassificationProblem
REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "DataLoader for Splits.train": (_with_loader, {}),
    "a last batch of 3": (_uneven, {}),
    "the hooks of model.0": (_hooked, {}),
    "which is compiled": (_compiled, {}),
    "configure_inner": (lambda: _of(_OwnOptimizer), {}),
    "BatchNorm1d": (
        lambda: _of(CLASSES, nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))),
        {},
    ),
    "draws random numbers": (
        lambda: _of(CLASSES, nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 3))),
        {},
    ),
    "branches on numbers": (lambda: _of(_Branching), {}),
    "attribute calls": (lambda: _of(_Counting), {}),
    "from model and hyper alone": (_Captured, {}),
    "the inverse 'nystrom'": (lambda: _of(CLASSES), {"inverse": "nystrom"}),
    "the inner optimizer 'rmsprop'": (lambda: _of(CLASSES), {"inner_optimizer": "rmsprop"}),
    "warm_start=True": (lambda: _of(CLASSES), {"warm_start": True}),
    "products='difference'": (lambda: _of(CLASSES), {"products": "difference"}),
    "memory_budget=2000": (lambda: _of(CLASSES), {"memory_budget": "2KB"}),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of PyTorch's own, by compile
@pytest.mark.parametrize("told", REFUSED)
def test_what_cannot_be_packed_is_refused_before_anything_is_written(
    told: str, tmp_path: Path
) -> None:
    make, settings = REFUSED[told]
    space = {"meta_lr": Float(0.01, 0.1)}
    with pytest.raises(UsageError, match="--pack off") as caught:
        search(lambda *_: make(), tmp_path / "run", 16, space=space, settings=settings)
    assert told in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_trials_of_several_processes_are_refused(tmp_path: Path) -> None:
    made = partial(decay, per="weight", dtype=torch.float32)
    with pytest.raises(UsageError, match=r"processes_per_trial=2 cannot be packed.*--pack off"):
        search(made, tmp_path / "run", 16, processes_per_trial=2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "error", "told"),
    [
        ("train", torch.OutOfMemoryError("as a GPU says it"), "a smaller --pack"),
        ("val", RuntimeError("no rule for it"), "no rule for it.*without --pack"),
        pytest.param(
            *("evaluate", IndexError("out of range"), "out of range.*without --pack"),
            marks=pytest.mark.nightly,
        ),
    ],
    ids=["inner steps", "hypergradient", "measurements"],
)
def test_a_pack_that_fails_leaves_each_of_its_trials_saved(
    method: str,
    error: Exception,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = {"train": 11, "val": 2, "evaluate": 4}  # in the third step of four
    whole, left = getattr(PackedLosses, method), [calls[method]]

    def failing(self: PackedLosses, *arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise error
        return whole(self, *arguments)

    made = partial(decay, per="weight", dtype=torch.float64)
    search(made, tmp_path / "whole", 1)
    with monkeypatch.context() as patched:
        patched.setattr("ift_tune.search.packed.require_packable", lambda *_: True)
        patched.setattr(PackedLosses, method, failing)
        with pytest.raises(UsageError, match=told):
            search(made, tmp_path / "failed", 3)
    found = RunDirectory(tmp_path / "failed", resume=True)
    steps = {found.trial(n).known_steps() for n in range(3)}
    assert len(steps) == 1, "all are at the end of the step that failed"
    assert steps <= {2, 3}, "it failed in the midst of a search"
    assert all((found.trial(n).path / "checkpoint.pt").exists() for n in range(3))
    assert not found.trial(3).path.exists()
    search(made, tmp_path / "failed", 3, resume=True)
    same_tables(tmp_path / "whole", tmp_path / "failed", 1e-10)


class _Scaled(ift_tune.ClassificationProblem):
    scale = 1.0

    def train_loss(self, batch: Any) -> Tensor:
        return super().train_loss(batch).mul(self.scale)


def _by_config(config: MetaConfig, _device: torch.device, _seed: int) -> Any:
    """Build another problem for another learning rate, which nobody can know from outside."""
    problem = _of(_Scaled)
    problem.scale = 2.0 if config.inner_lr > 0.01 else 1.0
    return problem


def test_a_factory_that_reads_what_varies_is_noticed(tmp_path: Path) -> None:
    space = {"inner_lr": Float(0.001, 0.1)}
    points = [{"inner_lr": lr} for lr in (0.005, 0.05, 0.002)]
    with pytest.raises(UsageError, match="trial's own"):
        search(_by_config, tmp_path / "run", 3, space=space, n_trials=6, enqueue=points)
    left = RunDirectory(tmp_path / "run", resume=True)
    saved = [(left.trial(n).path / "checkpoint.pt").exists() for n in range(3)]
    assert saved == [True, False, True], "those that are of one problem with the pack"
    search(_by_config, tmp_path / "run", 1, space=space, n_trials=6, resume=True)
    search(_by_config, tmp_path / "whole", 1, space=space, n_trials=6, enqueue=points)
    same_tables(tmp_path / "whole", tmp_path / "run", 1e-5)


class _Curved(ift_tune.ClassificationProblem):
    """Differs in what neither the loss nor its gradient shows."""

    curvature = mixed = 0.0

    def train_loss(self, batch: Any) -> Tensor:
        here = torch.cat([w.reshape(-1) for w in self.model.parameters()])
        decays = torch.cat([h.reshape(-1) for h in self.hyper.parameters()])
        bent = self.curvature * (here - here.detach()).square().sum()
        crossed = (here - here.detach()).sum() * (decays - decays.detach()).sum()
        loss: Tensor = super().train_loss(batch) + bent + self.mixed * crossed
        return loss


@pytest.mark.parametrize(
    ("what", "named"), [("curvature", "product H·v"), ("mixed", "hypergradient")]
)
def test_second_derivatives_of_a_trial_are_held_against_its_own(
    what: str, named: str, tmp_path: Path
) -> None:
    def by_config(
        config: MetaConfig, device: torch.device, seed: int
    ) -> ift_tune.ClassificationProblem:
        problem: ift_tune.ClassificationProblem = _of(_Curved)
        setattr(problem, what, 0.5 if config.inner_lr > 0.01 else 0.0)
        return problem

    space = {"inner_lr": Float(0.001, 0.1)}
    points = [{"inner_lr": lr} for lr in (0.005, 0.05)]
    settings = {"start_check": False}  # which would find such a loss out
    options: Any = {"n_trials": 2, "enqueue": points, "settings": settings}
    with pytest.raises(UsageError, match=f"a {named} that differs .* from the trial's own"):
        search(by_config, tmp_path / "run", 2, space=space, **options)


def test_the_check_at_the_start_is_made_once_for_trials_of_one_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        checks.append(check_start(*args, **kwargs))
        return checks[-1]

    monkeypatch.setattr(outer_loop, "check_start", counted)
    factory = partial(decay, per="tensor", dtype=torch.float64)
    trials = search(factory, tmp_path / "run", 3).trials
    assert len(checks) == 1
    assert set(trials["start_check_status"]) == {"passed"}
