"""Linear solves of several members at once: the same arithmetic on rows, masks for branches.

What an inverse does by branching on a number is done here by masks on rows, so that the device is
asked once in a solve and not once a member and product. How a solve came out is judged by the
inverse itself. A member whose numbers leave the ordinary (a right-hand side of 0, of enormous
length, not finite; a curvature that vanishes) is handed back: it solves by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from ift_tune.base.status import SolveStatus
from ift_tune.implicit.curvature import Eigenpair
from ift_tune.implicit.inverse import ConjugateGradient, Identity, Inverse, Neumann, SolveStats
from ift_tune.implicit.inverse.base import InverseResult, relative
from ift_tune.implicit.inverse.neumann import GROWTH_LIMIT, power_steps, tame_moments
from ift_tune.implicit.preconditioner import NoPreconditioner

_SMALL, _LARGE = 1e-12, 1e12  # as `Inverse.solve` has them
_BETTER = 0.99  # as conjugate gradient has it

Product: TypeAlias = Callable[[Tensor], Tensor]
"""H·v for each row."""


@dataclass(frozen=True)
class PackedSolution:
    """What the solves came to.

    Attributes:
        solution: q, a row for each member.
        results: Status and statistics of each member, `value` left empty; None for one that must
            solve by itself.
        handed_on: What the next solve of each member is given, see `Inverse.handed_on`; a vector
            is one row.
    """

    solution: Tensor
    results: list[InverseResult | None]
    handed_on: Sequence[Eigenpair | None]


def packs(inverse: Inverse) -> bool:
    """Return whether there is a solve for several members with this inverse."""
    plain = isinstance(getattr(inverse, "preconditioner", NoPreconditioner()), NoPreconditioner)
    return plain and type(inverse) in _SOLVES


def solve_rows(
    inverses: Sequence[Inverse],
    product: Product,
    vector: Tensor,
    starts: Sequence[Eigenpair | None],
    cold: Tensor,
) -> PackedSolution:
    """Solve H·q = v for each row.

    Args:
        inverses: Of the members, all of one kind.
        product: H·v.
        vector: v.
        starts: What earlier solves have handed on, vectors as one row; None where there is none.
        cold: The vector that a power iteration starts from without one.
    """
    return _SOLVES[type(inverses[0])](inverses, product, vector, starts, cold)


_Solve: TypeAlias = Callable[
    [Sequence[Inverse], Product, Tensor, Sequence[Eigenpair | None], Tensor], PackedSolution
]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = torch.bmm(a.unsqueeze(1), b.unsqueeze(2))  # where vecdot is two operations
    return product.view(-1)


def _norm(a: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(a, dim=1)
    return length


def _ordinary(length: float) -> bool:
    return _SMALL < length < _LARGE


def _identity(
    inverses: Sequence[Inverse],
    product: Product,
    vector: Tensor,
    starts: Sequence[Eigenpair | None],
    cold: Tensor,
) -> PackedSolution:
    """Return the right-hand side itself."""
    lengths = _norm(vector).cpu().tolist()
    results = [
        InverseResult([], SolveStatus.TRUNCATED) if math.isfinite(length) else None
        for length in lengths
    ]
    return PackedSolution(vector, [*results], [None] * len(results))


def _neumann(
    inverses: Sequence[Inverse],
    product: Product,
    vector: Tensor,
    starts: Sequence[Eigenpair | None],
    cold: Tensor,
) -> PackedSolution:
    """Sum the series of each row, as `Neumann` does."""
    series = [inverse for inverse in inverses if isinstance(inverse, Neumann)]
    eps = torch.finfo(vector.dtype).eps
    automatic = [not isinstance(s.alpha, float | int) for s in series]
    # An estimate without a vector is of Ritz values, and taken as it is.
    powers = [
        power_steps(start is not None) if auto and (start is None or start.vector) else 0
        for auto, start in zip(automatic, starts, strict=True)
    ]
    eigenvalues = _numbers([0.0 if start is None else start.value for start in starts], vector)
    eigenvectors = None
    if any(powers):
        rows = [start.vector[0] if start and start.vector else cold for start in starts]
        found, eigenvectors = _power_iteration(product, torch.stack(rows), powers, eps)
        eigenvalues = torch.where(_mask([n > 0 for n in powers], vector), found, eigenvalues)
    scales = _numbers([1.0 if s.alpha_scale is None else s.alpha_scale for s in series], vector)
    given = _numbers([float(s.alpha or 0.0) for s in series], vector)
    alpha = torch.where(_mask(automatic, vector), scales / eigenvalues.abs(), given)
    terms = [s.terms for s in series]
    step = alpha.to(vector.dtype).unsqueeze(1)
    term, total = vector, vector.clone()
    moments = [_dot(term, term)]
    bound = GROWTH_LIMIT**2 * moments[0].double()
    within = torch.ones(len(series), dtype=torch.bool, device=vector.device)
    wanted = _masks(terms, vector)
    for j in range(max(terms)):
        following = torch.addcmul(term, step, product(term), value=-1.0)
        moments += [_dot(term, following), _dot(following, following)]
        within = within & (moments[-1] <= bound)
        going = within & wanted[j]
        total = torch.where(going.unsqueeze(1), total + following, total)
        term = following
    solution = total * step
    numbers = torch.cat([torch.stack(moments), torch.stack([alpha, eigenvalues])])
    read = numbers.T.cpu().tolist()
    results: list[InverseResult | None] = []
    handed_on: list[Eigenpair | None] = []
    for i, inverse in enumerate(series):
        *row, size, value = read[i]
        length = math.sqrt(max(row[0], 0.0))
        row = row[: 1 + 2 * terms[i]]
        if not _ordinary(length) or (automatic[i] and not 0.0 < abs(value) < math.inf):
            results.append(None)
            handed_on.append(None)
            continue
        estimate = value if powers[i] else None
        status, stats = inverse.judge_series(row, size, estimate, length, eps)
        # On a device the passes after the last tame one are made all the same.
        taken = tame_moments(row) // 2 if vector.is_cpu else terms[i]
        results.append(InverseResult([], status, replace(stats, hvps=powers[i] + taken)))
        own = [eigenvectors[i]] if powers[i] and eigenvectors is not None else []
        handed_on.append(inverse.next_estimate(own, powers[i], stats) if automatic[i] else None)
    lengths = [math.sqrt(max(row[0], 0.0)) for row in read]
    results = _verified(series, product, vector, solution, results, lengths, ())
    return PackedSolution(solution, results, handed_on)


def _power_iteration(
    product: Product, dual: Tensor, steps: Sequence[int], eps: float
) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalue of each row, with its sign, and the next unit vector."""
    dual = dual / _norm(dual).unsqueeze(1)
    value = torch.zeros(len(dual), dtype=torch.float64, device=dual.device)
    wanted = _masks(steps, dual)
    for step in range(max(steps)):
        image = product(dual)
        quotient, length = _dot(dual, image).double(), _norm(image).double()
        signed = torch.where(quotient < -10.0 * eps * length, -length, length)
        going = wanted[step]
        value = torch.where(going, signed, value)
        scaled = image / length.to(image.dtype).unsqueeze(1)
        dual = torch.where(going.unsqueeze(1), scaled, dual)
    return value, dual


