"""The laws of an arm: what makes a comparison with it fair, and its name readable."""

from __future__ import annotations

import pickle
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pandas as pd
import torch
from torch import Tensor, nn

from ift_tune.base.errors import CheckFailedError, UsageError
from ift_tune.base.interrupt import Interrupt
from ift_tune.base.randomness import derive_seed
from ift_tune.compare.arms import ARMS, Arm
from ift_tune.compare.cell import Cell
from ift_tune.compare.comparison import Comparison
from ift_tune.hyper import Compose, DomainWeights, ExampleWeights, HyperKind, WeightDecay
from ift_tune.hyper.supervised import ClassificationProblem
from ift_tune.implicit.inverse import ConjugateGradient, Neumann
from ift_tune.joint.config import Budget, MetaConfig
from ift_tune.problem.batches import Batches
from ift_tune.problem.problem import Splits
from ift_tune.search.space import Choice
from ift_tune.search.work import Worker, quiet_optuna
from ift_tune.trial.tables import MEASURED_COLUMNS, Results, assemble

SEED = 7
LIMIT = 40.0  # four trainings of the problem below, and half of it pays for a few steps of IFT
ROUNDING = 1.0 + 1e-12
CONTRAST, GROUNDS = 2.5, ("#ffffff", "#15171c")
_SIZES = {"train": 15, "val": 6, "search": 10, "test": 10}

Weighs: TypeAlias = Literal["nothing", "examples", "sources"]
_LAMBDAS: dict[Weighs, Callable[[], HyperKind]] = {
    "nothing": lambda: WeightDecay(nn.Linear(3, 2)),
    "examples": lambda: ExampleWeights(_SIZES["train"]),
    "sources": lambda: DomainWeights([0] * 10 + [1] * 5),
}
"""What λ is, or is beside the decays: in the order in which arms are asked about it."""


def check_arm(arm: Arm, *, others: Iterable[Arm] | None = None) -> None:
    """Check that an arm keeps the laws of a comparison, on a tiny problem, in a second or so.

    It must be known by its name, label, phrase and style; travel to other processes; begin inside
    its space; never exceed its budget; be scored by its best evaluation on the search split; repeat
    itself to the bit; see the splits and initial weights of its seed; let the test split decide
    nothing; and say truly whether it trains on the validation examples. Trials that others build on
    may have no value. Where it refuses the problem for what λ lacks, it is given one whose λ weighs
    the training examples, or else their sources.

    Args:
        arm: What is checked.
        others: The arms it is to be told from. Default: those of the package.

    Raises:
        CheckFailedError: If it breaks a law; all that are broken are listed.

    Example:
        >>> from ift_tune.compare.arms import ARMS
        >>> from ift_tune.testing.contracts import check_arm
        >>> check_arm(ARMS["random"])
    """
    known = [other for other in (others or ARMS.values()) if other.name != arm.name]
    broken = [*_identity(arm, known), *_travels(arm), *_spaces(arm)]
    if not broken:  # a search with a wrong space would fail for that reason alone
        broken = _searches(arm)
    if broken:
        laws = "".join(f"\n- {law}" for law in broken)
        raise CheckFailedError(f"the arm {arm.name!r} breaks laws of a comparison:{laws}")


def _identity(arm: Arm, others: list[Arm]) -> Iterator[str]:
    if not re.fullmatch(r"[a-z0-9][a-z0-9+_-]*", arm.name):
        yield f"its name is to be small letters, digits, '+', '-' and '_', got {arm.name!r}"
    for part in ("label", "phrase", "summary"):
        text = getattr(arm, part)
        if not text or text != " ".join(text.split()):
            yield f"its {part} is to be a line of text, got {text!r}"
    if not re.fullmatch(r"#[0-9a-f]{6}", arm.style.color):
        yield f"its colour is to be like #3f7fc4, got {arm.style.color!r}"
    elif not all(_contrast(arm.style.color, ground) >= CONTRAST for ground in GROUNDS):
        yield f"its colour is not to be read on white or on near-black: {arm.style.color}"
    for other in others:
        for part in ("label", "phrase"):
            if getattr(arm, part) == getattr(other, part):
                yield f"its {part} is that of {other.name!r}: {getattr(arm, part)!r}"
        for part in ("color", "dashes", "marker"):
            if getattr(arm.style, part) == getattr(other.style, part):
                yield f"its {part} is that of {other.name!r}: {getattr(arm.style, part)!r}"


