"""`check_inverse` names the law that an inverse breaks; it takes inverses of one's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from ift_tune.base.errors import CheckFailedError
from ift_tune.base.status import SolveStatus
from ift_tune.implicit.curvature import Eigenpair, Operator
from ift_tune.implicit.inverse import INVERSES, Inverse, InverseResult, SolveStats, State
from ift_tune.implicit.vectors import Tensors, add, axpy, flatten, mul, norm, randn_like, unflatten
from ift_tune.testing.contracts import check_inverse
from ift_tune.testing.contracts.laws import draw_vector, make_operator


@dataclass(frozen=True)
class Step(Inverse[State]):
    """q = αv: right, and the root of all that is wrong below."""

    name: ClassVar[str] = "step"
    summary: ClassVar[str] = "a step of gradient descent"
    steps_field: ClassVar[str | None] = "passes"

    passes: int = 1
    alpha: float = 0.5

    def max_hvps(self, weights: int, previous: bool) -> int:
        return 0

    def _init(self, operator: Operator, previous: Eigenpair | None) -> State:
        return State(operator)

    def _solve(self, state: State, vector: Tensors, length: float) -> InverseResult:
        return InverseResult(mul(vector, self.alpha), SolveStatus.TRUNCATED)


def test_an_inverse_of_ones_own_passes() -> None:
    assert Step.name not in INVERSES
    for inverse in Step.examples():
        check_inverse(inverse)


class Silent(Step):
    """Not a dataclass of its own."""

    step: float = 0.1


@dataclass(frozen=True)
class NoSuchField(Step):
    steps_field: ClassVar[str | None] = "terms"


@dataclass(frozen=True)
class NotHashable(Step):
    powers: list[int] = field(default_factory=lambda: [1, 2])


@dataclass(frozen=True)
class Taken(Step):
    inner_steps: int = 3  # a field of MetaConfig


@dataclass(frozen=True)
class Forgetful(Step):
    settings: tuple[float, ...] = (1.0,)  # in JSON a list


@dataclass(frozen=True)
class Flattening(Step):
    def _solve(self, state: State, vector: Tensors, length: float) -> InverseResult:
        return InverseResult([v.reshape(-1) for v in vector], SolveStatus.TRUNCATED)


@dataclass(frozen=True)
class Doubling(Step):
    def _solve(self, state: State, vector: Tensors, length: float) -> InverseResult:
        return InverseResult([v.double() for v in vector], SolveStatus.TRUNCATED)


@dataclass(frozen=True)
class InPlace(Step):
    def _solve(self, state: State, vector: Tensors, length: float) -> InverseResult:
        value = mul(vector, self.alpha)
        torch._foreach_zero_(list(vector))
        return InverseResult(value, SolveStatus.TRUNCATED)


@dataclass(frozen=True)
class Drawing(Step):
    def _init(self, operator: Operator, previous: Eigenpair | None) -> State:
        torch.rand(1)
        return State(operator)


@dataclass(frozen=True)
class Counting(State):
    calls: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Consuming(Inverse[Counting]):
    """Its state is used up by the first vector."""

    name: ClassVar[str] = "consuming"

    def max_hvps(self, weights: int, previous: bool) -> int:
        return 0

    def _init(self, operator: Operator, previous: Eigenpair | None) -> Counting:
        return Counting(operator)

    def _solve(self, state: Counting, vector: Tensors, length: float) -> InverseResult:
        state.calls.append(1)
        return InverseResult(mul(vector, 1.0 / len(state.calls)), SolveStatus.TRUNCATED)


@dataclass(frozen=True)
class Rounding(Step):
    def _solve(self, state: State, vector: Tensors, length: float) -> InverseResult:
        return InverseResult([v.round(decimals=2) for v in vector], SolveStatus.TRUNCATED)


@dataclass(frozen=True)
class Normalising(Step):
    """Scales with v, and is not linear."""

    def _solve(self, state: State, vector: Tensors, length: float) -> InverseResult:
        largest = max(float(v.abs().max()) for v in vector)
        return InverseResult(mul(vector, largest / (length or 1.0)), SolveStatus.TRUNCATED)


@dataclass(frozen=True)
class OneSided(Step):
    """Linear, and not symmetric."""

    def _solve(self, state: State, vector: Tensors, length: float) -> InverseResult:
        flat = flatten(vector)
        shifted = flat + 0.5 * flat.roll(1)
        return InverseResult(unflatten(shifted, vector), SolveStatus.TRUNCATED)


@dataclass(frozen=True)
class Restless(Step):
    linear: ClassVar[bool] = False

    def _solve(self, state: State, vector: Tensors, length: float) -> InverseResult:
        return InverseResult([v + 1e-9 for v in vector], SolveStatus.TRUNCATED)


@dataclass(frozen=True)
class Uphill(Step):
    refines: ClassVar[bool] = False
    alpha: float = -0.5


@dataclass(frozen=True)
class Spending(Step):
    """Takes two products, of which one is granted: it may measure a residual."""

    def _solve(self, state: State, vector: Tensors, length: float) -> InverseResult:
        twice = add(state.operator.matvec(vector), state.operator.matvec(vector))
        return InverseResult(axpy(mul(vector, 2.0), -0.5, twice), SolveStatus.TRUNCATED)


@dataclass(frozen=True)
class Boasting(Step):
    """Knows its residual better than it is."""

    def _solve(self, state: State, vector: Tensors, length: float) -> InverseResult:
        stats = SolveStats(residual_norm=1e-3 * length, relative_residual=1e-3)
        return InverseResult(mul(vector, self.alpha), SolveStatus.TRUNCATED, stats)


@dataclass(frozen=True)
class Confused(Step):
    """Gives a relative residual that is not relative."""

    def _solve(self, state: State, vector: Tensors, length: float) -> InverseResult:
        size = float(norm(vector))
        stats = SolveStats(residual_norm=size, relative_residual=0.5 * size)
        return InverseResult(mul(vector, self.alpha), SolveStatus.TRUNCATED, stats)


@dataclass(frozen=True)
class Overestimating(Step):
    def _solve(self, state: State, vector: Tensors, length: float) -> InverseResult:
        stats = SolveStats(largest_eigenvalue=1.5)
        return InverseResult(mul(vector, self.alpha), SolveStatus.TRUNCATED, stats)


@dataclass(frozen=True)
class Sure(Step):
    """Says a word of its own about everything."""

    said: str = "converged"

    def _solve(self, state: State, vector: Tensors, length: float) -> InverseResult:
        return InverseResult(mul(vector, self.alpha), SolveStatus(self.said))


@dataclass(frozen=True)
class Blind(Step):
    def max_hvps(self, weights: int, previous: bool) -> int:
        return 1

    def _solve(self, state: State, vector: Tensors, length: float) -> InverseResult:
        product = state.operator.matvec(vector)
        return InverseResult(axpy(mul(vector, 2.0), -1.0, product), SolveStatus.TRUNCATED)


@dataclass(frozen=True)
class Overshooting(Step):
    alpha: float = 2.6


@dataclass(frozen=True)
class Guessing(Step):
    """Keeps no exact answer."""

    def _solve(self, state: State, vector: Tensors, length: float) -> InverseResult:
        noise = randn_like(vector, 0)
        scale = 1e-3 * length / float(norm(noise))
        return InverseResult(axpy(mul(vector, 0.5), scale, noise), SolveStatus.TRUNCATED)


@dataclass(frozen=True)
class Coarse(Step):
    def _solve(self, state: State, vector: Tensors, length: float) -> InverseResult:
        scale = 0.5 if vector[0].dtype == torch.float64 else 30.0
        return InverseResult(mul(vector, scale), SolveStatus.TRUNCATED)


@dataclass(frozen=True)
class Failing(Step):
    def _solve(self, state: State, vector: Tensors, length: float) -> InverseResult:
        raise ZeroDivisionError("of what?")


@pytest.mark.parametrize(
    ("inverse", "law"),
    [
        (NoSuchField(), "described: .*'terms' is none of its fields"),
        (Silent(), "frozen: .*use @dataclass"),
        (NotHashable(), "travels: .*unhashable"),
        (Taken(), "flat: .*MetaConfig both have a field 'inner_steps'"),
        (Forgetful(), "flat: .*read again it is"),
        (Flattening(), "shapes: "),
        (Doubling(), "shapes: .*float64"),
        (InPlace(), "arguments: .*was changed"),
        (Drawing(), "arguments: .*random numbers"),
        (Consuming(), "repeatable: "),
        (Rounding(), "scale: "),
        (Normalising(), "linear: .*solve\\(a − 3b\\)"),
        (OneSided(), "linear: .*aᵀsolve\\(b\\)"),
        (Restless(), "zero: "),
        (Uphill(), "direction: "),
        (Spending(), "products: .*at most 1 by max_hvps"),
        (Boasting(), "residual: .*the true one"),
        (Confused(), "residual: .*relative_residual is"),
        (Overestimating(), "eigenvalue: .*largest_eigenvalue is 1.5"),
        (Sure(said="diverged"), "status: .*definite: the status is diverged"),
        (Sure(said="negative_curvature"), "status: .*definite: .* is negative_curvature"),
        (Sure(said="singular"), "status: .*definite: the status is singular"),
        (Sure(said="nonfinite"), "status: .*definite: the status is nonfinite"),
        (Blind(), "nonfinite: .*products are nan"),
        (Overshooting(), "refines: .*set refines = False"),
        (Guessing(), "refines: .*is not kept"),
        (Coarse(), "precision: "),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Inverse) else "",
)
def test_a_broken_law_is_named(inverse: Inverse, law: str) -> None:
    with pytest.raises(CheckFailedError, match=f"(?s){type(inverse).__name__}.*  - {law}"):
        check_inverse(inverse)


def test_all_broken_laws_are_listed_and_no_other() -> None:
    with pytest.raises(CheckFailedError) as caught:
        check_inverse(Overshooting())
    laws = [line.split(":")[0] for line in str(caught.value).splitlines()[1:]]
    assert laws == ["  - refines"]


def test_an_inverse_that_raises_is_named_with_its_cause() -> None:
    with pytest.raises(CheckFailedError, match=r"  - shapes: .*raises ZeroDivisionError") as caught:
        check_inverse(Failing())
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_the_callers_random_numbers_go_on() -> None:
    before: Tensor = torch.get_rng_state()
    check_inverse(Step())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_claim_to_have_converged_is_measured() -> None:
    inverse = Sure(said="converged")
    operator = make_operator("definite")
    vector = draw_vector(operator)
    result = inverse.solve(inverse.init(operator), vector)
    truth = flatten(vector) - operator.dense() @ flatten(result.value)
    assert result.status is SolveStatus.TRUNCATED
    assert result.stats.residual_norm == pytest.approx(float(truth.norm()))
    check_inverse(inverse)
