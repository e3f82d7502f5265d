"""One step of several runs: inner steps, hypergradients and measurements, all runs at once."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ift_tune.base.exclusive import exclusive
from ift_tune.implicit.ambient import ordinary_autograd
from ift_tune.implicit.checkpoints import repeated_as_called
from ift_tune.implicit.double_backward import Kernels, safe_kernels, vjp
from ift_tune.implicit.hypergradient import Hypergradient, WarmStart
from ift_tune.implicit.vectors import fill_missing, flatten, scattered_like
from ift_tune.joint.optimizers import schedule_factor
from ift_tune.joint.packed.columns import write_back
from ift_tune.joint.packed.descent import kind_of
from ift_tune.joint.packed.losses import PackedLosses
from ift_tune.joint.packed.member import Member, PackMismatch
from ift_tune.joint.packed.solves import PackedSolution, solve_rows
from ift_tune.joint.packed.walks import Course, Gathered
from ift_tune.joint.splits import measures_batches
from ift_tune.problem.batches import map_batch
from ift_tune.problem.modes import TrainingModes, without_gradients
from ift_tune.problem.problem import BilevelProblem
from ift_tune.problem.sizes import as_size


class _Found(NamedTuple):
    """Losses and hypergradients, a row for each member, and how the solves came out."""

    train: Tensor
    val: Tensor
    grads: Tensor
    solution: PackedSolution


class Pack:
    """What takes the steps of several runs of one problem at once.

    The runs differ in meta-hyperparameters, and may be at different steps. Each keeps its state:
    what is computed here is handed to it, and it goes on as if it had computed that itself.
    """

    def __init__(self, problem: BilevelProblem, *, measures: bool = True) -> None:
        """Take the problem.

        Args:
            problem: One as each run has; its own tensors are left alone.
            measures: Whether its metrics can be taken of several runs at once.
        """
        self._problem, self._losses = problem, PackedLosses(problem)
        self._modes, self._measures = TrainingModes(problem.model), measures
        self._device = problem.weights()[0].device
        like = [w.detach() for w in problem.weights()]
        self._cold = flatten(scattered_like(like, 0))  # as `largest_eigenvalue` begins

    def require_same(self, problem: BilevelProblem) -> None:
        """Refuse a problem with other tensors or data than the pack's.

        Raises:
            PackMismatch: If it is one.
        """
        mine, theirs = self._problem, problem
        for what in ("model", "hyper"):
            shapes = [
                [(n, tuple(t.shape), t.dtype) for n, t in getattr(p, what).named_parameters()]
                for p in (mine, theirs)
            ]
            if shapes[0] != shapes[1]:
                raise PackMismatch(f"{_DIFFERS}; got other parameters of its {what}")
        for (name, one), (_, other) in zip(_tensors(mine), _tensors(theirs), strict=False):
            if not torch.equal(one, other):
                raise PackMismatch(f"{_DIFFERS}; got other values of {name}")
        if len(_tensors(mine)) != len(_tensors(theirs)):
            raise PackMismatch(f"{_DIFFERS}; got other data")

    def advance(self, members: Sequence[Member]) -> None:
        """Compute the next outer step of each member, up to what is measured of the splits.

        Where that fails, each goes on by itself as if it had not been tried.
        """
        members = sorted(members, key=lambda member: -member.config.inner_steps)
        with exclusive(), ordinary_autograd("a packed step", self._device):
            self._modes.enter()
            started = time.perf_counter()
            for member in members:
                member.forget()
            weights = self._losses.weights.join([m.weights for m in members])
            hypers = self._losses.hypers.join([m.hypers for m in members])
            try:
                self._train(members, weights, hypers)
                for member in members:
                    member.walks.settle()
                if learning := [m for m in members if m.learns]:
                    if len(learning) < len(members):
                        weights = self._losses.weights.join([m.weights for m in learning])
                        hypers = self._losses.hypers.join([m.hypers for m in learning])
                    self._solve(learning, weights, hypers, started)
            except BaseException:
                for member in members:
                    member.withdraw()
                raise

    def _train(self, members: Sequence[Member], weights: Tensor, hypers: Tensor) -> None:
        """Take the inner steps of each; those with the most come first, and go on by themselves."""
        losses, columns = self._losses, self._losses.weights
        accumulate = members[0].config.accumulate
        steps = [m.config.inner_steps for m in members]
        longest = steps[0]
        data = members[0].walks.data["train"]
        course = Course(
            data,
            [
                [m.walks.places("train") for _ in range(n * accumulate)]
                for m, n in zip(members, steps, strict=True)
            ],
        )
        descents = [m.inner.descent for m in members]
        kind = kind_of(descents[0].optimizer)
        if kind is None:
            raise ValueError("an optimiser that cannot be packed has come so far")
        taken = [m.course()[0] for m in members]
        descent = kind(descents, columns, taken)
        rates = descent.rates([self._lrs(m, longest) for m in members], weights)
        clips = [m.config.clip_norm for m in members]
        clip = None
        if any(c is not None for c in clips):
            clip = _column([math.inf if c is None else c for c in clips], weights)
        gradient_norms = weights.new_zeros(len(members))
        update_norms = weights.new_zeros(len(members))
        first_losses: Tensor | None = None
        at_work = [sum(step < n for n in steps) for step in range(longest)]
        penalties = {rows: losses.penalty(hypers[:rows]) for rows in set(at_work)}
        with (
            without_gradients(self._problem.hypers()),
            repeated_as_called(self._problem.model, self._problem.hyper),
        ):
            for step in range(longest):
                active = at_work[step]
                now, fixed = weights[:active], hypers[:active]
                gradient, losses_now = self._gradient(
                    now, fixed, course, step * accumulate, accumulate
                )
                if step == 0 and 0 in taken:
                    first_losses = losses_now
                if (penalty := penalties[active]) is not None:
                    with torch.no_grad():
                        penalty.add_gradient_(columns.views(gradient), columns.views(now))
                first = at_work[step + 1] if step + 1 < longest else 0
                if first < active:  # these are at their last step
                    before = now[first:].clone()
                    gradient_norms[first:active] = _norm(gradient[first:])
                if clip is not None:
                    scale = clip[:active] / (_norm(gradient) + 1e-6)
                    gradient = gradient * scale.clamp(max=1.0).unsqueeze(1)
                descent.step(now, gradient, rates[step, :active])
                if first < active:
                    update_norms[first:active] = _norm(now[first:] - before)
        size = as_size(self._problem.batch_size(course.at(0, 1).batch))
        found = [gradient_norms, update_norms]
        found += [] if first_losses is None else [first_losses]
        read = torch.stack([each.double() for each in found]).T.cpu().tolist()
        # Nothing of the members is changed before all has gone well.
        descent.close(steps)
        write_back([m.weights for m in members], columns.rows(weights))
        for member, began, (slope, update, *first) in zip(members, taken, read, strict=True):
            member.ahead.size, member.ahead.batches = size, member.config.inner_steps * accumulate
            member.ahead.norms = {
                "inner_gradient_norm": _number(slope),
                "inner_update_norm": _number(update),
            }
            member.ahead.first_loss = _number(first[0]) if first and not began else None

    def _lrs(self, member: Member, steps: int) -> list[float]:
        """Return the learning rate of each of the next inner steps."""
        config, (taken, total) = member.config, member.course()
        return [
            config.inner_lr
            * schedule_factor(
                config.inner_schedule,
                config.inner_warmup,
                taken + step,
                total,
            )
            for step in range(steps)
        ]

    def _gradient(
        self, weights: Tensor, hypers: Tensor, course: Course, first: int, accumulate: int
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of the training losses without the penalty, and the first losses."""
        leaf = weights.detach().requires_grad_()
        total: Tensor | None = None
        begun: Tensor | None = None
        for batch in range(first, first + accumulate):
            losses = self._losses.train(leaf, hypers, course.at(batch, len(weights)))
            scaled = losses.sum() if accumulate == 1 else losses.sum() / accumulate
            (gradient,) = torch.autograd.grad(scaled, leaf)
            total = gradient if total is None else total.add_(gradient)
            begun = losses.detach() if begun is None else begun
        if total is None or begun is None:
            raise ValueError("no batch")
        return total, begun

    def _solve(
        self, members: Sequence[Member], weights: Tensor, hypers: Tensor, started: float
    ) -> None:
        """Take the hypergradients, and hand them over."""
        columns = self._losses.hypers
        batches = [
            self._batches(members, members[0].walks.curvature),
            self._batches(members, "val"),
        ]
        split_names = (members[0].walks.curvature, "val")
        found = self._hypergradients(members, weights, hypers, *batches)
        numbers = {"train_loss": found.train, "val_loss": found.val}
        numbers["length"] = _norm(found.grads)
        numbers["finite"] = torch.isfinite(found.grads).all(dim=1)
        numbers |= self._agreements(members, found.grads)
        measured = self._batch_metrics(weights, hypers, *batches)
        read = _read({**numbers, **measured})
        samples = [batch.of(0) for batch in batches]
        solution = found.solution
        rows = columns.rows(found.grads)
        seconds = (time.perf_counter() - started) / len(members)
        kept: list[tuple[Member, int]] = []
        for i, member in enumerate(members):
            ahead, outcome = member.ahead, solution.results[i]
            if member.joint.measures_signal:  # which takes solves of its own
                outcome = None
            own = {name: values[i] for name, values in read.items()}
            if self._measures:
                ahead.batch_metrics = {
                    name: own[name] for name in measured if math.isfinite(own[name])
                }
            result = None
            if outcome is not None and own["finite"] == 1.0:
                left = WarmStart()
                if member.proven and (pair := solution.handed_on[i]) is not None:
                    left = WarmStart(eigenpair=member.handed_on(pair))
                    if pair.vector:
                        kept.append((member, i))
                result = Hypergradient(
                    grads=rows[i],
                    status=outcome.status,
                    stats=replace(outcome.stats, seconds=seconds),
                    train_loss=_number(own["train_loss"]),
                    val_loss=_number(own["val_loss"]),
                    warm=left,
                )
            alone = result is None or not member.proven
            for name, batch, sample in zip(split_names, batches, samples, strict=True):
                member.walks.ready.setdefault(name, []).append(batch.of(i) if alone else sample)
            if member.proven:
                ahead.result, ahead.length = result, _number(own["length"])
                agreement = own.get("agreement", math.nan)
                if result is not None and math.isfinite(agreement):
                    ahead.agreement = agreement
            elif result is not None:
                ahead.doubted, member.proven = result, True

        vectors = [pair.vector for _, i in kept if (pair := solution.handed_on[i]) is not None]
        write_back([[m.kept_vector] for m, _ in kept], vectors)

    def _hypergradients(
        self,
        members: Sequence[Member],
        weights: Tensor,
        hypers: Tensor,
        train_batch: Gathered,
        val_batch: Gathered,
    ) -> _Found:
        """Linearise both losses, solve and contract, as `hypergradient` does for one."""
        losses = self._losses
        w, h = weights.detach().requires_grad_(), hypers.detach().requires_grad_()
        with safe_kernels(self._problem.model):
            train = losses.train(w, h, train_batch)
            val = losses.val(w, h, val_batch)
            kernels = Kernels.in_force()
        with kernels.active():
            by_val = torch.autograd.grad(val.sum(), [w, h], allow_unused=True)
            vector, direct = fill_missing(by_val, [w, h])
            (slope,) = torch.autograd.grad(train.sum(), [w], create_graph=True)
            penalty = losses.penalty(hypers)

            def product(rows: Tensor) -> Tensor:
                """Return H·v of each row."""
                (found,) = vjp([slope] if slope.requires_grad else [], [w], [rows])
                if penalty is not None:
                    closed = penalty.hvp(losses.weights.views(weights), losses.weights.views(rows))
                    found = found + _joined(closed)
                return found

            solution = solve_rows(
                [m.config.inverse for m in members],
                product,
                vector,
                [m.largest() for m in members],
                self._cold,
            )
            (mixed,) = vjp([slope] if slope.requires_grad else [], [h], [solution.solution])
            if penalty is not None:
                closed = penalty.mixed(
                    losses.weights.views(weights), losses.weights.views(solution.solution)
                )
                parts = losses.hypers.views(mixed)
                for place, part in zip(losses.penalised(), closed, strict=True):
                    parts[place] = parts[place] + part
                mixed = _joined(parts)
        return _Found(train.detach(), val.detach(), direct - mixed, solution)

    def _agreements(self, members: Sequence[Member], grads: Tensor) -> dict[str, Tensor]:
        """Return the cosines with the outer optimisers' means; nothing where one keeps none."""
        means = [m.outer.mean() for m in members]
        if any(mean is None for mean in means):
            return {}
        mean = self._losses.hypers.join([m for m in means if m is not None])
        lengths = _norm(mean) * _norm(grads)
        return {"agreement": (mean * grads).sum(dim=1) / lengths}

    def _batch_metrics(
        self, weights: Tensor, hypers: Tensor, train_batch: Gathered, val_batch: Gathered
    ) -> dict[str, Tensor]:
        """Return what is measured on the batches of the outer step, but for the losses."""
        if not self._measures or not measures_batches(self._problem):
            return {}
        found: dict[str, Tensor] = {}
        for split, batch in (("train", train_batch), ("val", val_batch)):
            numbers = self._losses.measure(weights, hypers, batch)
            found |= {f"{split}_{k}": v for k, v in numbers.items() if k != "loss"}
        return found

    def measure(self, members: Sequence[Member], splits: Sequence[str]) -> None:
        """Compute what each member is about to measure of splits."""
        if not members:
            return
        with exclusive(), ordinary_autograd("a packed evaluation", self._device):
            weights = self._losses.weights.join([m.weights for m in members])
            hypers = self._losses.hypers.join([m.hypers for m in members])
            start = torch.stack([m.start for m in members])
            columns = {"change": _norm(hypers - start)}
            examples = {}
            for split in splits if self._measures else ():
                found, examples[split] = self._losses.evaluate(weights, hypers, split)
                columns |= {f"{split} {name}": column for name, column in found.items()}
            read = _read(columns)
        width = math.sqrt(self._losses.hypers.width)
        for i, member in enumerate(members):
            member.ahead.change = read["change"][i] / width / member.outer.scale
            for split, count in examples.items():
                numbers = {
                    key.removeprefix(f"{split} "): values[i]
                    for key, values in read.items()
                    if key.startswith(f"{split} ")
                }
                if numbers:
                    member.ahead.splits[split] = numbers, count

    def _batches(self, members: Sequence[Member], split: str) -> Gathered:
        places = [[m.walks.places(split)] for m in members]
        return Course(members[0].walks.data[split], places).at(0, len(members))