def _contrast(one: str, other: str) -> float:
    """Return the contrast of two colours, 1 to 21, as WCAG 2 defines it."""

    def luminance(color: str) -> float:
        shares = [int(color[i : i + 2], 16) / 255.0 for i in (1, 3, 5)]
        linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


def _travels(arm: Arm) -> Iterator[str]:
    try:
        copy = pickle.loads(pickle.dumps(arm))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        yield f"it cannot be pickled for another process: {error}"
        return
    if copy != arm:
        yield "its pickled copy is another: make its parts frozen dataclasses"


def _spaces(arm: Arm) -> Iterator[str]:
    """Yield what is wrong with its space, for several settings and kinds of hyperparameters."""
    model = nn.Linear(3, 2)
    configs = (
        _comparison(_Problems()).config,
        MetaConfig(inverse=Neumann(terms=1), inner_steps=2),
        MetaConfig(inverse=Neumann(terms=30, alpha=0.3), inner_steps=1),
        MetaConfig(inverse=ConjugateGradient(), inner_steps=50, inner_lr=1.0),
    )
    for config in configs:
        for hyper in (WeightDecay(model, "weight"), WeightDecay(model, "model"), nn.Linear(2, 2)):
            search = arm.search(_comparison(_Problems(), config=config), hyper)
            if search.space is None:
                if search.first is not None or search.n_trials != 1:
                    yield "without a space there is one trial, and no first point"
                continue
            try:
                search.space.check(config)
            except UsageError as error:
                yield f"its space has invalid points: {error}"
            point = dict(search.first or {})
            if point and point.keys() != search.space.distributions.keys():
                yield "its first point and its space do not have the same names"
            for name, value in point.items():
                d = search.space.distributions.get(name)
                inside = (
                    value in d.options if isinstance(d, Choice) else d and d.low <= value <= d.high
                )
                if not inside:
                    yield f"its first point lies outside its space: {name} = {value} of {d}"


def _searches(arm: Arm) -> list[str]:
    """Return what is wrong with the searches of the arm."""
    quiet_optuna()
    refusals = {weighs: arm.trials.refusal(kind()) for weighs, kind in _LAMBDAS.items()}
    weighs = next((weighs for weighs, why in refusals.items() if why is None), None)
    if weighs is None:
        reasons = "; ".join(str(why) for why in refusals.values())
        return [f"it refuses every task that it is tried on: {reasons}"]
    problems = _Problems(weighs=weighs)
    results = _run(arm, _comparison(problems))
    broken = [*_budget(results), *_best(arm, results), *_retrained(results)]
    if set(problems.seeds) != {SEED}:
        broken.append(
            f"it builds problems with the seeds {sorted(set(problems.seeds))}, not {SEED}"
        )
    broken += _decided(arm, results, weighs=weighs)
    nothing = _run(arm, _comparison(_Problems(weighs=weighs), limit=0.01)).trials
    if len(nothing) != 1 or nothing["gradient_equivalents"].sum() > 0.0:
        broken.append("a budget too small for one step buys nothing, in one trial that is pruned")
    return broken


def _budget(results: Results) -> Iterator[str]:
    costs = results.trials["gradient_equivalents"]
    if costs.sum() > LIMIT * ROUNDING:
        yield f"its trials cost {costs.sum():.6g}, which exceeds the budget of {LIMIT:g}"
    if (costs.iloc[:-1] <= 0.0).any():
        yield "a trial that costs nothing is not its last"
    last = results.steps.groupby("trial")["gradient_equivalents"].max()
    own = results.trials.set_index("trial")["gradient_equivalents"]
    if (own.reindex(last.index) < last).any():
        yield "a trial costs less than its last step says"


def _best(arm: Arm, results: Results) -> Iterator[str]:
    trials = _filled(results.trials).set_index("trial")
    for number, rows in results.steps.groupby("trial"):
        trial = trials.loc[number]
        if int(str(number)) < arm.trials.groundwork and pd.isna(trial["best_value"]):
            continue  # no result, but what others build on
        values = rows.dropna(subset=["search_loss"]).set_index("step")["search_loss"]
        if trial["best_value"] != values.min() or trial["best_step"] != values.idxmin():
            yield (
                f"trial {number} has the value {trial['best_value']} of step {trial['best_step']}; "
                f"its best evaluation is {values.min()} at step {values.idxmin()}"
            )


