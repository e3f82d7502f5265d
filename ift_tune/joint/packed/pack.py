"""One step of several runs: inner steps, hypergradients and measurements, all runs at once."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ift_tune.base.errors import UsageError
from ift_tune.base.exclusive import exclusive
from ift_tune.implicit.ambient import ordinary_autograd
from ift_tune.implicit.double_backward import Kernels, safe_kernels, vjp
from ift_tune.implicit.hypergradient import Hypergradient, WarmStart
from ift_tune.implicit.vectors import fill_missing, flatten, scattered_like
from ift_tune.joint.packed.columns import norms, number, write_back
from ift_tune.joint.packed.grounds import Ground, Grounds, Standing
from ift_tune.joint.packed.inner import InnerSteps
from ift_tune.joint.packed.losses import PackedLosses
from ift_tune.joint.packed.member import Member
from ift_tune.joint.packed.proofs import Claim, PackMismatch
from ift_tune.joint.packed.solves import PackedSolution, solve_rows
from ift_tune.joint.packed.walks import Gathered
from ift_tune.joint.splits import measures_batches
from ift_tune.problem.modes import TrainingModes
from ift_tune.problem.problem import BilevelProblem


class _Found(NamedTuple):
    """Losses and hypergradients, a row for each member, and how the solves came out.

    And v, with H·q where somebody is to prove it.
    """

    train: Tensor
    val: Tensor
    grads: Tensor
    solution: PackedSolution
    vector: Tensor
    image: Tensor | None


class Pack:
    """What takes the steps of several runs of one problem at once.

    The runs differ in meta-hyperparameters, and may be at different steps. Each keeps its state:
    what is computed here is handed to it, and it goes on as if it had computed that itself.
    """

    def __init__(
        self, problem: BilevelProblem, *, measures: bool = True, several: bool = False
    ) -> None:
        """Take the problem.

        Args:
            problem: One as each run has; its own tensors are left alone.
            measures: Whether its metrics can be taken of several runs at once.
            several: Whether runs may have data, buffers and frozen weights of their own.
        """
        self._own, self._several = Ground(problem), several
        self._grounds = Grounds(self._own)
        self._problem, self._losses = problem, PackedLosses(problem)
        self._modes, self._measures = TrainingModes(problem.model), measures
        self._device = problem.weights()[0].device
        like = [w.detach() for w in problem.weights()]
        self._cold = flatten(scattered_like(like, 0))  # as `largest_eigenvalue` begins

    def ground(self, problem: BilevelProblem) -> Ground:
        """Return what a run's problem has beside weights and λ, the one of an equal member.

        Raises:
            PackMismatch: If it has other tensors than the pack's; if all must have the same data,
                also if it has others.
        """
        for what in ("model", "hyper"):
            shapes = [
                [(n, tuple(t.shape), t.dtype) for n, t in getattr(p, what).named_parameters()]
                for p in (self._problem, problem)
            ]
            if shapes[0] != shapes[1]:
                raise PackMismatch(f"{_DIFFERS}; got other parameters of its {what}")
        try:
            found = Ground(problem)
        except UsageError as error:
            raise PackMismatch(str(error)) from error
        mine, theirs = self._own.form(), found.form()
        if other := [name for name in (mine | theirs) if mine.get(name) != theirs.get(name)]:
            raise PackMismatch(f"{_DIFFERS}; got other sizes of {other[0]}")
        if not self._several and (name := self._own.difference(found)) is not None:
            raise PackMismatch(f"{_DIFFERS}; got other values of {name}")
        return self._grounds.known(found)

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
            try:
                weights, hypers, standing = self._joined(members)
                InnerSteps(members, self._losses, standing).take(weights, hypers)
                for member in members:
                    member.walks.settle()
                for learning in _by_inverse(members):
                    if len(learning) < len(members):
                        weights, hypers, standing = self._joined(learning)
                    self._solve(learning, weights, hypers, standing, started)
            except BaseException:
                for member in members:
                    member.withdraw()
                raise

    def _joined(self, members: Sequence[Member]) -> tuple[Tensor, Tensor, Standing]:
        """Return the rows of some members, and what these stand on."""
        losses = self._losses
        weights = losses.weights.join([m.weights for m in members])
        hypers = losses.hypers.join([m.hypers for m in members])
        return weights, hypers, self._grounds.of([m.ground for m in members])

    def _solve(
        self,
        members: Sequence[Member],
        weights: Tensor,
        hypers: Tensor,
        standing: Standing,
        started: float,
    ) -> None:
        """Take the hypergradients, and hand them over."""
        columns, losses = self._losses.hypers, self._losses.at(standing)
        split_names = (members[0].walks.curvature, "val")
        batches = [
            standing.course(split, [[m.walks.places(split)] for m in members]).at(0, len(members))
            for split in split_names
        ]
        found = self._hypergradients(members, losses, weights, hypers, *batches)
        numbers = {"train_loss": found.train, "val_loss": found.val}
        numbers["length"] = norms(found.grads)
        numbers["finite"] = torch.isfinite(found.grads).all(dim=1)
        numbers |= self._agreements(members, found.grads)
        measured = self._batch_metrics(losses, weights, hypers, *batches)
        read = _read({**numbers, **measured})
        samples = [batch.of(0) for batch in batches]
        solution = found.solution
        rows = columns.rows(found.grads)
        seconds = (time.perf_counter() - started) / len(members)
        kept: list[tuple[Tensor, Sequence[Tensor]]] = []
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
                if (pair := solution.handed_on[i]) is not None:
                    left = WarmStart(eigenpair=member.handed_on(pair))
                result = Hypergradient(
                    grads=rows[i],
                    status=outcome.status,
                    stats=replace(outcome.stats, seconds=seconds),
                    train_loss=number(own["train_loss"]),
                    val_loss=number(own["val_loss"]),
                    warm=left,
                )
            alone = result is None or not member.proven
            for name, batch, sample in zip(split_names, batches, samples, strict=True):
                member.walks.ready.setdefault(name, []).append(batch.of(i) if alone else sample)
            if member.proven:
                ahead.result, ahead.length = result, number(own["length"])
                agreement = own.get("agreement", math.nan)
                if result is not None and math.isfinite(agreement):
                    ahead.agreement = agreement
            elif result is not None and result.usable and found.image is not None:
                proofs = (found.vector, solution.solution, found.image)
                claims = [losses.weights.row(each[i]) for each in proofs]
                ahead.doubted, member.proven = Claim(result, *claims), True
            # Whoever solves by itself begins with the vector that it has.
            used = ahead.result is not None or ahead.doubted is not None
            if used and (pair := solution.handed_on[i]) is not None and pair.vector:
                kept.append((member.kept_vector, pair.vector))

        write_back([[own] for own, _ in kept], [vector for _, vector in kept])

    def _hypergradients(
        self,
        members: Sequence[Member],
        losses: PackedLosses,
        weights: Tensor,
        hypers: Tensor,
        train_batch: Gathered,
        val_batch: Gathered,
    ) -> _Found:
        """Linearise both losses, solve and contract, as `hypergradient` does for one."""
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
            image = None
            if not all(m.proven for m in members):
                image = product(solution.solution)
            (mixed,) = vjp([slope] if slope.requires_grad else [], [h], [solution.solution])
            if penalty is not None:
                closed = penalty.mixed(
                    losses.weights.views(weights), losses.weights.views(solution.solution)
                )
                parts = losses.hypers.views(mixed)
                for place, part in zip(losses.penalised(), closed, strict=True):
                    parts[place] = parts[place] + part
                mixed = _joined(parts)
        grads = direct - mixed
        return _Found(train.detach(), val.detach(), grads, solution, vector, image)

    def _agreements(self, members: Sequence[Member], grads: Tensor) -> dict[str, Tensor]:
        """Return the cosines with the outer optimisers' means; nothing where one keeps none."""
        means = [m.outer.mean() for m in members]
        if any(mean is None for mean in means):
            return {}
        mean = self._losses.hypers.join([m for m in means if m is not None])
        lengths = norms(mean) * norms(grads)
        return {"agreement": (mean * grads).sum(dim=1) / lengths}

    def _batch_metrics(
        self,
        losses: PackedLosses,
        weights: Tensor,
        hypers: Tensor,
        train_batch: Gathered,
        val_batch: Gathered,
    ) -> dict[str, Tensor]:
        """Return what is measured on the batches of the outer step, but for the losses."""
        if not self._measures or not measures_batches(self._problem):
            return {}
        found: dict[str, Tensor] = {}
        for split, batch in (("train", train_batch), ("val", val_batch)):
            numbers = losses.measure(weights, hypers, batch)
            found |= {f"{split}_{k}": v for k, v in numbers.items() if k != "loss"}
        return found

    def measure(self, members: Sequence[Member], splits: Sequence[str]) -> None:
        """Compute what each member is about to measure of splits."""
        if not members:
            return
        with exclusive(), ordinary_autograd("a packed evaluation", self._device):
            weights, hypers, standing = self._joined(members)
            losses = self._losses.at(standing)
            start = torch.stack([m.start for m in members])
            columns = {"change": norms(hypers - start)}
            examples = {}
            for split in splits if self._measures else ():
                found, examples[split] = losses.evaluate(weights, hypers, split)
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


_DIFFERS = (
    "a pack's trials must have one problem: leave --pack off where the factory reads the searched "
    "settings"
)


def _by_inverse(members: Sequence[Member]) -> list[list[Member]]:
    """Return those that take an outer step, in groups whose solves are of the same operations."""
    groups: dict[str, list[Member]] = {}
    for member in members:
        if member.learns:
            groups.setdefault(member.config.inverse.name, []).append(member)
    return list(groups.values())


def _read(columns: dict[str, Tensor]) -> dict[str, list[float]]:
    """Return columns as numbers, asking the device once."""
    if not columns:
        return {}
    rows = torch.stack([column.double() for column in columns.values()]).cpu().tolist()
    return dict(zip(columns, rows, strict=True))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Return stacks as one matrix."""
    return torch.cat([part.reshape(len(part), -1) for part in parts], dim=1)
