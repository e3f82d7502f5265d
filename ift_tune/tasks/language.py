"""A character language model with learned dropout: seven rates, or one for every unit and weight.

After Lorraine, Vicol, Duvenaud 2020, section 5.4. Their net has 2×650 units and reads words; a
rate for every recurrent weight of one layer, 4·650², and for every unit of three places, 3·650,
and one more are 1,691,951, the number of rates they name. Options make a net of that size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ift_tune.base.errors import UsageError
from ift_tune.base.randomness import derive_seed
from ift_tune.hyper import DropoutRates, DropoutSite
from ift_tune.hyper.supervised import ClassificationProblem
from ift_tune.implicit.inverse import Neumann
from ift_tune.joint.config import Budget, MetaConfig
from ift_tune.problem.problem import BilevelProblem
from ift_tune.tasks.base import Sizes, Target, Task
from ift_tune.tasks.building import CharLSTM, FourSplits, make_splits, shares
from ift_tune.tasks.datasets import Text

SEVEN = {
    "embedding.weight": DropoutSite(shared=True),  # characters
    "embedding": DropoutSite(shared=True),  # the input of the first layer
    "layer1.weight_hh_l0": DropoutSite(),
    "layer1": DropoutSite(shared=True),  # the hidden units between the layers
    "layer2.weight_ih_l0": DropoutSite(),
    "layer2.weight_hh_l0": DropoutSite(),
    "layer2": DropoutSite(shared=True),  # the input of the decoder
}
"""A rate for each of seven sites."""

MANY = {
    "embedding.weight": DropoutSite("row", shared=True),
    "embedding": DropoutSite("unit", shared=True),
    "layer1.weight_hh_l0": DropoutSite("weight"),
    "layer1": DropoutSite("unit", shared=True),
    "layer2.weight_ih_l0": DropoutSite("weight"),
    "layer2.weight_hh_l0": DropoutSite("weight"),
    "layer2": DropoutSite("unit", shared=True),
}
"""A rate for each character, unit and recurrent weight of the same sites."""


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
        """Return the problem on a stretch of the text."""
        if self.rates not in ("seven", "many"):
            raise UsageError(f"rates must be 'seven' or 'many', got {self.rates!r}")
        model = CharLSTM(len(text.alphabet), self.embedding, self.hidden).to(device)
        sites = SEVEN if self.rates == "seven" else MANY
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


def windows(text: Text, length: int, sizes: tuple[int, int, int, int], seed: int) -> FourSplits:
    """Return four disjoint stretches of a text, one after the other, cut into windows.

    The targets of a window are its characters' successors: inputs and targets are (n, length).
    Where the text is too short, every split shrinks by the same factor.

    Args:
        text: The text.
        length: Characters of a window.
        sizes: Windows of each split.
        seed: Decides where the first stretch begins.
    """
    counts = shares(sizes, (len(text.characters) - len(sizes)) // length)
    needed = [n * length + 1 for n in counts]  # one more: the last window's last target
    free = len(text.characters) - sum(needed)
    generator = torch.Generator().manual_seed(derive_seed(seed, "text"))
    start = int(torch.randint(free + 1, (), generator=generator))
    stretches = torch.split(text.characters[start : start + sum(needed)], needed)
    train, val, search, test = (
        (s[:-1].view(-1, length), s[1:].view(-1, length)) for s in stretches
    )
    return train, val, search, test


_CONFIG = MetaConfig(inverse=Neumann(terms=3), meta_lr=0.15, inner_steps=20, inner_lr=5e-3)
_TARGET = Target(
    "retrained_test_error",
    0.67,
    "stretches of text differ: 0.62 to 0.67 with tuned rates, 0.70 to 0.73 without dropout",
)
_SMALL = {"embedding": 4, "hidden": 6, "length": 10, "train": 12, "val": 12, "search": 12}
_SMALL |= {"test": 12, "batch_size": 6, "largest": 6}

SEVEN_RATES = Task(
    name="text-dropout",
    summary="character LSTM on a piece of Shakespeare, seven dropout rates",
    data="shakespeare",
    build=Language("seven"),
    sizes=Sizes(weights=64_673, hypers=7, train=150, val=200, search=200, test=400),
    target=_TARGET,
    default_config=_CONFIG,
    budget=Budget(outer_steps=60, eval_every=5),
    small=_SMALL,
)

MANY_RATES = Task(
    name="text-dropout-many",
    summary="character LSTM, a dropout rate for every unit and recurrent weight",
    data="shakespeare",
    build=Language("many"),
    sizes=Sizes(weights=64_673, hypers=49_384, train=150, val=200, search=200, test=400),
    target=_TARGET,
    default_config=_CONFIG,
    budget=Budget(outer_steps=60, eval_every=5),
    small=_SMALL,
)