def _conjugate_gradient(
    inverses: Sequence[Inverse],
    product: Product,
    vector: Tensor,
    starts: Sequence[Eigenpair | None],
    cold: Tensor,
) -> PackedSolution:
    """Iterate on each row until it is at its end, as `ConjugateGradient` does."""
    solvers = [inverse for inverse in inverses if isinstance(inverse, ConjugateGradient)]
    eps = torch.finfo(vector.dtype).eps
    damping = _column([s.damping for s in solvers], vector).unsqueeze(1)
    damped = any(s.damping for s in solvers)

    def matvec(v: Tensor) -> Tensor:
        return product(v) + damping * v if damped else product(v)

    solution, residual, direction = torch.zeros_like(vector), vector, vector
    squared = _dot(vector, vector).cpu().tolist()
    lengths = [math.sqrt(max(s, 0.0)) for s in squared]
    goals = [(s.tolerance * length) ** 2 for s, length in zip(solvers, lengths, strict=True)]
    statuses: list[SolveStatus | None] = [
        (SolveStatus.CONVERGED if s <= goal else SolveStatus.TRUNCATED)
        if _ordinary(length)
        else None
        for s, goal, length in zip(squared, goals, lengths, strict=True)
    ]
    largest, taken, finite = [0.0] * len(solvers), [0] * len(solvers), list(squared)
    best, least = solution, list(squared)
    going = [status is SolveStatus.TRUNCATED for status in statuses]
    while any(going):
        image = matvec(direction)
        read = [_dot(direction, image), _dot(direction, direction), _norm(direction) * _norm(image)]
        curvatures, across, sizes = torch.stack(read).cpu().tolist()
        restored = [False] * len(solvers)
        for i in range(len(solvers)):
            if not going[i]:
                continue
            taken[i] += 1
            if not math.isfinite(curvatures[i]):
                going[i], statuses[i] = False, None
                continue
            largest[i] = max(largest[i], curvatures[i] / across[i])
            nothing = eps * max(sizes[i], largest[i] * across[i])
            if curvatures[i] <= nothing:
                going[i] = False
                negative = curvatures[i] < -nothing
                statuses[i] = SolveStatus.NEGATIVE_CURVATURE if negative else SolveStatus.SINGULAR
                if not negative:
                    restored[i], finite[i] = True, least[i]
        if any(restored):
            solution = torch.where(_mask(restored, vector).unsqueeze(1), best, solution)
        if not any(going):
            break
        moving = _mask(going, vector).unsqueeze(1)
        steps = [s / c if g else 0.0 for s, c, g in zip(finite, curvatures, going, strict=True)]
        size = _column(steps, vector).unsqueeze(1)
        solution = torch.where(moving, solution + size * direction, solution)
        residual = torch.where(moving, residual - size * image, residual)
        before, now = list(finite), _dot(residual, residual).cpu().tolist()
        improved = [False] * len(solvers)
        for i in range(len(solvers)):
            if not going[i]:
                continue
            finite[i] = now[i]
            if now[i] < _BETTER * least[i]:
                improved[i], least[i] = True, now[i]
            if now[i] <= goals[i]:
                going[i], statuses[i] = False, SolveStatus.CONVERGED
            elif taken[i] >= solvers[i].max_steps:
                going[i] = False
        best = torch.where(_mask(improved, vector).unsqueeze(1), solution, best)
        ratios = [n / b if g else 0.0 for n, b, g in zip(finite, before, going, strict=True)]
        direction = residual + _column(ratios, vector).unsqueeze(1) * direction
    results: list[InverseResult | None] = []
    for i, status in enumerate(statuses):
        if status is None:
            results.append(None)
            continue
        norm = math.sqrt(max(finite[i], 0.0))
        results.append(
            InverseResult(
                [],
                status,
                SolveStats(
                    hvps=taken[i],
                    residual_norm=norm,
                    relative_residual=relative(norm, lengths[i]),
                    largest_eigenvalue=largest[i] or None,
                ),
            )
        )
    results = _verified(solvers, matvec, vector, solution, results, lengths, taken)
    return PackedSolution(solution, results, [None] * len(results))


