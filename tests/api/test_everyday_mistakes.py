"""Everyday mistakes with the public names: each is a `UsageError` in one line that says what is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from torch import nn

import ift_tune
from ift_tune import Budget, Choice, Float, Int, MetaConfig, MetaSpace, UsageError
from ift_tune.testing import Quadratic
from ift_tune.trial.session import run_single
from ift_tune.trial.tables import RunDirectory

BUDGET = Budget(outer_steps=1, retrain=False)


def make(config: MetaConfig, device: torch.device, seed: int) -> Quadratic:
    return Quadratic(seed=seed)


def as_it_is(value: Any) -> Any:
    return value


class Returning(Quadratic):
    """Returns something else than a problem does, where it is told what."""

    def __init__(self, **what: Callable[[Any], Any]) -> None:
        super().__init__()
        self.what = what

    def train_loss(self, batch: Any) -> Any:
        return self.what.get("train", as_it_is)(super().train_loss(batch))

    def val_loss(self, batch: Any) -> Any:
        return self.what.get("val", as_it_is)(super().val_loss(batch))

    def penalty(self) -> Any:
        return self.what.get("penalty", as_it_is)(None)

    def summary(self) -> Any:
        return self.what.get("summary", as_it_is)({})

    def words(self) -> Any:
        return self.what.get("words", as_it_is)("")


LOSSES: dict[str, Callable[[torch.Tensor], Any]] = {
    "a float": lambda loss: loss.item(),
    "a NumPy number": lambda loss: loss.detach().numpy()[()],
    "None": lambda loss: None,
    "a dictionary": lambda loss: {"loss": loss},
    "a tuple": lambda loss: (loss, loss),
    "a vector": lambda loss: loss.repeat(3),
    "an integer": lambda loss: loss.long(),
    "a complex number": lambda loss: loss.to(torch.complex64),
    "no graph": lambda loss: loss.detach(),
    "nowhere": lambda loss: loss.to("meta"),
}


@pytest.mark.parametrize("wrong", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("which", ["train", "val"])
def test_a_wrong_loss_is_named_in_every_step(wrong: Callable[[Any], Any], which: str) -> None:
    problem = Returning(**{which: wrong})
    joint = ift_tune.JointOptimizer(problem, MetaConfig(inner_steps=1))
    before = [h.detach().clone() for h in problem.hypers()]
    with pytest.raises(UsageError, match=f"^{which}_loss must return .* got "):
        joint.step()
    if which == "val":
        with pytest.raises(UsageError, match=f"^{which}_loss must return .* got "):
            joint.baseline_step(train_on_val=True)
    else:
        with pytest.raises(UsageError, match=f"^{which}_loss must return .* got "):
            joint.train_weights(1)
    assert all(torch.equal(h, b) for h, b in zip(problem.hypers(), before, strict=True))


def test_a_loss_of_the_right_form_is_the_very_tensor() -> None:
    from ift_tune.problem.returned import as_loss

    loss = torch.ones((), requires_grad=True)
    assert as_loss(loss, "train_loss") is loss


def on_meta(config: MetaConfig, device: torch.device, seed: int) -> Quadratic:
    problem = Quadratic()
    problem.model.to("meta")
    return problem


FACTORIES: dict[str, Any] = {
    "None": lambda config, device, seed: None,
    "a word": lambda config, device, seed: "problem",
    "a class": lambda config, device, seed: Quadratic,
    "a model": lambda config, device, seed: nn.Linear(2, 2),
    "no parameters": lambda: Quadratic(),
    "two parameters": lambda config, device: Quadratic(),
    "four parameters": lambda config, device, seed, size: Quadratic(),
    "keywords only": lambda *, config, device, seed: Quadratic(),
    "a problem": Quadratic(),
    "a name": "make",
    "nothing": None,
    "on meta": on_meta,
    "a penalty of a number": lambda config, device, seed: Returning(penalty=lambda _: 0.1),
    "a summary of a list": lambda config, device, seed: Returning(summary=lambda _: [1]),
    "words of a number": lambda config, device, seed: Returning(words=lambda _: 3),
}


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_a_wrong_factory_leaves_nothing(factory: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        run_single(factory, BUDGET, out=tmp_path / "a" / "run", device="cpu")
    assert "got " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def study(folder: Path, /, **changes: Any) -> object:
    """Run a study of one short trial."""
    space = MetaSpace({"terms": Int(0, 3)})
    wanted: dict[str, Any] = {"problem_factory": make, "space": space, "budget": BUDGET}
    return ift_tune.run_study(
        **wanted | {"n_trials": 1, "out": folder / "run", "device": "cpu"} | changes
    )


def comparison(folder: Path, /, **changes: Any) -> object:
    """Run the smallest comparison."""
    whole = ift_tune.Comparison(make, Budget(gradient_equivalents=9), training_steps=1)
    wanted: dict[str, Any] = {"comparison": whole, "out": folder / "run"}
    return ift_tune.run_comparison(**wanted | changes)


STUDIES: dict[str, dict[str, Any]] = {
    "a study as a sampler": {"sampler": optuna.create_study()},
    "a grid of a range": {"space": MetaSpace({"meta_lr": Float(0.1, 0.2)}), "sampler": "grid"},
    "brute force on a range": {
        "space": MetaSpace({"meta_lr": Float(0.1, 0.2)}),
        "sampler": "bruteforce",
    },
    "a grid of other keys": {"sampler": optuna.samplers.GridSampler({"alpha": [0.1]})},
    "no time": {"timeout": 0},
    "time as a text": {"timeout": "1h"},
    "an exception's name to catch": {"catch": "RuntimeError"},
    "an exception to catch": {"catch": RuntimeError("x")},
    "an interruption to catch": {"catch": KeyboardInterrupt},
    "a point outside a list": {"enqueue": {"terms": 2}},
    "a point of another space": {"enqueue": [{"tems": 2}]},
    "a point out of range": {"enqueue": [{"terms": 4}]},
    "a point between whole numbers": {"enqueue": [{"terms": 2.5}]},
    "a word as a number": {"enqueue": [{"terms": "2"}]},
    "a number as a point": {"enqueue": [3]},
    "an unknown sampler": {"sampler": "tpee"},
    "a sampler's class": {"sampler": optuna.samplers.CmaEsSampler},
    "a factory of no samplers": {"sampler": lambda seed, number: None},
    "an unknown pruner": {"pruner": "medain"},
    "a pruner's class": {"pruner": optuna.pruners.MedianPruner},
    "no trials": {"n_trials": 0},
    "trials as a text": {"n_trials": "5"},
    "half a trial": {"n_trials": 1.5},
    "no workers": {"workers": 0},
    "two GPUs a trial": {"gpus_per_trial": 2},
    "a storage without a folder": {"storage": "sqlite:///no/such/dir/x.db"},
    "a storage of a number": {"storage": 3},
    "a budget of a number": {"budget": 20},
    "a space of a dictionary": {"space": {"terms": Int(0, 3)}},
    "no space": {"space": "terms"},
    "a configuration of a dictionary": {"config": {"terms": 3}},
    "a negative seed": {"seed": -1},
    "a large seed": {"seed": 2**63},
    "a real seed": {"seed": 0.5},
    "no such device": {"device": "gpu"},
    "the meta device": {"device": "meta"},
    "a metric of a number": {"metric": 3},
    "a callback's class": {"callbacks": [ift_tune.Callback]},
    "a callback of a word": {"callbacks": ["progress"]},
    "a callback outside a list": {"callbacks": ift_tune.Callback()},
    "an empty task": {"task": ""},
    "a directory of a number": {"out": 3},
    "a directory with NUL": {"out": "a\0b"},
    "resume as a text": {"resume": "yes"},
}


@pytest.mark.parametrize("changes", STUDIES.values(), ids=STUDIES)
def test_a_wrong_argument_of_a_study_leaves_nothing(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        study(tmp_path, **changes)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


COMPARISONS: dict[str, dict[str, Any]] = {
    "no seeds": {"seeds": 0},
    "arms as a text": {"arms": "ift"},
    "an unknown arm": {"arms": ["itf"]},
    "an unknown backend": {"backend": "slurm"},
    "a backend of a number": {"backend": 3},
    "seeds past the last": {"first_seed": 2**63 - 1, "seeds": 2},
    "a factory for a comparison": {"comparison": make},
    "on_done of a word": {"on_done": "print"},
}


@pytest.mark.parametrize("changes", COMPARISONS.values(), ids=COMPARISONS)
def test_a_wrong_argument_of_a_comparison_leaves_nothing(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UsageError):
        comparison(tmp_path, **changes)
    assert list(tmp_path.iterdir()) == []


def on(problem: Quadratic) -> ift_tune.JointOptimizer:
    return ift_tune.JointOptimizer(problem, MetaConfig())


VALUES: dict[str, Callable[[], object]] = {
    "a range of a tuple": lambda: MetaSpace({"terms": (0, 20)}),  # type: ignore[dict-item]
    "a Python range": lambda: MetaSpace({"terms": range(9)}),  # type: ignore[dict-item]
    "a space of a list": lambda: MetaSpace([Int(0, 3)]),  # type: ignore[arg-type]
    "Int of reals": lambda: Int(0.5, 3),  # type: ignore[arg-type]
    "Int of texts": lambda: Int("0", "3"),  # type: ignore[arg-type]
    "an endless range": lambda: Float(0.1, float("inf")),
    "a range of NaN": lambda: Float(float("nan"), 1.0),
    "a choice of one text": lambda: Choice("abc"),  # type: ignore[arg-type]
    "a choice of lists": lambda: Choice(([1], [2])),  # type: ignore[arg-type]
    "a budget of a text": lambda: Budget(outer_steps="5"),  # type: ignore[arg-type]
    "a flat list": lambda: MetaConfig.from_flat([3]),  # type: ignore[arg-type]
    "an inverse by name": lambda: MetaConfig(inverse="neumann"),  # type: ignore[arg-type]
    "a decay beside the loss": lambda: MetaConfig(inner_optimizer=torch.optim.AdamW),  # type: ignore[arg-type]
    "an endless rate": lambda: MetaConfig(meta_lr=10**400),
    "terms of a text": lambda: ift_tune.Neumann(terms="3"),  # type: ignore[arg-type]
    "a model for a problem": lambda: on(nn.Linear(2, 2)),  # type: ignore[arg-type]
    "no such split": lambda: on(Quadratic()).evaluate("tset"),
    "half a step": lambda: on(Quadratic()).train_weights(0.5),  # type: ignore[arg-type]
    "results of a number": lambda: ift_tune.load_results(3),  # type: ignore[arg-type]
    "a file for a run": lambda: RunDirectory(__file__),
    "under a file": lambda: RunDirectory(Path(__file__, "deep")),
    "a budget for a trial": lambda: ift_tune.Trial(make, MetaConfig(), 3),  # type: ignore[arg-type]
    "a configuration for a trial": lambda: ift_tune.Trial(make, {}, BUDGET),  # type: ignore[arg-type]
    "an objective's budget": lambda: ift_tune.IFTObjective(make, MetaSpace.default(), 3),  # type: ignore[arg-type]
    "a comparison's budget": lambda: ift_tune.Comparison(make, 3),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("mistake", VALUES.values(), ids=VALUES)
def test_a_wrong_value_is_a_usage_error(mistake: Callable[[], object]) -> None:
    with pytest.raises(UsageError) as caught:
        mistake()
    assert "\n" not in str(caught.value)


def test_there_are_enough_of_them() -> None:
    assert sum(map(len, (LOSSES, LOSSES, FACTORIES, STUDIES, COMPARISONS, VALUES))) >= 60


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    budget = Budget(outer_steps=np.int64(1), retrain=False)  # type: ignore[arg-type]
    config = MetaConfig(meta_lr=np.float32(0.25), inner_steps=np.int64(2))  # type: ignore[arg-type]
    assert config == MetaConfig(meta_lr=0.25, inner_steps=2)
    assert type(config.meta_lr) is float
    space = MetaSpace({"terms": Int(np.int64(0), np.int64(3))})  # type: ignore[arg-type]
    study(
        tmp_path, budget=budget, config=config, space=space, n_trials=np.int64(1), seed=np.int64(3)
    )
    assert list(ift_tune.load_results(tmp_path / "run").trials["seed"]) == [3]


@pytest.mark.parametrize("changes", [{"sampler": "random"}, {"pruner": "median"}], ids=str)
def test_samplers_and_pruners_have_names(changes: dict[str, Any], tmp_path: Path) -> None:
    study(tmp_path, **changes)
    assert list(ift_tune.load_results(tmp_path / "run").trials["status"]) == ["complete"]


def test_a_factory_that_workers_cannot_import(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="top of an importable module"):
        study(tmp_path, problem_factory=lambda c, d, s: Quadratic(), workers=2)
    assert list(tmp_path.iterdir()) == []
