"""Label smoothing whose strength is learned, for all classes or for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ift_tune.base.errors import UsageError, require_number
from ift_tune.hyper.arguments import new_raw
from ift_tune.hyper.base import CoarseParameter, Criterion, HyperKind
from ift_tune.hyper.class_targets import ClassTargets, along_classes, require_classes
from ift_tune.hyper.pictures import quantiles
from ift_tune.hyper.transforms import Init, get_transform, initialise

_LEAST = 1e-3


class LabelSmoothing(HyperKind):
    """A target's probability p becomes (1 − ε)·p + ε/C, with ε = most·sigmoid(λ) and C classes.

    The smoothing of Szegedy et al. (2016, section 7), differentiated by ε. With an ε for each
    class, it is that of the target's class; where a target is itself a distribution, its expected
    value over the classes. Meant for `HyperKind.criterion`: the loss it wraps gets probabilities.

    Example:
        >>> import torch, ift_tune
        >>> kind = ift_tune.LabelSmoothing(4, init=0.4)
        >>> kind.soften(torch.zeros(1, 4), torch.tensor([2])).detach()
        tensor([[0.1000, 0.1000, 0.7000, 0.1000]])
    """

    name: ClassVar[str] = "label_smoothing"

    def __init__(
        self,
        classes: int,
        *,
        per: Literal["all", "class"] = "all",
        init: Init = 0.1,
        most: float = 0.5,
        like: Tensor | None = None,
    ) -> None:
        """Make the raw parameters λ.

        Args:
            classes: C, the number of the model's outputs.
            per: One ε for ``"all"`` classes, or one for each ``"class"``.
            init: ε to start from, above 0 and below `most`; or a function that fills λ in place.
            most: ε stays below it; at most 1, where nothing of the target is left.
            like: A tensor whose dtype and device λ takes.

        Raises:
            UsageError: If an argument is not one of these.
        """
        super().__init__()
        if per not in ("all", "class"):
            raise UsageError(f"per must be 'all' or 'class', got {per!r}")
        require_number("most", most, least=0.0)
        if not 0.0 < most <= 1.0:
            raise UsageError(f"most must be above 0 and at most 1, got {most!r}")
        self.classes = require_classes(classes)
        self.most = float(most)
        self._sigmoid = get_transform("sigmoid", ("sigmoid",))
        self.raw = nn.Parameter(new_raw((self.classes,) if per == "class" else (), like))
        self._targets = ClassTargets(
            type(self).__name__, self.classes, instead="LabelSmoothing(2) is that of every label"
        )
        self._fill(init)

    def _fill(self, init: Init) -> None:
        initialise(
            self.raw,
            init,
            lambda epsilon: self._sigmoid.inverse(epsilon / self.most),
            f"a smoothing above 0 and below {self.most:g}",
        )

    def forward(self) -> Tensor:
        """Return ε, of shape () or (C,)."""
        return self.most * self._sigmoid.forward(self.raw)

    def soften(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return smoothed targets of the logits' shape (B, C, ...), which sum to 1 over classes.

        Args:
            logits: The model's outputs; only their shape and dtype are read.
            targets: Class numbers (B, ...), or probabilities (B, C, ...).

        Raises:
            UsageError: If they are neither, or not of C classes.
        """
        known = self._targets.probabilities(logits, targets, self.raw)
        # What is taken of each class, ε_k·p_k, is given back to all in equal shares: so targets
        # still sum to 1 where each class has an ε of its own.
        taken = known * along_classes(self(), logits)
        return known - taken + taken.sum(dim=1, keepdim=True) / self.classes

    def criterion(self, loss: Criterion) -> Criterion:
        """Return the loss with smoothed targets."""

        def smoothed(logits: Tensor, targets: Tensor) -> Tensor:
            return loss(logits, self.soften(logits, targets))

        return smoothed

    def coarse_space(self) -> dict[str, CoarseParameter]:
        """Return one smoothing for all classes."""
        most = 0.9 * self.most  # at `most` itself λ is infinite
        with torch.no_grad():
            start = float(self().mean())
        least = min(_LEAST, 0.01 * self.most)
        return {"smoothing": CoarseParameter.near(least, most, start)}

    def set_coarse(self, values: Mapping[str, float]) -> None:
        """Give every class the smoothing."""
        self._fill(values["smoothing"])

    @torch.no_grad()
    def learned(self) -> dict[str, Tensor]:
        """Return ε."""
        return {"smoothing": self()}

    @torch.no_grad()
    def summary(self) -> dict[str, float]:
        """Return ε, or its quantiles over the classes."""
        epsilon = self()
        return quantiles(epsilon) if epsilon.ndim else {"smoothing": float(epsilon)}

    @classmethod
    def example(cls, model: nn.Module, inputs: Tensor) -> HyperKind:
        """Return a smoothing for each of the model's classes."""
        with torch.no_grad():
            classes = model(inputs).shape[1]
        return cls(classes, per="class", init=0.2, like=inputs)
