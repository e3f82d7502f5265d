"""What a user writes once, and its losses as mathematics takes them."""

from __future__ import annotations

import abc
import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ift_tune.base.errors import UsageError
from ift_tune.base.views import View
from ift_tune.implicit.checkpoints import kept_activations
from ift_tune.implicit.double_backward import Kernels, safe_kernels
from ift_tune.implicit.linearisation import Linearisation, linearise
from ift_tune.implicit.penalty import Penalty
from ift_tune.implicit.vectors import Tensors, fill_missing, named
from ift_tune.problem.batches import Batch, Loader
from ift_tune.problem.distributed import refuse_distributed
from ift_tune.problem.evaluation import mean_metrics
from ift_tune.problem.normalisation import RunningStatistics
from ift_tune.problem.returned import as_loss, as_penalty
from ift_tune.problem.sizes import as_size, guess_batch_size

_log = logging.getLogger(__name__)


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

    def metrics(self, batch: Batch) -> Mapping[str, Any]:
        """Return scalars to report for a batch of any split: ``"loss"``, and what else matters.

        A classifier adds ``"error"``, the fraction of wrong answers. `evaluate` makes the numbers
        of a split of them. A metric that is no mean over examples, such as a ranking's, may be a
        torchmetrics object (anything with `update`, `compute` and `reset`) that was updated here.
        """
        return {"loss": self.val_loss(batch)}

    def evaluate(self, batches: Iterable[Batch]) -> Mapping[str, Any]:
        """Return the numbers of a whole split: the means of `metrics`, weighted by `batch_size`.

        Override it for what depends on the split as a whole (AUC, F1, perplexity). It runs in
        evaluation mode, without gradients, for every split and for the batches of an outer step.

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
            >>> joint = ift_tune.JointOptimizer(problem, ift_tune.MetaConfig())
            >>> sorted(joint.evaluate("search"))
            ['search_error', 'search_loss', 'search_perplexity']
        """
        return mean_metrics(self.metrics, lambda batch: as_size(self.batch_size(batch)), batches)

    def batch_size(self, batch: Batch) -> float:
        """Return the number of examples of a batch, by which means are weighted and cost counted.

        Override it where the first dimension of the tensors does not tell (ragged sequences,
        graphs, sequences first), or where something else is to be counted, such as tokens.

        Raises:
            UsageError: If the tensors of the batch disagree about it.
        """
        return guess_batch_size(batch)

    def penalty(self) -> Penalty | None:
        """Return a regulariser in closed form at the present λ, added to `train_loss`; or None."""
        return None

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


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode; afterwards every submodule has the mode it had."""
    # One by one: a user may keep some submodules, such as frozen BatchNorm, in evaluation mode.
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes:
            submodule.training = training


class TrainingModes:
    """The modes in which a model trains: its user's, or training mode where that is lost.

    Example:
        >>> from torch import nn
        >>> from ift_tune.problem.problem import TrainingModes
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        >>> _ = model[1].eval()  # frozen on purpose
        >>> modes = TrainingModes(model)
        >>> _ = model.eval()  # forgotten by a callback
        >>> modes.enter()
        >>> [m.training for m in model.modules()]
        [True, True, False]
    """

    def __init__(self, model: nn.Module) -> None:
        """Put a model that is in evaluation mode as a whole, as hubs give it, in training mode."""
        self._model = model
        if not any(m.training for m in model.modules()):
            model.train()
            _log.warning(
                "the model was in evaluation mode as a whole, and trains in training mode: with "
                "dropout and batch statistics. To keep some of its modules in evaluation mode, "
                "call model.train() first and then .eval() of those"
            )
        self._modes = self._present()

    def enter(self) -> None:
        """Follow what has been frozen or thawed since; but a mode of evaluation alone is undone."""
        present = self._present()
        if any(present.values()):
            self._modes = present
            return
        for module, training in self._modes.items():
            module.training = training

    def _present(self) -> dict[nn.Module, bool]:
        return {m: m.training for m in self._model.modules()}


@contextlib.contextmanager
def preserved_buffers(module: nn.Module) -> Iterator[None]:
    """Let copies stand in for the buffers: an outer step must not move BatchNorm's statistics.

    Copies, not a restoration afterwards: graphs built before, inside and after stay valid.
    """
    saved = [
        (m, name, buffer)
        for m in module.modules()
        for name, buffer in m.named_buffers(recurse=False, remove_duplicate=False)
    ]
    # By identity: a buffer that two modules share must stay shared.
    copies = {id(buffer): buffer.clone() for _, _, buffer in saved}
    for submodule, name, buffer in saved:
        setattr(submodule, name, copies[id(buffer)])
    try:
        yield
    finally:
        for submodule, name, buffer in saved:
            setattr(submodule, name, buffer)


@contextlib.contextmanager
def without_gradients(tensors: Tensors) -> Iterator[None]:
    """Make leaf tensors constants: inside, no graph to them is built."""
    for tensor in tensors:
        tensor.requires_grad_(False)
    try:
        yield
    finally:
        for tensor in tensors:
            tensor.requires_grad_(True)


@contextlib.contextmanager
def captured_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what the model returns, for the Gauss-Newton matrix.

    Raises:
        UsageError: If the model is not called exactly once, or returns more than one tensor.
    """
    outputs: list[Any] = []
    handle = model.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()
    if len(outputs) != 1 or not isinstance(outputs[0], Tensor):
        found = ", ".join(type(output).__name__ for output in outputs) or "no call"
        raise UsageError(
            "curvature='gauss_newton' needs a training loss that calls the model once and a model "
            f"that returns one tensor, got {found}; use curvature='hessian'"
        )


