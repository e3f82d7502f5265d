"""A character model for one kind of text, from others: in what proportions are they to be mixed?

As DoReMi (Xie et al. 2023) and DoGE (Fan et al. 2024) ask, of texts that come with Python. The
validation text is of a kind that is not among the sources.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Literal

from ift_tune.base.errors import UsageError, nearest
from ift_tune.joint.budget import Budget
from ift_tune.tasks.base import NEUMANN, Sizes, Target, Task

if TYPE_CHECKING:
    import torch

    from ift_tune.problem.problem import BilevelProblem
    from ift_tune.tasks.texts import Texts

PARTS = {
    "code": 7,
    "tables": 4,
    "names": 3,
    "shakespeare": 3,
    "docstrings": 3,
    "manual": 2,
    "descriptions": 1,
}
"""How many training windows there are of each text, in proportion; none of the target's."""


@dataclass(frozen=True)
class Mixture:
    """Builds the problem.

    Attributes:
        target: The text that is validated and tested on, one of `PARTS`: all others are sources.
        init: Where the proportions start, ``"proportional"`` or ``"uniform"``: a plain training
            keeps them there, as does a comparison's arm ``none``.
        floor: The least proportion of a source.
        embedding: Size of an embedded character.
        hidden: Units of the hidden layer.
        width: Characters that a prediction is made from.
        length: Characters of a window.
        train: Windows of all sources together.
        val: Windows of the target; likewise `search` and `test`.
        batch_size: Windows of an inner step.
        largest: Most windows of any other batch.
    """

    target: str = "docstrings"
    init: str = "proportional"
    floor: float = 0.005
    embedding: int = 12
    hidden: int = 48
    width: int = 6
    length: int = 32
    train: int = 6000
    val: int = 600
    search: int = 300
    test: int = 1000
    batch_size: int = 50
    largest: int = 200

    def __call__(self, texts: Texts, device: torch.device, seed: int) -> BilevelProblem:
        """Return the problem.

        Raises:
            UsageError: If there is no such text, or start.
        """
        import torch

        from ift_tune.hyper import DomainWeights
        from ift_tune.hyper.supervised import ClassificationProblem
        from ift_tune.tasks.building import CharConvolution, make_splits, stretches

        known = [name for name in PARTS if name in texts.characters]
        if self.target not in known:
            raise UsageError(
                f"there is no text {self.target!r} to be the target{nearest(self.target, known)}"
            )
        if self.init not in ("proportional", "uniform"):
            raise UsageError(f"init must be 'proportional' or 'uniform', got {self.init!r}")
        start: Literal["proportional", "uniform"] = self.init  # type: ignore[assignment]
        names = [name for name in known if name != self.target]
        ends = list(accumulate((PARTS[name] for name in names), initial=0))
        counts = [b - a for a, b in pairwise(self.train * end // ends[-1] for end in ends)]
        parts = [
            stretches(texts.characters[name], self.length, [count], seed)[0]
            for name, count in zip(names, counts, strict=True)
        ]
        sizes = [self.val, self.search, self.test]
        val, search, test = stretches(texts.characters[self.target], self.length, sizes, seed)
        inputs, targets = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        splits = make_splits(
            (inputs, targets),
            *(val, search, test),
            batch_size=self.batch_size,
            largest=self.largest,
            device=device,
            seed=seed,
        )
        model = CharConvolution(len(texts.alphabet), self.embedding, self.hidden, self.width)
        model.to(device)
        hyper = DomainWeights(
            [name for name, (windows, _) in zip(names, parts, strict=True) for _ in windows],
            names=names,
            floor=self.floor,
            init=start,
            like=model.embedding.weight,
        )
        return ClassificationProblem(model, hyper, splits)


_SMALL = {"embedding": 4, "hidden": 6, "length": 10, "batch_size": 20, "largest": 30}
_SMALL |= {"train": 66, "val": 12, "search": 12, "test": 12}

TEXT = Task(
    name="text-mixture",
    summary="character model for docstrings, learned from a mixture of six other kinds of text",
    data="texts",
    build=Mixture(),
    sizes=Sizes(weights=9360, hypers=6, train=6000, val=600, search=300, test=1000),
    target=Target(
        "retrained_test_error",
        0.67,
        "0.654; sampling uniformly 0.679, in proportion 0.684 (means of seeds 1 to 5)",
    ),
    settings={**NEUMANN, "terms": 3, "meta_lr": 0.15, "inner_steps": 20, "inner_lr": 5e-3},
    budget=Budget(outer_steps=40, eval_every=4),
    small=_SMALL,
)

TASKS = (TEXT,)