def _verified(
    inverses: Sequence[Inverse],
    matvec: Product,
    vector: Tensor,
    solution: Tensor,
    results: list[InverseResult | None],
    lengths: Sequence[float],
    taken: Sequence[int],
) -> list[InverseResult | None]:
    """Return the results with their true residuals, where an inverse has them measured."""
    wanted = [
        result is not None
        and (
            (inverse.measured == "always" and bool(taken) and taken[i] > 0)
            or (inverse.measured == "claimed" and result.status is SolveStatus.CONVERGED)
        )
        for i, (inverse, result) in enumerate(zip(inverses, results, strict=True))
    ]
    if not any(wanted):
        return results
    residuals, sizes = (
        torch.stack([_norm(vector - matvec(solution)), _norm(solution)]).cpu().tolist()
    )
    found = list(results)
    for i, result in enumerate(results):
        if result is None or not wanted[i]:
            continue
        if sizes[i] == 0.0:  # no product is taken of nothing
            found[i] = inverses[i].verified(result, lengths[i], lengths[i])
            continue
        verified = inverses[i].verified(result, residuals[i], lengths[i])
        found[i] = replace(verified, stats=replace(verified.stats, hvps=verified.stats.hvps + 1))
    return found


def _numbers(values: Sequence[float], like: Tensor) -> Tensor:
    """Return numbers on the device, in double precision."""
    return torch.tensor(values, dtype=torch.float64).to(like.device)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """Return numbers on the device, in its type."""
    return torch.tensor(values, dtype=torch.float64).to(like)


def _mask(values: Sequence[bool], like: Tensor) -> Tensor:
    return torch.tensor(values).to(like.device)


def _masks(counts: Sequence[int], like: Tensor) -> Tensor:
    """Return for each round which rows are still at it, (rounds, P), in one copy to the device."""
    rounds = torch.arange(max(counts)).unsqueeze(1)
    return (rounds < torch.tensor(list(counts))).to(like.device)


_SOLVES: dict[type[Inverse], _Solve] = {
    Identity: _identity,
    Neumann: _neumann,
    ConjugateGradient: _conjugate_gradient,
}

PACKED_INVERSES = tuple(kind.name for kind in _SOLVES)
"""Their names."""