def linearise_problem(
    problem: BilevelProblem, train_batch: Batch, val_batch: Batch, *, gauss_newton: bool = False
) -> Linearisation:
    """Return a problem linearised at its present weights and λ.

    What trains, what checks and what studies all come by here, so that a problem is treated alike.
    The products are taken with the kernels of this call (see `Kernels`), whoever takes them.

    Args:
        problem: Its model is as before afterwards, its modes and buffers too.
        train_batch: Of the curvature loader, or of the training loader without one.
        val_batch: Of the validation loader.
        gauss_newton: Whether the Gauss-Newton matrix takes the Hessian's place.

    Raises:
        UsageError: If a loss has no graph, or the Gauss-Newton matrix is asked for and the training
            loss does not call the model once for one tensor.
        DoubleBackwardError: If an operation hides its curvature from autograd; it is named.
    """
    model = problem.model
    with safe_kernels(model):
        train_loss, val_loss, outputs = _losses(
            problem, train_batch, val_batch, captured_outputs(model) if gauss_newton else None
        )
        kernels = Kernels.in_force()
    # What stands in for a function is in the graphs by now. From here on only the kernels matter:
    # a mode that sees every function would be asked at each of the arithmetic below.
    with kernels.active():
        return linearise(
            train_loss,
            val_loss,
            model,
            problem.hyper,
            penalty=as_penalty(problem.penalty()),
            outputs=outputs[0] if gauss_newton else None,
        )


def outer_losses(
    problem: BilevelProblem, train_batch: Batch, val_batch: Batch
) -> tuple[Tensor, Tensor]:
    """Return both losses as `linearise_problem` takes them."""
    with safe_kernels(problem.model):
        return _losses(problem, train_batch, val_batch)[:2]


def _losses(
    problem: BilevelProblem,
    train_batch: Batch,
    val_batch: Batch,
    capture: AbstractContextManager[list[Tensor]] | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return both losses, and what `capture` has found in the training loss."""
    model = problem.model
    # The same mode as in the inner steps, whose objective this is; but only those may move
    # BatchNorm's running statistics, or the curvature batches would be counted in.
    statistics = RunningStatistics(model)
    with preserved_buffers(model), capture or nullcontext([]) as outputs, statistics.observed():
        train_loss = as_loss(problem.train_loss(train_batch), "train_loss")
    # What λ is judged by is the model as it will be used: no dropout, and running statistics,
    # which go where the weights go.
    with evaluating(model), preserved_buffers(model), statistics.followed():
        val_loss = as_loss(problem.val_loss(val_batch), "val_loss")
    return train_loss, val_loss, outputs


def training_gradient(
    problem: BilevelProblem, batch: Batch, weights: Tensors
) -> tuple[Tensor, list[Tensor]]:
    """Return the training loss and its gradient as `linearise_problem` takes them, detached.

    Args:
        problem: At its present weights and λ; the penalty is left out.
        batch: Of the training data.
        weights: Those of its weights that are wanted.
    """
    # Checkpoints run their forward pass again in the backward pass, so that is inside as well.
    with safe_kernels(problem.model), preserved_buffers(problem.model):
        loss = problem.train_loss(batch)
        found = torch.autograd.grad(loss, list(weights), allow_unused=True)
    return loss.detach(), fill_missing(found, weights)


def aligned_penalty(problem: BilevelProblem) -> Penalty | None:
    """Return the problem's penalty as one over all of its weights."""
    penalty = as_penalty(problem.penalty())
    return None if penalty is None else penalty.aligned(problem.weights())


class Functional:
    """The losses of a problem as functions of explicit weights, for unrolling and for checks.

    Nothing is copied: the weights given stand in for the model's parameters during the call.
    """

    def __init__(self, problem: BilevelProblem) -> None:
        self._problem = problem
        self._names = list(named(problem.model, "the model"))

    def train_loss(self, weights: Tensors, batch: Batch) -> Tensor:
        """Return the whole training objective, the penalty included, at `weights`."""
        loss = self._call("train_loss", weights, batch)
        penalty = aligned_penalty(self._problem)
        return loss if penalty is None else loss + penalty.value(weights)

    def val_loss(self, weights: Tensors, batch: Batch, train_batch: Batch) -> Tensor:
        """Return the validation loss at `weights`, in evaluation mode.

        Args:
            weights: Stand in for the model's.
            batch: Of the validation data.
            train_batch: What the running statistics of normalisations are computed from, at
                `weights`, if they are computed in training.
        """
        model = self._problem.model
        statistics = RunningStatistics(model)
        if any(m.training and m._buffers for m in model.modules()):
            with preserved_buffers(model), statistics.observed():
                self._call("train_loss", weights, train_batch)
        with evaluating(model), statistics.followed(settled=True):
            return self._call("val_loss", weights, batch)

    def _call(self, method: str, weights: Tensors, batch: Batch) -> Tensor:
        values = {f"model.{n}": w for n, w in zip(self._names, weights, strict=True)}
        # The weights are in place during the call alone: nothing may be run again afterwards.
        with kept_activations():
            loss = functional_call(_Method(self._problem, method), values, (batch,))
        return as_loss(loss, method, graph=False)


class _Method(nn.Module):
    """A problem's loss as a module's forward, the form `functional_call` takes."""

    def __init__(self, problem: BilevelProblem, method: str) -> None:
        super().__init__()
        self.model = problem.model
        self.training = problem.model.training
        self._method = getattr(problem, method)

    def forward(self, batch: Batch) -> Any:
        return self._method(batch)
