"""Which problems and settings can be packed; the others are refused, with what and how to mend it.

What can be told by looking at a problem is looked at. What cannot (branches on numbers, random
draws, tensors that a loss has kept) shows when its losses are taken for two rows at once, and are
held against those that the problem gives by itself with the same weights and λ.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ift_tune.base.errors import UsageError
from ift_tune.base.randomness import GlobalState, RandomStream
from ift_tune.implicit.double_backward import safe_kernels
from ift_tune.implicit.vectors import Tensors, fill_missing, flatten, precision, relative_error
from ift_tune.joint.config import MetaConfig
from ift_tune.joint.optimizers import make_optimizer
from ift_tune.joint.packed.descent import kind_of
from ift_tune.joint.packed.grounds import Ground, Grounds
from ift_tune.joint.packed.losses import PackedLosses
from ift_tune.joint.packed.noted import changed, noted_of, same_draws
from ift_tune.joint.packed.solves import PACKED_INVERSES, packs
from ift_tune.joint.packed.walks import Gathered, require_batches
from ift_tune.problem.batches import Batch, Batches
from ift_tune.problem.evaluation import measured
from ift_tune.problem.loaders import once_through
from ift_tune.problem.losses import aligned_penalty
from ift_tune.problem.modes import evaluating
from ift_tune.problem.problem import BilevelProblem

_OFF = "leave --pack off"
_ALLOWED = 1e4  # roundings


def require_packable_config(config: MetaConfig, processes: int = 1, *, learns: bool = True) -> None:
    """Refuse settings that have no packed form.

    Args:
        config: Of the trials.
        processes: How many share each of them.
        learns: Whether they take outer steps; else those of these do not matter.

    Raises:
        UsageError: If there is one; it is named.
    """
    optimizer = make_optimizer(
        config.inner_optimizer, [torch.zeros(1)], config.inner_lr, momentum=config.inner_momentum
    )
    if kind_of(optimizer) is None:
        raise _refused(
            f"the inner optimizer {config.inner_optimizer!r}", "use 'adam', 'sgd' or 'momentum'"
        )
    if learns and not packs(config.inverse):
        plain = "without a preconditioner"
        raise _refused(
            f"the inverse {config.inverse.name!r} with these settings",
            f"use {', '.join(PACKED_INVERSES)}, {plain}",
        )
    outer = (
        ("warm_start", False),
        ("curvature", "hessian"),
        ("products", "exact"),
        ("memory_budget", None),
    )
    for name, usual in (("precision", "float32"), *(outer if learns else ())):
        if getattr(config, name) != usual:
            raise _refused(f"{name}={getattr(config, name)!r}", f"use {usual!r}")
    if processes > 1:
        raise _refused(f"processes_per_trial={processes}", "let each trial have one process")


def require_packable(
    problem: BilevelProblem, config: MetaConfig, other: BilevelProblem | None = None
) -> bool:
    """Refuse a problem whose trials cannot advance together.

    Args:
        problem: As it was built; its state comes back.
        config: One that it was built for.
        other: The same for another seed, where trials of several seeds shall.

    Returns:
        Whether its metrics can be taken of several trials at once; else each measures its own.

    Raises:
        UsageError: If it cannot be packed; what is in the way is named.
    """
    problems = [problem] if other is None else [problem, other]
    for each in problems:
        _require_plain(each, config)
    device = problem.weights()[0].device
    with contextlib.ExitStack() as stack:
        for each in problems:
            stack.enter_context(_put_back(each))
        stack.enter_context(RandomStream(0, device).aside())
        return _Trial([problem, problems[-1]]).passes()


@contextlib.contextmanager
def _put_back(problem: BilevelProblem) -> Iterator[None]:
    """Let a problem be as before, its weights, λ and walks."""
    kept = copy.deepcopy([problem.model.state_dict(), problem.hyper.state_dict()])
    loaders = [each for each in vars(problem.splits).values() if isinstance(each, Batches)]
    walks = [loader.generator.get_state() for loader in loaders]
    try:
        yield
    finally:
        problem.model.load_state_dict(kept[0])
        problem.hyper.load_state_dict(kept[1])
        for loader, state in zip(loaders, walks, strict=True):
            loader.generator.set_state(state)


def _refused(what: str, mend: str = "") -> UsageError:
    return UsageError(f"{what} cannot be packed: {mend + ', or ' if mend else ''}{_OFF}")


def _require_plain(problem: BilevelProblem, config: MetaConfig) -> None:
    """Refuse what can be told by looking at it."""
    require_batches(problem.splits)
    if problem.configure_inner(problem.weights(), config) is not None:
        raise _refused("an optimizer of the problem's own (configure_inner)")
    for root, owner in ((problem.model, "model"), (problem.hyper, "hyper")):
        for name, module in root.named_modules():
            place = f"{owner}.{name}" if name else owner
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
                kind = type(module).__name__
                raise _refused(f"the running statistics of {place}, a {kind}", "use GroupNorm")
            if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None):
                raise _refused(f"{place}, which is compiled", "give the module itself")
            if any(not _is_packable(hook) for hook in _hooks(module)):
                raise _refused(f"the hooks of {place}")
        for name, tensor in root.named_parameters():
            if tensor._backward_hooks or tensor._post_accumulate_grad_hooks:
                raise _refused(f"the hooks of {owner}.{name}")
    for what, tensors in (("weights", problem.weights()), ("λ", problem.hypers())):
        if len({t.dtype for t in tensors}) > 1:
            raise _refused(f"{what} of several types")


def _hooks(module: nn.Module) -> list[Any]:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [hook for name in names for hook in (getattr(module, name, None) or {}).values()]


def _is_packable(hook: Any) -> bool:
    """Return whether a hook's owner says that it depends on the call and on λ alone."""
    return bool(getattr(getattr(hook, "__self__", None), "packable", False))