_DIFFERS = (
    "a pack's trials must have one problem: leave --pack off where the factory reads the searched "
    "settings"
)


def _tensors(problem: BilevelProblem) -> list[tuple[str, Tensor]]:
    """Return what a pack's trials share: data, and buffers and frozen weights, by name."""
    found: list[tuple[str, Tensor]] = []
    for name, loader in vars(problem.splits).items():
        if loader is not None:
            map_batch(partial(_noted, found, f"Splits.{name}"), loader.tensors)
    for module in (problem.model, problem.hyper):
        found += list(module.named_buffers())
        found += [(name, p) for name, p in module.named_parameters() if not p.requires_grad]
    return found


def _noted(found: list[tuple[str, Tensor]], name: str, tensor: Tensor) -> Tensor:
    found.append((name, tensor))
    return tensor


def _read(columns: dict[str, Tensor]) -> dict[str, list[float]]:
    """Return columns as numbers, asking the device once."""
    if not columns:
        return {}
    rows = torch.stack([column.double() for column in columns.values()]).cpu().tolist()
    return dict(zip(columns, rows, strict=True))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Return stacks as one matrix."""
    return torch.cat([part.reshape(len(part), -1) for part in parts], dim=1)


def _norm(rows: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return length


def _number(value: float) -> Tensor:
    """Return a number that has been read as the tensor that it is read from otherwise."""
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(like)
