"""What a user writes once: a model, hyperparameters, data and two losses."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from ift_tune.base.errors import UsageError, nearest
from ift_tune.base.views import View
from ift_tune.implicit.penalty import Penalty
from ift_tune.implicit.reading import Later
from ift_tune.implicit.vectors import named
from ift_tune.problem.batches import Batch, Loader
from ift_tune.problem.distributed import refuse_distributed
from ift_tune.problem.evaluation import SplitBatches, begin_means, measured
from ift_tune.problem.made_of import refuse_other_models
from ift_tune.problem.modes import evaluating
from ift_tune.problem.penalties import own_penalty
from ift_tune.problem.sizes import as_size, guess_batch_size
from ift_tune.problem.splitting import Sizes, split_loaders


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

    @classmethod
    def from_arrays(
        cls,
        *arrays: Any,
        sizes: Sizes = (0.6, 0.2, 0.1, 0.1),
        seed: int = 0,
        stratify: Any = False,
        batch_size: int | Mapping[str, int | None] | None = None,
        index: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Splits:
        """Draw four disjoint splits of arrays in memory, the same for the same seed.

        Real numbers become tensors of `dtype`, whole numbers int64; truth values stay. Words are
        refused, and so are rows with NaN.

        Args:
            arrays: NumPy's, PyTorch's, pandas' or lists, with a row for each example: inputs and
                targets, say, of which batches are tuples. Or mappings of arrays, such as
                ``{"input_ids": ids, "labels": labels}``: one by itself gives batches that are
                mappings.
            sizes: Of train, val, search and test, or by these names: fractions below 1 or counts,
                one of them None for what is left. What is over belongs to no split.
            seed: Of the draw, and of the order of the batches.
            stratify: True if each class shall have the same share of each split: of the last
                array, or a mapping's ``"labels"``. Or an array of classes or groups of its own.
            batch_size: Of all splits, or by their names; a split with fewer examples, or without a
                number, is one batch. Search and test are in order and lose no row.
            index: Whether training batches also tell each example's position in the training
                split, as `ExampleWeights` asks: ``(inputs, targets, index)``, or a mapping's
                ``"index"``. Their number is ``splits.train.size``.
            dtype: Of real numbers; None for PyTorch's default, float32.
            device: Where the splits are to be; None for where a tensor is.

        Raises:
            UsageError: If an array holds no finite numbers, they differ in length, or cannot be
                split so.

        Example:
            >>> import numpy as np, ift_tune
            >>> inputs, targets = np.random.rand(100, 3), np.arange(100) % 2
            >>> splits = ift_tune.Splits.from_arrays(
            ...     inputs, targets, sizes=(0.5, 0.2, 0.2, 0.1), stratify=True, batch_size=10
            ... )
            >>> [(len(x), x.dtype, y.dtype) for x, y in splits.train][:1]
            [(10, torch.float32, torch.int64)]
            >>> [sum(len(y) for _, y in split) for split in (splits.search, splits.test)]
            [20, 10]
            >>> ift_tune.Splits.from_arrays(inputs, ["cat", "dog"] * 50)
            Traceback (most recent call last):
            ift_tune.base.errors.UsageError: array 2 must hold numbers: encode words ...
        """
        return cls(
            **split_loaders(
                arrays,
                sizes=sizes,
                seed=seed,
                stratify=stratify,
                batch_size=batch_size,
                index=index,
                dtype=dtype or torch.get_default_dtype(),
                device=device,
            )
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

    def metrics(self, batch: Batch) -> Mapping[str, Any]:
        """Return scalars to report for a batch of any split: ``"loss"``, and what else matters.

        A classifier adds ``"error"``, the fraction of wrong answers. `evaluate` makes the numbers
        of a split of them. A metric that is no mean over examples, such as a ranking's, may be a
        torchmetrics object (anything with `update`, `compute` and `reset`) that was updated here.
        """
        return {"loss": self.val_loss(batch)}

    def evaluate(self, batches: Iterable[Batch]) -> Mapping[str, Any]:
        """Return the numbers of a whole split: the means of `metrics`, weighted by `batch_size`.

        Override it for what depends on the split as a whole (AUC, F1, perplexity). It is called in
        evaluation mode, without gradients, for every split and for the batches of an outer step. A
        number that is not finite (the AUC of a single class) is left empty in the tables, and named
        in a warning where it is of a split; only what decides, the trial's `metric`, has to be
        finite. By hand, call `measure`.

        Args:
            batches: Those of the split, on the problem's device; each iteration is a new pass.

        Example:
            >>> import torch, ift_tune
            >>> class Perplexed(ift_tune.ClassificationProblem):
            ...     def evaluate(self, batches):
            ...         found = super().evaluate(batches)
            ...         return {**found, "perplexity": 2.718281828 ** found["loss"]}
            >>> model = torch.nn.Linear(4, 2)
            >>> rows = ift_tune.Batches(torch.zeros(6, 4), torch.zeros(6).long(), batch_size=2)
            >>> hyper = ift_tune.WeightDecay(model, "tensor")
            >>> problem = Perplexed(model, hyper, ift_tune.Splits(rows, rows, rows, rows))
            >>> sorted(problem.measure("search"))
            ['error', 'loss', 'perplexity']

            What needs all answers of the split at once gathers them:

            >>> class Ranked(ift_tune.ClassificationProblem):
            ...     def evaluate(self, batches):
            ...         answers = [(self.model(x)[:, 1], y) for x, y, *_ in batches]
            ...         scores, labels = (torch.cat(part) for part in zip(*answers))
            ...         pairs = scores[labels == 1][:, None] > scores[labels == 0]
            ...         return {"auc": pairs.float().mean()}  # NaN without one of the classes
        """
        return self.begin_evaluation(batches).read()

    def begin_evaluation(self, batches: Iterable[Batch]) -> Later[dict[str, float]]:
        """Return what `evaluate` makes of `metrics`, with its numbers unread; not overridden."""
        return begin_means(self.metrics, self.metric_weight, batches)

    def metric_weight(self, batch: Batch) -> float | Tensor:
        """Return the weight of a batch in the means that `evaluate` takes: its `batch_size`."""
        return as_size(self.batch_size(batch))

    def measure(self, split: str = "test") -> dict[str, float]:
        """Return what `evaluate` says of a split at the present weights: for use by hand.

        In evaluation mode, without gradients, on the weights' device; the model's modes come back.

        Args:
            split: ``"train"``, ``"val"``, ``"search"`` or ``"test"``.

        Raises:
            UsageError: If there is no such split, or what is measured is no number.

        Example:
            >>> from ift_tune.testing import Quadratic
            >>> sorted(Quadratic().measure("test"))
            ['loss']
        """
        names = [each.name for each in fields(self.splits)]
        if split not in names:
            raise UsageError(f"there is no split {split!r}{nearest(split, names)}")
        batches = SplitBatches(
            split,
            getattr(self.splits, split),
            self.weights()[0].device,
            lambda batch: as_size(self.batch_size(batch)),
        )
        with evaluating(self.model):
            return measured(lambda: self.evaluate(batches))

    def batch_size(self, batch: Batch) -> float:
        """Return the number of examples of a batch, by which means are weighted and cost counted.

        Override it where the first dimension of the tensors does not tell (ragged sequences,
        graphs, sequences first), or where something else is to be counted, such as tokens.

        Raises:
            UsageError: If the tensors of the batch disagree about it.
        """
        return guess_batch_size(batch)

    def loss_size(self, batch: Batch) -> float | Tensor:
        """Return how much a batch's losses are means over: by default, its `batch_size`.

        By it the parts of a batch are weighted: those of several processes, and micro-batches.
        Override it where the losses leave something out, as padding.
        """
        return self.batch_size(batch)

    def penalty(self) -> Penalty | None:
        """Return a regulariser in closed form at the present λ, added to `train_loss`; or None.

        It is that of `hyper`, where that has one, as `WeightDecay` does. A `train_loss` that adds
        its value by hand, ``+ self.hyper()``, is told from one batch, and nothing counts twice.
        Override it for another, or for None.

        Raises:
            UsageError: If `train_loss` uses those hyperparameters otherwise.
        """
        return own_penalty(self)

    def configure_inner(self, weights: list[Tensor], config: Any) -> Any:
        """Return an optimiser of the weights, or None for the one that the configuration names.

        Args:
            weights: The weights, each of which must be in a parameter group.
            config: The trial's `MetaConfig`; its ``inner_lr`` and so on are there to be used.

        Returns:
            A `torch.optim.Optimizer` with any parameter groups, or a pair of one and its scheduler,
            which takes a step after each inner step. Their state is saved and resumed. None may
            have a weight decay: the implicit function theorem sees the training loss alone.
        """
        return None

    def configure_outer(self, hypers: list[Tensor], config: Any) -> Any:
        """Return an optimiser of λ likewise: one meta learning rate for each kind, for example.

        Args:
            hypers: The hyperparameters, each of which must be in a parameter group.
            config: The trial's `MetaConfig`.
        """
        return None

    def summary(self) -> dict[str, float]:
        """Return what λ has learned, as a few named numbers for the tables (``learned_<name>``).

        This, `words` and `views` are those of `hyper` where it has such methods, as every
        `HyperKind` does.
        """
        found: dict[str, float] = self._told("summary", {})
        return found

    def words(self) -> str:
        """Return what λ has learned, in a sentence."""
        return str(self._told("words", ""))

    def views(self) -> list[View]:
        """Return pictures of what λ has learned, detached, on the CPU and small."""
        found: list[View] = self._told("views", [])
        return found

    def _told(self, method: str, default: Any) -> Any:
        """Return what the hyperparameters say of themselves."""
        say = getattr(getattr(self, "hyper", None), method, None)
        return say() if callable(say) else default

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
        wrong += [
            f"`{name}` must stay a method: give the attribute of this name another, got "
            f"{type(getattr(self, name)).__name__}"
            for name in ("metrics", "evaluate", "batch_size")
            if not callable(getattr(self, name))
        ]
        if wrong:
            raise UsageError(f"{type(self).__name__} is incomplete: " + "; ".join(wrong))
        refuse_distributed(vars(self).values())
        refuse_other_models(self.model, self.hyper)
        places = sorted({str(p.device) for p in (*self.weights(), *self.hypers())})
        if len(places) > 1 or "meta" in places:
            raise UsageError(
                "weights and hyperparameters must be on one real device: move both there with "
                f".to(device), got {' and '.join(places)}"
            )
        shared = {id(p) for p in self.weights()} & {id(p) for p in self.hypers()}
        if shared:
            raise UsageError(
                f"{len(shared)} tensors are both weights and hyperparameters: keep references to "
                "the model's parameters in a plain list, where nn.Module does not register them"
            )
