"""What a user writes once: the two losses, the model, the hyperparameters and the data splits."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import dataclass, fields

from torch import Tensor, nn

from ift_tune.base.errors import UsageError
from ift_tune.base.views import View
from ift_tune.implicit.penalty import Penalty
from ift_tune.implicit.vectors import named
from ift_tune.problem.batches import Batch, Loader


@dataclass(frozen=True)
class Splits:
    """The four splits of the data, each a re-iterable loader of batches.

    Attributes:
        train: Fits the weights w, one batch an inner step.
        val: Fits the hyperparameters λ, one batch an outer step. With as many hyperparameters as
            weights it is training data too, so it must not judge anything.
        search: Scores a trial for the outer search.
        test: Is only ever reported.
        curvature: Batches of the training data on which the Hessian and the mixed term of an
            outer step are computed; larger ones than `train`'s give less noise. Default: `train`.

    Raises:
        UsageError: If one is not a loader, or can be iterated over once only.

    Example:
        >>> import torch, ift_tune
        >>> inputs, targets = torch.randn(40, 3), torch.randint(2, (40,))
        >>> def rows(start, stop, size=None):
        ...     return ift_tune.Batches(inputs[start:stop], targets[start:stop], batch_size=size)
        >>> splits = ift_tune.Splits(rows(0, 10, 5), rows(10, 20), rows(20, 30), rows(30, 40))
        >>> [len(batch[0]) for batch in splits.train]
        [5, 5]
        >>> ift_tune.Splits(iter([1]), rows(10, 20), rows(20, 30), rows(30, 40))
        Traceback (most recent call last):
        ift_tune.base.errors.UsageError: Splits.train must be a loader that can be iterated ...
    """

    train: Loader
    val: Loader
    search: Loader
    test: Loader
    curvature: Loader | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            loader = getattr(self, field.name)
            if loader is None and field.name == "curvature":
                continue
            if isinstance(loader, Iterator) or not isinstance(loader, Loader):
                raise UsageError(
                    f"Splits.{field.name} must be a loader that can be iterated over many times "
                    f"(a DataLoader, a list of batches), got a {type(loader).__name__}"
                )


class BilevelProblem(abc.ABC):
    """min over λ of L_V(w*(λ), λ), where w*(λ) minimises L_T(w, λ).

    A subclass sets three attributes and writes two losses:

    Attributes:
        model: Its trainable parameters are the weights w.
        hyper: Its parameters are the hyperparameters λ.
        splits: The data.

    Example:
        >>> import torch, ift_tune
        >>> from torch import nn
        >>> from torch.nn import functional as F
        >>> class Smoothed(ift_tune.BilevelProblem):  # λ: the logit of the label smoothing
        ...     def __init__(self):
        ...         torch.manual_seed(0)
        ...         rows = ift_tune.Batches(torch.randn(20, 4), torch.randint(3, (20,)))
        ...         self.model = nn.Linear(4, 3)
        ...         self.hyper = nn.ParameterList([torch.tensor(-2.0)])
        ...         self.splits = ift_tune.Splits(rows, rows, rows, rows)
        ...     def train_loss(self, batch):
        ...         logs = F.log_softmax(self.model(batch[0]), dim=1)
        ...         share = self.hyper[0].sigmoid()
        ...         return (1 - share) * F.nll_loss(logs, batch[1]) - share * logs.mean()
        ...     def val_loss(self, batch):
        ...         return F.cross_entropy(self.model(batch[0]), batch[1])
        >>> joint = ift_tune.JointOptimizer(Smoothed(), ift_tune.MetaConfig(inner_steps=5))
        >>> sorted(joint.step())[-2:]
        ['train_loss', 'val_loss']
    """

    model: nn.Module
    hyper: nn.Module
    splits: Splits

    @abc.abstractmethod
    def train_loss(self, batch: Batch) -> Tensor:
        """Return the scalar training loss of a batch, without what `penalty` returns."""

    @abc.abstractmethod
    def val_loss(self, batch: Batch) -> Tensor:
        """Return the scalar validation loss of a batch; it may depend on λ directly."""

    def metrics(self, batch: Batch) -> dict[str, Tensor]:
        """Return scalars to report for a batch of any split: ``"loss"``, and what else matters.

        A classifier adds ``"error"``, the fraction of wrong answers. The mean over batches is
        weighted by their sizes.
        """
        return {"loss": self.val_loss(batch)}

    def penalty(self) -> Penalty | None:
        """Return a regulariser in closed form at the present λ, added to `train_loss`; or None."""
        return None

    def summary(self) -> dict[str, float]:
        """Return what λ has learned, as a few named numbers for the tables (``learned_<name>``)."""
        return {}

    def words(self) -> str:
        """Return what λ has learned, in a sentence."""
        return ""

    def views(self) -> list[View]:
        """Return pictures of what λ has learned, detached, on the CPU and small."""
        return []

    def weights(self) -> list[Tensor]:
        """Return the trainable parameters of the model."""
        return list(named(self.model, "the model").values())

    def hypers(self) -> list[Tensor]:
        """Return the trainable parameters of the hyperparameter module."""
        return list(named(self.hyper, "the hyperparameter module").values())

    def validate(self) -> None:
        """Raise one `UsageError` that lists everything wrong with the problem's attributes."""
        wrong = [
            f"`{name}` must be a {kind.__name__}, got {type(getattr(self, name, None)).__name__}"
            for name, kind in (("model", nn.Module), ("hyper", nn.Module), ("splits", Splits))
            if not isinstance(getattr(self, name, None), kind)
        ]
        if wrong:
            raise UsageError(f"{type(self).__name__} is incomplete: " + "; ".join(wrong))
        shared = {id(p) for p in self.weights()} & {id(p) for p in self.hypers()}
        if shared:
            raise UsageError(
                f"{len(shared)} tensors are both weights and hyperparameters: keep references to "
                "the model's parameters in a plain list, where nn.Module does not register them"
            )