class _Trial:
    """Two rows of weights and λ near a problem's own, by the pack and one by one."""

    def __init__(self, problems: Sequence[BilevelProblem]) -> None:
        """Take the problem of each row: the same one, or two of the same form."""
        self._problems, (problem, other) = problems, problems
        grounds = [Ground(each) for each in ([problem] if other is problem else problems)]
        _require_same_form(problems, grounds)
        every = Grounds(grounds[0])
        self._standing = every.of([grounds[0], every.known(grounds[-1])])
        self._losses = PackedLosses(problem).at(self._standing)
        generator = torch.Generator().manual_seed(0)

        def near(tensors: Tensors) -> Tensor:
            flat = flatten([t.detach() for t in tensors])
            noise = torch.randn(2, len(flat), generator=generator, dtype=flat.dtype).to(flat)
            return flat + 0.05 * noise * (0.1 + flat.abs())

        self._weights, self._hypers = near(problem.weights()), near(problem.hypers())

    def passes(self) -> bool:
        """Return whether metrics pass too; raise if the losses do not."""
        problem = self._problems[0]
        batches = {}
        for split in ("train", "val"):
            loader: Batches = getattr(problem.splits, split)
            size = loader.batch_size or loader.size
            first = torch.arange(size)
            second = first if loader.batch_size is None else (first + 1) % loader.size
            batches[split] = self._standing.course(split, [[first], [second]]).at(0, 2)
            single = problem.batch_size(batches[split].of(0))
            if type(problem).batch_size is not BilevelProblem.batch_size and (
                single != problem.batch_size(batches[split].of(1))
            ):
                raise _refused("a batch_size that depends on the examples")
        train, val = batches["train"], batches["val"]
        for row, each in enumerate(self._problems):  # what is noted at the first call is noted
            each.train_loss(train.of(row))
        noted = [noted_of(each) for each in self._problems]
        drawn = GlobalState(self._weights.device).state_dict()
        try:
            packed = self._packed(train, val)
        except UsageError:
            raise
        except Exception as error:
            raise self._explained(error) from error
        alone = [self._alone(row, train.of(row), val.of(row)) for row in range(2)]
        for before, each in zip(noted, self._problems, strict=True):
            if changed(before, noted_of(each)):
                raise _refused(f"{changed(before, noted_of(each))}, which a loss changes")
        if not same_draws(drawn, GlobalState(self._weights.device).state_dict()):
            raise _refused("a loss that draws random numbers")
        for row in range(2):
            self._compare({name: part[row] for name, part in packed.items()}, alone[row])
        return self._measures()

    def _packed(self, train: Gathered, val: Gathered) -> dict[str, list[Tensor]]:
        losses = self._losses
        w = self._weights.detach().requires_grad_()
        h = self._hypers.detach().requires_grad_()
        with safe_kernels(self._problems[0].model):
            by_train, by_val = losses.train(w, h, train), losses.val(w, h, val)
        penalty = losses.penalty(self._hypers)
        slope = fill_missing(
            torch.autograd.grad(by_train.sum(), [w], create_graph=True, allow_unused=True), [w]
        )[0]
        if penalty is not None:
            total = slope.detach().clone()
            penalty.add_gradient_(losses.weights.views(total), losses.weights.views(w.detach()))
            penalised = total
        else:
            penalised = slope.detach()
        products = (
            torch.autograd.grad((slope * slope.detach()).sum(), [w, h], allow_unused=True)
            if slope.requires_grad
            else (None, None)
        )
        second = fill_missing(products, [w, h])
        judged = fill_missing(torch.autograd.grad(by_val.sum(), [w, h], allow_unused=True), [w, h])
        found = {
            "training loss": by_train.detach().unsqueeze(1),
            "validation loss": by_val.detach().unsqueeze(1),
            "gradient of the training loss": penalised,
            "gradient of the validation loss": torch.cat(judged, dim=1),
            "Hessian-vector product": second[0],
            "mixed product": second[1],
        }
        return {name: list(part.unbind(0)) for name, part in found.items()}

    def _alone(self, row: int, train: Batch, val: Batch) -> dict[str, Tensor]:
        problem = self._problems[row]
        w, h = problem.weights(), problem.hypers()
        self._put(row)
        with safe_kernels(problem.model):
            by_train = problem.train_loss(train)
            with evaluating(problem.model):
                by_val = problem.val_loss(val)
        found = torch.autograd.grad(by_train, w, create_graph=True, allow_unused=True)
        penalty = aligned_penalty(problem)
        reached = set() if penalty is None else penalty.reached(len(w))
        if any(g is None and i not in reached for i, g in enumerate(found)):
            lost = [n for n, g in zip(self._losses.weights.names, found, strict=True) if g is None]
            raise _refused(f"{lost[0]}, which the training loss does not see,", "freeze it")
        slopes = fill_missing(found, w)
        penalised = [s.detach().clone() for s in slopes]
        if penalty is not None:
            penalty.add_gradient_(penalised, [x.detach() for x in w])
        curved = [s for s in slopes if s.requires_grad]
        inner = [(s * s.detach()).sum() for s in curved]
        products: Any = [None] * (len(w) + len(h))
        if inner:
            products = torch.autograd.grad(torch.stack(inner).sum(), [*w, *h], allow_unused=True)
        second = fill_missing(products, [*w, *h])
        judged = fill_missing(torch.autograd.grad(by_val, [*w, *h], allow_unused=True), [*w, *h])
        return {
            "training loss": by_train.detach().reshape(1),
            "validation loss": by_val.detach().reshape(1),
            "gradient of the training loss": flatten(penalised),
            "gradient of the validation loss": flatten(judged),
            "Hessian-vector product": flatten(second[: len(w)]),
            "mixed product": flatten(second[len(w) :]),
        }

    @torch.no_grad()
    def _put(self, row: int) -> None:
        """Give the problem the weights and λ of a row."""
        for columns, matrix, own in (
            (self._losses.weights, self._weights, self._problems[row].weights()),
            (self._losses.hypers, self._hypers, self._problems[row].hypers()),
        ):
            for tensor, value in zip(own, columns.row(matrix[row]), strict=True):
                tensor.copy_(value)

    def _compare(self, packed: Mapping[str, Tensor], alone: Mapping[str, Tensor]) -> None:
        allowed = _ALLOWED * precision(list(alone.values()))
        for name, own in alone.items():
            if not bool(torch.isfinite(own).all()):
                continue
            error = relative_error([packed[name]], [own])
            if error > allowed and float(own.abs().max()) > precision([own]):
                raise _refused(
                    f"a problem whose {name} differs by {error:.1g} where two trials share it",
                    "let the losses read weights and λ from model and hyper alone",
                )

    def _measures(self) -> bool:
        """Return whether the metrics can be taken of several trials at once, and are the same."""
        try:
            found, _ = self._losses.evaluate(self._weights, self._hypers, "search")
        except Exception:  # noqa: BLE001  (whatever a metric does: then each trial takes its own)
            return False
        for row in range(2):
            self._put(row)
            problem = self._problems[row]
            batches = list(once_through(problem.splits.search))
            with evaluating(problem.model):
                own = measured(partial(problem.evaluate, batches))
            if own.keys() != found.keys():
                return False
            for name, value in own.items():
                if abs(float(found[name][row]) - value) > 1e-4 * (1e-3 + abs(value)):
                    return False
        return True

    def _explained(self, error: Exception) -> UsageError:
        """Return the refusal of a problem whose losses cannot be taken of two trials at once."""
        text, problem = str(error), self._problems[0]
        kind = type(problem.hyper).__name__
        first = text.splitlines()[0][:160] if text else type(error).__name__
        if "random" in text:
            return _refused(f"a loss with {kind} that draws random numbers (dropout, augmentation)")
        if ".item()" in text or "data-dependent" in text:
            return _refused(f"a loss with {kind} that branches on numbers ({first})")
        return _refused(f"a loss of {type(problem).__name__} with {kind} ({first})")


def _require_same_form(problems: Sequence[BilevelProblem], grounds: Sequence[Ground]) -> None:
    """Refuse problems of two seeds whose tensors are of different shapes."""
    forms = [
        ground.form() | {n: tuple(p.shape) for n, p in _parameters(problem)}
        for problem, ground in zip(problems, grounds, strict=False)
    ]
    mine, theirs = forms[0], forms[-1]
    if other := [name for name in (mine | theirs) if mine.get(name) != theirs.get(name)]:
        raise _refused(f"a problem that for another seed has other sizes of {other[0]}")


def _parameters(problem: BilevelProblem) -> Iterator[tuple[str, nn.Parameter]]:
    for owner, module in (("model", problem.model), ("hyper", problem.hyper)):
        for name, parameter in module.named_parameters():
            yield f"{owner}.{name}", parameter
