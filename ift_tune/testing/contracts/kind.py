"""What holds for every kind of hyperparameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ift_tune.base.arguments import require_instance, shown
from ift_tune.base.errors import UsageError
from ift_tune.hyper import Compose, HyperKind, WeightDecay
from ift_tune.hyper.supervised import ClassificationProblem, RegressionProblem, SupervisedProblem
from ift_tune.implicit.hypergradient import hypergradient
from ift_tune.implicit.inverse import Dense
from ift_tune.implicit.vectors import Tensors, count, flatten
from ift_tune.problem.batches import Batch
from ift_tune.problem.losses import aligned_penalty
from ift_tune.problem.problem import Splits
from ift_tune.testing.check import check_hypergradient
from ift_tune.testing.contracts.laws import (
    MOST_NUMBERS,
    Laws,
    check_laws,
    require,
    require_numbers,
    require_views,
    require_words,
)
from ift_tune.testing.frozen import double_batch

_EXAMPLES, _CLASSES = 9, 3
_SPREAD = 0.4  # by which λ is moved away from a start where all are equal
_DECAY = 0.03  # beside the kind: without one the inner problem may have no minimum


def check_kind(
    kind: type[HyperKind] | HyperKind | Callable[[nn.Module, Tensor], HyperKind],
    *,
    model: nn.Module | None = None,
    batch: Batch | None = None,
) -> None:
    """Check that a kind of hyperparameters keeps the laws of its family, in float64.

    Its hypergradient is compared with finite differences of the re-solved inner problem, beside a
    weight decay; and it is checked that a composition keeps the order of its parts, that
    `state_dict` and deep copies hold all there is, that hooks keep shapes and leave nothing
    behind, that what it shows is finite and detached, that its coarse space is consistent, and
    that its random numbers come from PyTorch's global generator.

    Args:
        kind: A function ``(model, inputs)`` that makes one for a small net that classifies 9 images
            of shape (2, 4, 4); a class, for its `example`; or an instance. Neither it nor its model
            is modified.
        model: Of an instance: what it was made for, small and smooth.
        batch: Of an instance: ``(inputs, targets)`` or ``(inputs, targets, index)`` of the
            training split; a model whose targets are class numbers classifies, others regress.

    Raises:
        CheckFailedError: If a law is broken; all that are broken are named.
        UsageError: If an instance is given without its model and a batch, or a class without an
            example.

    Example:
        >>> import ift_tune
        >>> from ift_tune.testing.contracts import check_kind
        >>> check_kind(ift_tune.ClassWeights)
        >>> check_kind(lambda model, inputs: ift_tune.LabelSmoothing(3, like=inputs))
    """
    if not isinstance(kind, HyperKind):
        make = _maker(kind)
        check_laws(getattr(kind, "__name__", "the kind"), _LAWS, lambda: _example(make))
        return
    if model is None or batch is None:
        raise UsageError(
            f"a {type(kind).__name__} is checked at work: give check_kind its model and a batch, "
            "or a function (model, inputs) that makes one, got the instance alone"
        )
    check_laws(type(kind).__name__, _LAWS, lambda: _instance(kind, model, batch))


def _maker(kind: Any) -> Callable[[nn.Module, Tensor], HyperKind]:
    """Return what makes a kind for a model and inputs.

    Raises:
        UsageError: If it is nothing that does.
    """
    if isinstance(kind, type) and issubclass(kind, HyperKind):
        if vars(HyperKind)["example"].__func__ is kind.example.__func__:  # type: ignore[attr-defined]
            kind.example(nn.Identity(), torch.empty(0))  # which says what to do
        return kind.example
    if isinstance(kind, type) or not callable(kind):
        raise UsageError(
            "check_kind takes a HyperKind, its class, or a function (model, inputs) that makes "
            f"one, got {shown(kind)}"
        )
    made: Callable[[nn.Module, Tensor], HyperKind] = kind
    return made


@dataclass(frozen=True)
class _Case:
    """A kind in a problem, which a law may modify."""

    problem: SupervisedProblem
    train: Batch
    val: Batch

    @property
    def kind(self) -> HyperKind:
        return self.problem.hyper

    @property
    def model(self) -> nn.Module:
        return self.problem.model

    def composed(self, *, decay_first: bool = False) -> SupervisedProblem:
        """Return the problem with a weight decay beside the kind."""
        parts = {"kind": self.kind, "decay": WeightDecay(self.model, "model", init=_DECAY)}
        names = sorted(parts, reverse=not decay_first)
        kind = Compose({name: parts[name] for name in names})
        return type(self.problem)(self.model, kind, self.problem.splits)

    def loss(self, problem: SupervisedProblem | None = None) -> Tensor:
        """Return the training loss, always with the same random numbers."""
        torch.default_generator.manual_seed(0)
        return (problem or self.problem).train_loss(self.train)


def _example(make: Callable[[nn.Module, Tensor], HyperKind]) -> _Case:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    net = nn.Sequential(
        *(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 2, bias=False)),
        *(nn.Tanh(), nn.Linear(2, _CLASSES)),
    ).double()
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(normal(*weight.shape))
    index = torch.arange(_EXAMPLES)
    train, val = ((1.5 * normal(_EXAMPLES, 2, 4, 4), index % _CLASSES, index) for _ in range(2))
    torch.default_generator.manual_seed(0)  # of an example that draws its λ
    kind = make(net, train[0])
    require_instance("what check_kind is given", kind, HyperKind, "a function that makes a kind")
    return _case(ClassificationProblem, net, kind, train, val)


def _instance(kind: HyperKind, model: nn.Module, batch: Batch) -> _Case:
    model, kind = copy.deepcopy((model, kind))  # together: a kind may know its model
    inputs, targets, *rest = batch
    index = rest[0] if rest else torch.arange(len(inputs), device=inputs.device)
    rows: Any = double_batch((inputs, targets, index))
    problem = RegressionProblem if targets.is_floating_point() else ClassificationProblem
    return _case(problem, model.double(), kind.double(), rows, rows)


def _case(
    problem: type[SupervisedProblem], model: nn.Module, kind: HyperKind, train: Batch, val: Batch
) -> _Case:
    _move(kind, 1)
    return _Case(problem(model, kind, Splits([train], [val], [val], [val])), train, val)


@torch.no_grad()
def _move(kind: HyperKind, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for raw in kind.parameters():
        noise = torch.randn(raw.shape, generator=generator, dtype=torch.float64)
        raw.add_(_SPREAD * noise.to(raw))


def _is_declared(case: _Case) -> None:
    kind, weight = case.kind, next(case.model.parameters())
    hypers = list(kind.parameters())
    require(isinstance(kind.name, str) and kind.name != "", f"its name is {kind.name!r}")
    size = count(hypers)
    require(kind.count == size > 0, f"it counts {kind.count} of {size} hyperparameters")
    for h in hypers:
        require(
            (h.dtype, h.device) == (weight.dtype, weight.device),
            f"λ is {h.dtype} on {h.device}, and the model {weight.dtype} on {weight.device}",
        )
    case.problem.validate()


def _has_the_right_hypergradient(case: _Case) -> None:
    report = check_hypergradient(case.composed(), directions=1, unrolled_steps=3)
    require(report.stationarity < 1e-8, f"stationary only to {report.stationarity:.1e}")


def _keeps_its_place(case: _Case) -> None:
    for decay_first in (False, True):
        problem = case.composed(decay_first=decay_first)

        def gradients(hyper: nn.Module, problem: SupervisedProblem = problem) -> Tensors:
            return hypergradient(
                *(case.loss(problem), problem.val_loss(case.val), case.model, hyper),
                inverse=Dense(damping=1.0),
                penalty=problem.penalty(),
            ).grads

        wanted = [gradient for part in _parts(problem.hyper) for gradient in gradients(part)]
        found = flatten(gradients(problem.hyper))
        # Kernels may sum in another order.
        close = torch.allclose(found, flatten(wanted), rtol=1e-12, atol=1e-14)
        require(close, "composed, its gradients are not those that it has alone")


def _parts(kind: HyperKind) -> list[HyperKind]:
    """Return the elementary kinds of a composition, in order."""
    if not isinstance(kind, Compose):
        return [kind]
    return [part for name in kind.kinds for part in _parts(kind[name])]


def _has_its_state_in_state_dict(case: _Case) -> None:
    twin = copy.deepcopy(case.problem)
    _move(twin.hyper, 2)
    require(twin.summary() != case.kind.summary(), "its summary does not tell one λ from another")
    twin.hyper.load_state_dict(copy.deepcopy(case.kind.state_dict()))
    same = torch.equal(flatten(twin.hypers()), flatten(case.problem.hypers()))
    require(same, "load_state_dict does not bring λ back")
    require(twin.summary() == case.kind.summary(), "its summary is another after load_state_dict")
    losses = [_whole(case, problem) for problem in (case.problem, twin)]
    require(losses[0] == losses[1], f"training losses of {losses[0]} and {losses[1]} with equal λ")


def _whole(case: _Case, problem: SupervisedProblem) -> float:
    """Return the training loss with the penalty."""
    penalty = aligned_penalty(problem)
    loss = case.loss(problem)
    return float((loss if penalty is None else loss + penalty.value(problem.weights())).detach())


def _has_copies_of_its_own(case: _Case) -> None:
    before, hypers = _whole(case, case.problem), flatten(case.problem.hypers()).detach().clone()
    twin = copy.deepcopy(case.problem)
    twin.validate()
    require(_whole(case, twin) == before, "a copy of problem and kind has another training loss")
    with torch.no_grad():
        for tensor in (*twin.weights(), *twin.hypers()):
            tensor.add_(1.0)
    own = torch.equal(flatten(case.problem.hypers()).detach(), hypers)
    require(own and _whole(case, case.problem) == before, "what changes a copy changes the kind")


def _keeps_shapes(case: _Case) -> None:
    inputs, targets, index = case.train
    changed = case.kind.inputs(inputs, index)
    require(_form(changed) == _form(inputs), f"inputs() makes {_form(changed)} of {_form(inputs)}")
    outputs = case.model(inputs)

    def plain(outputs: Tensor, targets: Tensor) -> Tensor:
        return case.problem.prediction_loss(outputs, targets, reduction="none")

    losses, wanted = case.kind.criterion(plain)(outputs, targets), plain(outputs, targets)
    require(_form(losses) == _form(wanted), f"criterion() gives {_form(losses)} for losses")
    some = torch.rand(3, dtype=torch.float64, device=index.device)
    weighed = case.kind.weigh_seen(some, inputs[[0, 2, 2]], index[[0, 2, 2]])
    require(_form(weighed) == _form(some), f"weigh() makes {_form(weighed)} of {_form(some)}")


def _form(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _leaves_nothing_behind(case: _Case) -> None:
    def state() -> list[object]:
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in case.model.modules()]
        return [[id(p) for p in case.model.parameters()], hooks, list(case.model.state_dict())]

    before, loss = state(), case.problem.val_loss(case.val).detach()
    with case.kind.applied():
        case.model(case.train[0])
    require(state() == before, "applied() leaves a parameter or a hook in the model")
    try:
        with case.kind.applied():
            raise _Interruption
    except _Interruption:
        require(state() == before, "applied() leaves traces in the model after an exception")
    same = torch.equal(case.problem.val_loss(case.val).detach(), loss)
    require(same, "the validation loss is another after applied()")


class _Interruption(Exception):
    """Anything that ends a training loss early."""


def _says_how_it_acts(case: _Case) -> None:
    require(
        not case.kind.closed_form or case.kind.penalty() is not None,
        "closed_form without a penalty",
    )
    if case.kind.closed_form:
        hypers = case.problem.hypers()
        found = torch.autograd.grad(case.loss(), hypers, allow_unused=True)
        reached = any(g is not None for g in found)
        require(not reached, "closed_form is true, and λ acts in the training loss itself")


def _draws_from_the_global_generator(case: _Case) -> None:
    first, second = (float(case.loss().detach()) for _ in range(2))
    require(first == second, f"the loss is {first} and {second} from the same torch.manual_seed")


def _shows_what_it_learned(case: _Case) -> None:
    torch.default_generator.manual_seed(3)
    before = flatten(case.problem.hypers()).detach().clone()
    require_numbers(case.kind.summary(), most=MOST_NUMBERS * len(_parts(case.kind)))
    require_words(case.kind.words())
    require_views(case.kind.views())
    learned = case.kind.learned()
    arrays = all(isinstance(a, Tensor) and not a.requires_grad for a in learned.values())
    require(arrays and bool(learned), "learned() must be a dict of names and detached tensors")
    same = torch.equal(flatten(case.problem.hypers()).detach(), before)
    require(same, "summary(), learned(), words() or views() changes λ")
    drawn = torch.rand(())
    torch.default_generator.manual_seed(3)
    require(
        torch.equal(drawn, torch.rand(())), "summary(), learned(), words() or views() draws numbers"
    )


def _has_a_consistent_coarse_space(case: _Case) -> None:
    kind = case.kind
    space, hypers = kind.coarse_space(), list(kind.parameters())
    before = flatten(hypers).detach().clone()
    learned = [h.requires_grad for h in hypers]  # a part of a network may be frozen
    for name, p in space.items():
        require(0.0 < p.low <= p.start <= p.high, f"{name}: {p} starts outside its range")
    for share in (0.25, 0.75) if space else ():
        values = {name: p.low ** (1.0 - share) * p.high**share for name, p in space.items()}
        values |= {name: p.start for name, p in space.items() if p.secondary}
        kind.set_coarse(values)
        after = flatten(list(kind.parameters())).detach().clone()
        for name, p in kind.coarse_space().items():
            close = abs(p.start / values[name] - 1.0) < 1e-6
            require(close, f"set to {name}={values[name]:g}, it says {p.start:g}")
        kind.set_coarse(values)
        again = flatten(list(kind.parameters())).detach()
        require(torch.equal(again, after), "set_coarse() depends on the λ of before")
    if not space:
        kind.set_coarse({})
        same = torch.equal(flatten(hypers).detach(), before)
        require(same, "set_coarse({}) changes λ, and there is no coarse space")
    # An optimiser holds the tensors of λ: others in their place would never be learned.
    kept = [id(h) for h in kind.parameters()] == [id(h) for h in hypers]
    require(kept, "set_coarse() replaces the tensors of λ")
    same = [h.requires_grad for h in hypers] == learned and all(h.grad is None for h in hypers)
    require(same, "set_coarse() leaves gradients, or λ without requires_grad")


_LAWS: Laws[_Case] = {
    "it declares itself": _is_declared,
    "its hypergradient is right": _has_the_right_hypergradient,
    "compositions keep the order of their parts": _keeps_its_place,
    "state_dict holds its state": _has_its_state_in_state_dict,
    "copies are independent": _has_copies_of_its_own,
    "hooks keep shapes": _keeps_shapes,
    "hooks leave nothing behind": _leaves_nothing_behind,
    "closed_form is true only of a penalty alone": _says_how_it_acts,
    "random numbers come from the global generator": _draws_from_the_global_generator,
    "what it shows is finite and detached": _shows_what_it_learned,
    "its coarse space is consistent": _has_a_consistent_coarse_space,
}
