"""The laws of the family, on all examples of all inverses: a new one needs no line here."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ift_tune.base.status import SolveStatus
from ift_tune.implicit.curvature import Hessian, Matrix
from ift_tune.implicit.inverse import INVERSES, Dense, Inverse, InverseResult, State
from ift_tune.implicit.preconditioner import NoPreconditioner
from ift_tune.implicit.vectors import Tensors, flatten, randn_like
from ift_tune.testing import random_spd
from ift_tune.testing.contracts import check_inverse
from ift_tune.testing.frozen import minimise

NAMES = sorted(INVERSES)
CONDITION = 100.0  # more than that of the net's Hessian
EXAMPLES = [example for kind in INVERSES.values() for example in kind.examples()]


@pytest.mark.parametrize("inverse", EXAMPLES, ids=repr)
def test_the_laws_hold(inverse: Inverse) -> None:
    check_inverse(inverse)


@pytest.mark.parametrize("name", NAMES)
def test_the_default_is_an_example_and_is_described(name: str) -> None:
    kind = INVERSES[name]
    assert kind.name == name
    assert kind() in kind.examples()
    assert 10 < len(kind.summary) < 80


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 4, 9])
def test_default_halves_the_residual_of_an_easy_system(name: str, size: int) -> None:
    generator = torch.Generator().manual_seed(size + 1)
    vector = torch.randn(size, generator=generator, dtype=torch.float64)
    matrix = random_spd(size, condition=2.0, seed=size)
    matrix = matrix / torch.linalg.eigvalsh(matrix)[-1]
    inverse = INVERSES[name]()
    (solution,) = inverse.solve(inverse.init(Matrix(matrix)), [vector]).value
    assert float((vector - matrix @ solution).norm()) <= 0.5 * float(vector.norm())


@pytest.mark.parametrize(
    "inverse",
    # A preconditioner may use what it knows of tensors.
    [e for e in EXAMPLES if getattr(e, "preconditioner", NoPreconditioner()) == NoPreconditioner()],
    ids=repr,
)
def test_splitting_a_vector_into_tensors_changes_nothing(inverse: Inverse) -> None:
    like = [torch.zeros(s, dtype=torch.float64) for s in ((3, 2), (), (1, 2, 2))]
    matrix, vector = random_spd(11, seed=2), randn_like(like, 2)
    state = inverse.init(Matrix(matrix))
    (whole,) = inverse.solve(state, [flatten(vector)]).value
    split = inverse.init(Matrix(matrix, like))
    if state.eigenpair is not None:  # the power iteration draws its start tensor by tensor
        split = dataclasses.replace(split, eigenpair=state.eigenpair)
    parts = flatten(inverse.solve(split, vector).value)
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-12)


@functools.cache
def net_hessian() -> tuple[Hessian, Tensor]:
    """Return the Hessian of a net at its minimum, as an operator and as a matrix."""
    generator = torch.Generator().manual_seed(0)
    inputs = 2.0 * torch.randn(12, 2, generator=generator, dtype=torch.float64)
    targets = torch.randint(3, (12,), generator=generator)
    start = [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((3, 2), (3,), (3, 3))
    ]

    def loss(weights: list[Tensor]) -> Tensor:
        first, bias, second = weights
        logits = torch.tanh(inputs @ first.T + bias) @ second.T
        ridge = torch.stack([w.square().sum() for w in weights]).sum()
        return F.cross_entropy(logits, targets) + 0.03 * ridge

    weights = [w.requires_grad_() for w in minimise(loss, start)[0]]
    gradient = torch.autograd.grad(loss(weights), weights, create_graph=True)
    operator = Hessian(gradient, weights)
    return operator, operator.dense()


def solved_net(inverse: Inverse) -> tuple[InverseResult, float]:
    """Return the result on the net, and its error relative to the dense solution."""
    operator, matrix = net_hessian()
    vector = randn_like(operator.like, 3)
    result = inverse.solve(inverse.init(operator), vector)
    damping = getattr(inverse, "damping", 0.0) * torch.eye(len(matrix), dtype=torch.float64)
    truth = torch.linalg.solve(matrix + damping, flatten(vector))
    return result, float((flatten(result.value) - truth).norm() / truth.norm())


def test_the_net_is_at_a_minimum_of_moderate_condition() -> None:
    spectrum = torch.linalg.eigvalsh(net_hessian()[1])
    assert 0.0 < float(spectrum[-1]) < CONDITION * float(spectrum[0])


@pytest.mark.parametrize("inverse", EXAMPLES, ids=repr)
def test_what_converges_on_a_net_at_its_minimum_is_the_dense_solution(inverse: Inverse) -> None:
    result, error = solved_net(inverse)
    assert result.status not in (SolveStatus.NEGATIVE_CURVATURE, SolveStatus.SINGULAR)
    if result.status is SolveStatus.CONVERGED:
        assert result.stats.relative_residual is not None
        # ‖q − q*‖ ≤ ‖H⁻¹‖·‖r‖ and ‖v‖ ≤ ‖H‖·‖q*‖, so at most the condition times as large.
        assert error < CONDITION * result.stats.relative_residual + 1e-9


@pytest.mark.parametrize("name", [n for n in NAMES if INVERSES[n].refines])
def test_an_inverse_that_refines_has_an_example_that_solves_the_net(name: str) -> None:
    assert min(solved_net(inverse)[1] for inverse in INVERSES[name].examples()) < 1e-3


def test_a_subclass_with_the_old_name_of_max_hvps_works_and_warns() -> None:
    with pytest.warns(DeprecationWarning, match="Old.most_products is now max_hvps") as caught:

        @dataclasses.dataclass(frozen=True)
        class Old(Inverse):
            name: ClassVar[str] = "old"
            refines: ClassVar[bool] = False

            def most_products(self, weights: int, previous: bool) -> int:
                return weights - weights

            def _solve(self, state: State, vector: Tensors, length: float) -> InverseResult:
                return InverseResult(list(vector), SolveStatus.TRUNCATED)

    assert caught[0].filename == __file__
    inverse = Old()  # type: ignore[abstract]
    assert inverse.max_hvps(5, previous=False) == 0
    vector = [torch.ones(3, dtype=torch.float64)]
    state = inverse.init(Matrix(torch.eye(3, dtype=torch.float64)))
    assert torch.equal(inverse.solve(state, vector).value[0], vector[0])


def test_the_old_name_can_still_be_called() -> None:
    with pytest.warns(DeprecationWarning, match="Dense.most_products is now max_hvps"):
        assert Dense().most_products(7, previous=False) == 7
