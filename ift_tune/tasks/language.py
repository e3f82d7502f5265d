"""A character language model with learned dropout: seven rates, or one for every unit and weight.

After Lorraine, Vicol, Duvenaud 2020, section 5.4. Their net has 2×650 units and reads words; a
rate for every recurrent weight of one layer, 4·650², and for every unit of three places, 3·650,
and one more are 1,691,951, the number of rates they name. Options make a net of that size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from ift_tune.base.errors import UsageError
from ift_tune.joint.budget import Budget
from ift_tune.tasks.base import NEUMANN, Sizes, Target, Task

if TYPE_CHECKING:
    import torch

    from ift_tune.problem.problem import BilevelProblem
    from ift_tune.tasks.datasets import Text

SITES: dict[str, tuple[Literal["unit", "row", "weight"], bool]] = {
    "embedding.weight": ("row", True),  # characters
    "embedding": ("unit", True),  # the input of the first layer
    "layer1.weight_hh_l0": ("weight", False),
    "layer1": ("unit", True),  # the hidden units between the layers
    "layer2.weight_ih_l0": ("weight", False),
    "layer2.weight_hh_l0": ("weight", False),
    "layer2": ("unit", True),  # the input of the decoder
}
"""Where dropout acts: what has a rate of its own if there are many, and whether masks are shared
(see `DropoutSite`)."""


@dataclass(frozen=True)
class Language:
    """Builds the problem.

    Attributes:
        rates: ``"seven"`` or ``"many"``.
        rate: Where the rates start.
        temperature: Of the relaxed masks.
        embedding: Size of an embedded character.
        hidden: Units of each of the two layers.
        length: Characters of a window.
        train: Windows; likewise `val`, `search` and `test`.
        batch_size: Windows of an inner step.
        largest: Most windows of any other batch.
    """

    rates: str
    rate: float = 0.1
    temperature: float = 0.1
    embedding: int = 32
    hidden: int = 64
    length: int = 32
    train: int = 150
    val: int = 200
    search: int = 200
    test: int = 400
    batch_size: int = 25
    largest: int = 100

    def __call__(self, text: Text, device: torch.device, seed: int) -> BilevelProblem:
        """Return the problem on a stretch of the text.

        Raises:
            UsageError: If `rates` is neither.
        """
        from ift_tune.hyper import DropoutRates, DropoutSite
        from ift_tune.hyper.supervised import ClassificationProblem
        from ift_tune.tasks.building import CharLSTM, make_splits, windows

        if self.rates not in ("seven", "many"):
            raise UsageError(f"rates must be 'seven' or 'many', got {self.rates!r}")
        model = CharLSTM(len(text.alphabet), self.embedding, self.hidden).to(device)
        sites = {
            name: DropoutSite(per if self.rates == "many" else "site", shared=shared)
            for name, (per, shared) in SITES.items()
        }
        hyper = DropoutRates(model, sites, init=self.rate, temperature=self.temperature)
        sizes = (self.train, self.val, self.search, self.test)
        splits = make_splits(
            *windows(text, self.length, sizes, seed),
            batch_size=self.batch_size,
            largest=self.largest,
            device=device,
            seed=seed,
        )
        return ClassificationProblem(model, hyper, splits)


_SMALL = {"embedding": 4, "hidden": 6, "length": 10, "train": 12, "val": 12, "search": 12}
_SMALL |= {"test": 12, "batch_size": 6, "largest": 6}

SEVEN_RATES = Task(
    name="text-dropout",
    summary="character LSTM on a piece of Shakespeare, seven dropout rates",
    data="shakespeare",
    build=Language("seven"),
    sizes=Sizes(weights=64_673, hypers=7, train=150, val=200, search=200, test=400),
    target=Target(
        "retrained_test_error",
        0.67,
        "stretches of text differ: 0.62 to 0.67 with tuned rates, 0.70 to 0.73 without dropout",
    ),
    settings={**NEUMANN, "terms": 3, "meta_lr": 0.15, "inner_steps": 20, "inner_lr": 5e-3},
    budget=Budget(outer_steps=60, eval_every=5),
    small=_SMALL,
)

MANY_RATES = replace(
    SEVEN_RATES,
    name="text-dropout-many",
    summary="character LSTM, a dropout rate for every unit and recurrent weight",
    build=Language("many"),
    sizes=replace(SEVEN_RATES.sizes, hypers=49_384),
)

TASKS = (SEVEN_RATES, MANY_RATES)
