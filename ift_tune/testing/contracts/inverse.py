"""What holds for every inverse-Hessian approximation, against dense linear algebra in float64."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import FrozenInstanceError, fields

import torch

from ift_tune.base.status import SolveStatus
from ift_tune.implicit.curvature import Eigenpair
from ift_tune.implicit.inverse import INVERSES, Inverse
from ift_tune.implicit.vectors import flatten, mul, randn_like, unflatten
from ift_tune.joint.config import MetaConfig
from ift_tune.joint.flat import build_choice, names
from ift_tune.testing.contracts.laws import (
    FINITE,
    SIZE,
    Laws,
    Solved,
    check_laws,
    draw_vector,
    make_operator,
    near,
    require,
    solve,
)

_ROUNDING = 1e-9  # relative: what float64 leaves of a well-conditioned system of 11 equations
_UNSOLVED = (SolveStatus.DIVERGED, SolveStatus.NEGATIVE_CURVATURE, SolveStatus.NONFINITE)


def check_inverse(inverse: Inverse) -> None:
    """Check that an inverse keeps the laws of its family.

    It solves systems of 11 equations over three tensors, with eigenvalues up to 1: definite (of
    condition 10 and 1,000), indefinite, singular, zero, and not finite.

    Args:
        inverse: Any instance; it need not be in `INVERSES`. Try several settings, as its own
            `examples()`.

    Raises:
        CheckFailedError: If a law is broken; all that are broken are named.

    Example:
        >>> from ift_tune import Neumann
        >>> from ift_tune.testing.contracts import check_inverse
        >>> check_inverse(Neumann(terms=3))
    """
    check_laws(repr(inverse), _LAWS, lambda: inverse)


# The choice


def _is_described(inverse: Inverse) -> None:
    require(isinstance(inverse.name, str) and inverse.name != "", "name must be a word")
    require("\n" not in inverse.summary, "summary must be one line")
    own = names(type(inverse))
    for name in (inverse.steps_field, *inverse.full_length, *sum(inverse.alternatives, ())):
        require(name is None or name in own, f"{name!r} is none of its fields")
    require(
        inverse.steps_field is None or type(getattr(inverse, inverse.steps_field)) is int,
        "steps_field must name a field that is a whole number",
    )


def _is_frozen(inverse: Inverse) -> None:
    own = "__dataclass_fields__" in vars(type(inverse))  # an inherited one does not see its fields
    require(own, "its class must be a dataclass: use @dataclass(frozen=True)")
    for item in fields(inverse):
        try:
            setattr(inverse, item.name, getattr(inverse, item.name))
        except FrozenInstanceError:
            continue
        require(False, f"{item.name} can be changed")


def _travels(inverse: Inverse) -> None:
    copy = pickle.loads(pickle.dumps(inverse))
    require(copy == inverse, f"pickled and read again it is {copy!r}")
    require(hash(copy) == hash(inverse), "equal instances have different hashes")


def _becomes_flat(inverse: Inverse) -> None:
    config = MetaConfig(inverse=inverse)
    flat = json.loads(json.dumps(config.to_flat()))
    found = build_choice(type(inverse), flat)
    require(found == inverse, f"written as {flat} and read again it is {found!r}")
    if INVERSES.get(inverse.name) is type(inverse):
        require(MetaConfig.from_flat(flat) == config, f"from_flat does not read {flat}")


# What a solve takes and gives


def _keeps_shapes(inverse: Inverse) -> None:
    for dtype in (torch.float64, torch.float32):
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            solved = solve(inverse, "definite", dtype=dtype, device=device)
            for q, v in zip(solved.result.value, solved.vector, strict=True):
                found, wanted = ((t.shape, t.dtype, t.device) for t in (q, v))
                require(found == wanted, f"for {wanted} it answers {found}")


def _leaves_alone(inverse: Inverse) -> None:
    operator = make_operator("definite")
    vector, guess = draw_vector(operator), draw_vector(operator, 1)
    tensors = [*vector, *guess, *operator.like, operator.matrix]
    before = [(t.clone(), t._version) for t in tensors]
    random = torch.get_rng_state()
    state = inverse.init(operator)
    inverse.solve(state, vector)
    inverse.solve(state, vector, guess)
    for tensor, (old, version) in zip(tensors, before, strict=True):
        same = torch.equal(tensor, old) and tensor._version == version
        require(same, "the vector, the guess or the operator was changed")
    require(torch.equal(torch.get_rng_state(), random), "PyTorch's random numbers were drawn")


def _repeats(inverse: Inverse) -> None:
    operator = make_operator("definite")
    state = inverse.init(operator)
    first, second = draw_vector(operator), draw_vector(operator, 1)
    once = inverse.solve(state, first)
    inverse.solve(state, second)
    again = inverse.solve(state, first)
    anew = solve(inverse, "definite").result
    for other in (again, anew):
        same = all(torch.equal(a, b) for a, b in zip(once.value, other.value, strict=True))
        require(same and once.status is other.status, "the same solve twice gives two answers")


def _scales(inverse: Inverse) -> None:
    once = solve(inverse, "definite")
    for scale in (-1000.0, 1e-3, 7.0):
        scaled = solve(inverse, "definite", scale=scale)
        require(near(scaled.q, scale * once.q), f"solve({scale}·v) is not {scale}·solve(v)")
        require(scaled.result.status is once.result.status, f"the status depends on {scale}·v")


def _is_linear(inverse: Inverse) -> None:
    if not inverse.linear:
        return
    for system in ("definite", "ill-conditioned"):
        operator = make_operator(system)
        state = inverse.init(operator)
        a, b = draw_vector(operator, 1), draw_vector(operator, 2)
        both = [x - 3.0 * y for x, y in zip(a, b, strict=True)]
        qa, qb, q = (flatten(inverse.solve(state, v).value) for v in (a, b, both))
        require(near(q, qa - 3.0 * qb), f"{system}: solve(a − 3b) is not solve(a) − 3·solve(b)")
        one, other = float(flatten(a) @ qb), float(flatten(b) @ qa)
        size = float(flatten(a).norm() * qb.norm())
        require(abs(one - other) <= _ROUNDING * size, f"{system}: aᵀsolve(b) is not bᵀsolve(a)")


def _gives_zero_for_zero(inverse: Inverse) -> None:
    solved = solve(inverse, "definite", scale=0.0)
    require(not bool(solved.q.any()), "q is not 0 for v = 0")
    good = (SolveStatus.CONVERGED, SolveStatus.TRUNCATED)
    require(solved.result.status in good, f"the status is {solved.result.status.value} for v = 0")
    residual = solved.result.stats.relative_residual
    require(residual in (None, 0.0), f"relative_residual is {residual} for v = 0")
    _require_in_spectrum(solved, "v = 0")


def _leads_downhill(inverse: Inverse) -> None:
    for system in ("definite", "ill-conditioned"):
        solved = solve(inverse, system)
        along = float(flatten(solved.vector) @ solved.q)
        lost = solved.result.status in _UNSOLVED
        require(lost or along > 0.0, f"{system}: vᵀ·solve(v) is {along:.3g}")


# What it says of itself


def _counts_products(inverse: Inverse) -> None:
    for system in (*FINITE, "nan"):
        for previous in (False, True):
            for guess in (False, True):
                _count(inverse, system, previous=previous, guess=guess)


def _count(inverse: Inverse, system: str, *, previous: bool, guess: bool) -> None:
    operator = make_operator(system)
    pair = Eigenpair(1.0, randn_like(operator.like, 5)) if previous else None
    state = inverse.init(operator, pair)
    result = inverse.solve(
        state, draw_vector(operator), mul(draw_vector(operator, 1), 1e-3) if guess else None
    )
    case = f"{system}{', with an eigenpair' * previous}{', with a guess' * guess}"
    spent = operator.products
    require(
        result.stats.hvps == spent,
        f"{case}: {spent} products, of which hvps says {result.stats.hvps}",
    )
    most = inverse.max_hvps(SIZE, previous) + (guess and inverse.refines)
    most += inverse.measured != "never"
    require(spent <= most, f"{case}: {spent} products, at most {most} by max_hvps")
    inverse.solve(state, draw_vector(operator, 2))
    further, most = operator.products - spent, inverse.max_further_hvps(SIZE)
    most += inverse.measured != "never"
    require(further <= most, f"{case}: {further} further, at most {most} by max_further_hvps")


def _is_true_about_residuals(inverse: Inverse) -> None:
    # Where H is indefinite a bound on the residual may break unseen; the status is judged there.
    for system in ("definite", "ill-conditioned", "singular", "zero"):
        solved = solve(inverse, system)
        stats, length = solved.result.stats, solved.state.norm(solved.vector)
        if stats.residual_norm is None or solved.result.status in _UNSOLVED:
            continue
        said = math.nan if stats.relative_residual is None else stats.relative_residual
        require(
            math.isclose(said * length, stats.residual_norm, rel_tol=_ROUNDING),
            f"{system}: relative_residual is {said}, residual_norm {stats.residual_norm:.3g} and "
            f"‖v‖ {length:.3g}",
        )
        true = solved.residual()
        require(
            true <= stats.residual_norm * (1.0 + _ROUNDING) + _ROUNDING * length,
            f"{system}: residual_norm is {stats.residual_norm:.3g}, the true one {true:.3g}",
        )


def _is_true_about_eigenvalues(inverse: Inverse) -> None:
    for system in ("definite", "ill-conditioned", "indefinite", "singular"):
        _require_in_spectrum(solve(inverse, system), system)


def _require_in_spectrum(solved: Solved, case: str) -> None:
    said, spectrum = solved.result.stats.largest_eigenvalue, solved.spectrum()
    least, largest = float(spectrum[0]), float(spectrum[-1])
    slack = 1e-6 * largest
    require(
        said is None or least - slack <= said <= largest + slack,
        f"{case}: largest_eigenvalue is {said}, the spectrum [{least:.6g}, {largest:.6g}]",
    )


def _is_true_about_statuses(inverse: Inverse) -> None:
    for system in FINITE:
        solved = solve(inverse, system)
        require(bool(torch.isfinite(solved.q).all()), f"{system}: the answer is not finite")
        _judge(inverse, system, solved)


def _judge(inverse: Inverse, system: str, solved: Solved) -> None:
    status = solved.result.status
    relative = solved.residual() / solved.state.norm(solved.vector)
    asked = float(getattr(inverse, "tolerance", 1e-3))
    # Damping mends the matrix that is inverted, not the Hessian that the status speaks of.
    own = torch.linalg.eigvalsh(solved.operator.matrix)
    inverted = torch.linalg.eigvalsh(solved.dense())
    rounding = _ROUNDING * max(float(own.abs().max()), 1e-300)
    holds = {
        SolveStatus.CONVERGED: relative <= asked * (1.0 + 1e-6) + _ROUNDING,
        SolveStatus.TRUNCATED: True,  # it claims nothing
        SolveStatus.NEGATIVE_CURVATURE: float(own[0]) <= rounding,
        SolveStatus.SINGULAR: float(inverted.abs().min()) <= rounding,
        SolveStatus.DIVERGED: relative > 1.0,
        SolveStatus.NONFINITE: False,
    }
    require(
        holds[status],
        f"{system}: the status is {status.value}, with a relative residual of {relative:.3g} and "
        f"eigenvalues from {float(own[0]):.3g} to {float(own[-1]):.3g}",
    )


def _notices_what_is_not_finite(inverse: Inverse) -> None:
    for system in ("nan", "infinite"):
        solved = solve(inverse, system)
        require(
            solved.operator.products == 0 or solved.result.status is SolveStatus.NONFINITE,
            f"products are {system}, and the status is {solved.result.status.value}",
        )
    for scale in (float("nan"), float("inf")):
        status = solve(inverse, "definite", scale=scale).result.status
        require(status is SolveStatus.NONFINITE, f"v is {scale}, and the status {status.value}")


def _refines(inverse: Inverse) -> None:
    cold = solve(inverse, "definite")
    if not inverse.refines:
        warm = solve(inverse, "definite", guess=draw_vector(cold.operator, 1))
        require(torch.equal(warm.q, cold.q), "it does not refine, and a guess changes its answer")
        return
    bad = solve(inverse, "definite", guess=mul(draw_vector(cold.operator, 1), 1e6))
    require(torch.equal(bad.q, cold.q), "a guess that is worse than none is not left out")
    if cold.result.status in _UNSOLVED:
        return
    matrix = cold.dense()
    exact = torch.linalg.solve(matrix, flatten(cold.vector))
    warm = solve(inverse, "definite", guess=cold.result.value)
    before, after = (float((q - exact) @ matrix @ (q - exact)) ** 0.5 for q in (cold.q, warm.q))
    size = float(exact @ matrix @ exact) ** 0.5
    require(
        after <= before * (1.0 + _ROUNDING) + _ROUNDING * size,
        f"it refines, and a guess with an error of {before / size:.3g} is made one of "
        f"{after / size:.3g} (relative, in the norm √(eᵀHe)): set refines = False",
    )
    still = solve(inverse, "definite", guess=unflatten(exact, cold.operator.like))
    require(near(still.q, exact), "the exact answer, given as a guess, is not kept")


def _works_in_single_precision(inverse: Inverse) -> None:
    double, single = (
        solve(inverse, "definite", dtype=dtype) for dtype in (torch.float64, torch.float32)
    )
    if SolveStatus.DIVERGED in (double.result.status, single.result.status):
        return
    exact = torch.linalg.solve(double.dense(), flatten(double.vector))
    found, wanted = (
        float((q.double() - exact).norm() / exact.norm()) for q in (single.q, double.q)
    )
    # Not the same answer: random starts of a power iteration, or sketches, differ between the two.
    require(
        found <= 1.5 * wanted + 0.01,
        f"the relative error is {found:.3g} in float32 and {wanted:.3g} in float64",
    )


_LAWS: Laws[Inverse] = {
    "described: its attributes are words and names of its fields": _is_described,
    "frozen: no field can be changed": _is_frozen,
    "travels: it survives pickling and can be hashed": _travels,
    "flat: it survives being written as plain values": _becomes_flat,
    "shapes: the answer has the vector's shapes, dtype and device": _keeps_shapes,
    "arguments: nothing it is given changes, nor do PyTorch's random numbers": _leaves_alone,
    "repeatable: one state serves many vectors, and the same solve gives the same": _repeats,
    "scale: solve(c·v) = c·solve(v)": _scales,
    "linear: solve is linear and symmetric, unless `linear` is False": _is_linear,
    "zero: v = 0 gives 0": _gives_zero_for_zero,
    "direction: vᵀ·solve(v) > 0 where H is positive definite": _leads_downhill,
    "products: `hvps` is what was spent, and no more than `max_hvps`": _counts_products,
    "residual: what is reported is no less than the true one": _is_true_about_residuals,
    "eigenvalue: what is reported is no more than λ_max": _is_true_about_eigenvalues,
    "status: it is true by the dense matrix": _is_true_about_statuses,
    "nonfinite: what is not finite is reported": _notices_what_is_not_finite,
    "refines: a guess is improved if `refines`, else left out": _refines,
    "precision: float32 does as well as float64, to its precision": _works_in_single_precision,
}