def _retrained(results: Results) -> Iterator[str]:
    found = _filled(results.trials).dropna(subset=["best_value"])
    if found.empty:
        yield f"it finds nothing with a budget of {LIMIT:g}"
    elif pd.isna(found.sort_values(["best_value", "trial"]).iloc[0]["retrained_test_loss"]):
        yield "what it finds is not retrained"


def _filled(trials: pd.DataFrame) -> pd.DataFrame:
    """Return the table with columns for the result, which trials without one do not have."""
    wanted = {"best_value", "best_step", "retrained_test_loss"}
    return trials.reindex(columns=[*trials, *sorted(wanted - {*trials})])


def _decided(arm: Arm, results: Results, *, weighs: Weighs) -> list[str]:
    """Return whether the right splits decide, from searches on problems with others changed."""

    def again(*changed: str) -> Results:
        return _run(arm, _comparison(_Problems(frozenset(changed), weighs=weighs)))

    learns_from_val = "val_loss" in results.steps and results.steps["val_loss"].notna().any()
    idle = {"test"} if arm.train_on_val or learns_from_val else {"test", "val"}
    changed = {split: again(split) for split in idle}
    if not all(_same(results, other) for other in changed.values()):
        if not _same(results, again()):
            return ["it does not repeat itself: two searches with one seed differ"]
        return [
            f"the {split} split decides something"
            + ("" if split == "test" else ", and its `train_on_val` is False")
            for split, other in changed.items()
            if not _same(results, other)
        ]
    if arm.train_on_val and _same(results, again("val")):
        return ["its `train_on_val` is True, and the validation examples change nothing"]
    return []


def _same(one: Results, other: Results) -> bool:
    """Return whether two searches took the same way, to the bit."""
    return all(_way(a).equals(_way(b)) for a, b in zip(one, other, strict=True))


def _way(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table without what is only reported."""
    reported = ("test_", "retrained_test_", "val_test_gap", *MEASURED_COLUMNS)
    return table[[column for column in table if not str(column).startswith(reported)]]


def _run(arm: Arm, comparison: Comparison) -> Results:
    with tempfile.TemporaryDirectory() as folder:
        loop = Cell(arm, SEED).loop(
            comparison,
            Path(folder),
            {"run_id": "check", "task": comparison.task},
            Worker("check"),
            device="cpu",
            callbacks=(),
            interrupt=Interrupt(),
            on_done=lambda _: None,
        )
        loop.run()
        return assemble(Path(folder))


def _comparison(
    problems: _Problems, *, limit: float = LIMIT, config: MetaConfig | None = None
) -> Comparison:
    inverse = Neumann(terms=1, alpha=0.5)  # whose α takes no products to find
    usual = MetaConfig(inverse=inverse, meta_lr=0.1, inner_steps=2, inner_lr=0.1)
    return Comparison(
        problems,
        Budget(gradient_equivalents=limit),
        config=config or usual,
        trial_budget=Budget(outer_steps=2),
        training_steps=5,
        device="cpu",
        metric="search_loss",
    )


@dataclass
class _Problems:
    """Makes two overlapping clouds, a linear classifier and a decay for each of its weights.

    Attributes:
        changed: Splits that hold other examples.
        weighs: What there are weights for, beside the decays.
        seeds: Those it was called with.
    """

    changed: frozenset[str] = frozenset()
    weighs: Weighs = "nothing"
    seeds: list[int] = field(default_factory=list)

    def __call__(
        self, config: MetaConfig, device: torch.device, seed: int
    ) -> ClassificationProblem:
        self.seeds.append(seed)
        examples = {name: self._draw(name, size) for name, size in _SIZES.items()}
        if self.weighs != "nothing":
            examples["train"] += (torch.arange(_SIZES["train"]),)
        splits: dict[str, Any] = {
            name: Batches(*tensors, batch_size=5 if name == "train" else 3, seed=seed)
            for name, tensors in examples.items()
        }
        generator = torch.Generator().manual_seed(seed)
        model = nn.Linear(3, 2)
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
        hyper: HyperKind = WeightDecay(model, "weight")
        if self.weighs != "nothing":
            hyper = Compose({"decay": hyper, self.weighs: _LAMBDAS[self.weighs]()})
        return ClassificationProblem(model, hyper, Splits(**splits))

    def _draw(self, split: str, size: int) -> tuple[Tensor, ...]:
        seed = derive_seed(self.seeds[-1], split, split in self.changed)
        generator = torch.Generator().manual_seed(seed)
        targets = torch.randint(2, (size,), generator=generator)
        noise = torch.randn(size, 3, generator=generator)
        return noise + 0.7 * targets[:, None], targets
