"""A problem's losses: linearised against dense matrices, and as functions of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ift_tune import Batches, ClassificationProblem, Splits, WeightDecay
from ift_tune.implicit.double_backward import Kernels
from ift_tune.implicit.linearisation import Linearisation
from ift_tune.implicit.vectors import flatten, unflatten
from ift_tune.problem.losses import Functional, linearise_problem
from ift_tune.testing import Quadratic


class Attention(nn.Module):
    """A head of fused attention over the four inputs as tokens, recomputed on the way back."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.read = nn.Linear(1, 6), nn.BatchNorm1d(2), nn.Linear(2, 3)

    def attend(self, inputs: Tensor) -> Tensor:
        q, k, v = self.embed(inputs[:, None, :, None]).chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v).mean(dim=(1, 2))

    def forward(self, inputs: Tensor) -> Tensor:
        attended = checkpoint(self.attend, inputs, use_reentrant=False)
        assert isinstance(attended, Tensor)
        outputs: Tensor = self.read(self.norm(attended))
        return outputs


def attentive() -> ClassificationProblem:
    """Return a decayed classifier in float64, not at a minimum."""
    torch.manual_seed(0)
    model = Attention().double()
    rows = Batches(torch.randn(9, 4).double(), torch.randint(3, (9,)))
    hyper = WeightDecay(model, "tensor", init=0.1)
    return ClassificationProblem(model, hyper, Splits(rows, rows, rows, rows))


def linearised(problem: ClassificationProblem, *, gauss_newton: bool = False) -> Linearisation:
    (batch,) = problem.splits.train
    return linearise_problem(problem, batch, batch, gauss_newton=gauss_newton)


def dense_truth(problem: ClassificationProblem) -> tuple[Tensor, Tensor, Tensor]:
    """Return ∂L_T/∂w, ∂²L_T/∂w∂wᵀ and ∂²L_T/∂w∂λᵀ, the attention written out, by autograd."""
    (inputs, targets) = next(iter(problem.splits.train))
    weights, hypers = problem.weights(), problem.hypers()

    def objective(flat: Tensor, raw: Tensor) -> Tensor:
        w, b, scale, shift, read, bias = unflatten(flat, weights)
        q, k, v = (inputs[:, :, None] @ w.T + b).chunk(3, dim=-1)
        mixing = torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, dim=-1)
        seen = (mixing @ v).mean(dim=1)
        spread = seen.var(dim=0, correction=0)
        seen = (seen - seen.mean(dim=0)) / (spread + 1e-5).sqrt() * scale + shift
        decay = zip(F.softplus(raw), (w, b, scale, shift, read, bias), strict=True)
        penalty = torch.stack([c * t.square().sum() for c, t in decay]).sum()
        return F.cross_entropy(seen @ read.T + bias, targets) + penalty

    flat = flatten(weights).detach().requires_grad_()
    raw = flatten(hypers).detach().requires_grad_()
    (slope,) = torch.autograd.grad(objective(flat, raw), flat, create_graph=True)
    rows = [torch.autograd.grad(s, (flat, raw), retain_graph=True) for s in slope]
    return slope.detach(), torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])


def test_all_parts_are_those_of_dense_matrices_wherever_the_products_are_taken() -> None:
    problem = attentive()
    slope, hessian, mixed = dense_truth(problem)
    before = Kernels.in_force()
    found = linearised(problem)
    assert Kernels.in_force() == before
    assert sum(before.attention) > 1  # outside, fast attention is allowed
    torch.testing.assert_close(found.operator.dense(), hessian, rtol=1e-9, atol=1e-10)
    assert found.gradient_norm() == pytest.approx(float(slope.norm()), rel=1e-9)
    generator = torch.Generator().manual_seed(1)
    flat = torch.randn(len(slope), generator=generator, dtype=torch.float64)
    q = unflatten(flat, found.vector)
    torch.testing.assert_close(flatten(found.contract(q)), -flat @ mixed, rtol=1e-9, atol=1e-10)
    assert Kernels.in_force() == before


def test_the_outer_batches_do_not_move_the_statistics_and_the_modes_stay() -> None:
    problem = attentive()
    buffers = {k: b.clone() for k, b in problem.model.named_buffers()}
    linearised(problem).operator.dense()
    assert all(torch.equal(b, buffers[k]) for k, b in problem.model.named_buffers())
    assert all(m.training for m in problem.model.modules())


def test_gauss_newton_takes_the_outputs_of_the_one_call() -> None:
    found = linearised(attentive(), gauss_newton=True)
    values = torch.linalg.eigvalsh(found.operator.dense())
    assert float(values[0]) > 0.0  # the decays' curvature at least
    hessian = linearised(attentive()).operator.dense()
    assert not torch.allclose(found.operator.dense(), hessian, atol=1e-4)


@pytest.mark.parametrize("seed", range(2))
def test_any_solution_can_be_contracted(seed: int) -> None:
    problem = Quadratic(seed=seed)
    with torch.no_grad():
        problem.weights()[0].copy_(problem.solution())
    found = linearise_problem(problem, None, None)
    q = torch.linalg.solve(problem.matrix, problem.solution() - problem.goal)
    torch.testing.assert_close(found.contract([q])[0], problem.exact_hypergradient())
    assert found.gradient_norm() < 1e-12
    # For q = 0 only the direct term is left.
    torch.testing.assert_close(found.contract([torch.zeros_like(q)])[0], problem.hypers()[0].data)


def test_functional_losses_are_those_of_the_given_weights() -> None:
    problem = Quadratic()
    functional = Functional(problem)
    batch = problem.splits.train
    other = [torch.randn(6, dtype=torch.float64)]
    expected = 0.5 * (other[0] - problem.goal).square().sum() + 0.5 * (
        problem.hypers()[0].square().sum()
    )
    assert torch.allclose(functional.val_loss(other, batch, batch), expected)
    assert problem.weights()[0].count_nonzero() == 0


def test_the_whole_objective_has_the_penalty_in_it() -> None:
    problem = attentive()
    (batch,) = problem.splits.train
    weights = [w.detach() for w in problem.weights()]
    decay = 0.1 * sum(float(w.square().sum()) for w in weights)
    found = Functional(problem).train_loss(weights, batch)
    data = problem.train_loss(batch).detach()
    assert float(found.detach()) == pytest.approx(float(data) + decay)
