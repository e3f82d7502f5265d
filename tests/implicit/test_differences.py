"""Products by differences: of any inverse and kind of loss those that autograd gives, or nearly."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from ift_tune import (
    Batches,
    ClassificationProblem,
    ConjugateGradient,
    Dense,
    ExampleWeights,
    HyperKind,
    Identity,
    Inverse,
    Neumann,
    Nystrom,
    Splits,
    UsageError,
    WeightDecay,
)
from ift_tune.base.randomness import RandomStream
from ift_tune.implicit.differences import Differences
from ift_tune.implicit.hypergradient import solve
from ift_tune.implicit.linearisation import Linearisation
from ift_tune.implicit.vectors import dot, norm, randn_like, relative_error
from ift_tune.problem.losses import linearise_problem
from ift_tune.problem.micro_batches import MicroBatch

ROWS = 24


class Sequential(nn.Module):
    """Words through an encoder, whose answers are averaged, or the last one's taken."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.embed = kind, nn.Embedding(9, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, "gelu", batch_first=True)
        self.encode: nn.Module = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        if kind == "lstm":
            self.encode = nn.LSTM(8, 12, batch_first=True)
        self.read = nn.Linear(12 if kind == "lstm" else 8, 3)

    def forward(self, words: Tensor) -> Tensor:
        found = self.encode(self.embed(words))
        answers: Tensor = self.read(found[0][:, -1] if self.kind == "lstm" else found.mean(1))
        return answers


class Lowered(nn.Module):
    """A model under autocast."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            answers: Tensor = self.model(inputs)
        return answers


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.ELU(), nn.Dropout(0.2), nn.Linear(16, 3))


def cnn() -> nn.Module:
    first = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*first, nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (6,)),
    "cnn": (cnn, (2, 8, 8)),
    "transformer": (lambda: Sequential("transformer"), (5,)),
    "lstm": (lambda: Sequential("lstm"), (5,)),
}
PRECISIONS = {
    "float64": (torch.float64, 1e-6),
    "float32": (torch.float32, 0.02),
    "bf16": (None, 0.6),
}


def make(
    name: str, dtype: torch.dtype | None = torch.float64, hyper: type[HyperKind] = ExampleWeights
) -> ClassificationProblem:
    """Return a classification of noise by a model that has been trained a little."""
    torch.manual_seed(0)
    build, shape = MODELS[name]
    model = build().to(dtype or torch.float32)
    inputs = torch.randn(2 * ROWS, *shape, dtype=dtype or torch.float32)
    if name in ("transformer", "lstm"):
        inputs = torch.randint(9, (2 * ROWS, *shape))
    targets, index = torch.randint(3, (2 * ROWS,)), torch.arange(ROWS)
    train = Batches(inputs[:ROWS], targets[:ROWS], index, shuffle=False)
    val = Batches(inputs[ROWS:], targets[ROWS:], shuffle=False)
    model = Lowered(model) if dtype is None else model
    kind: HyperKind = WeightDecay(model, "weight", init=0.02)
    if hyper is ExampleWeights:
        kind = ExampleWeights(ROWS).to(dtype or torch.float32)
    problem = ClassificationProblem(model, kind, Splits(train, val, val, val))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(8):
        optimizer.zero_grad()
        problem.train_loss(next(iter(train))).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    optimizer.zero_grad()
    return problem


def linearised(problem: ClassificationProblem, **how: object) -> Linearisation:
    """Return the problem linearised, always on the same random numbers."""
    batches = (next(iter(s)) for s in (problem.splits.train, problem.splits.val))
    with RandomStream(3, torch.device("cpu")).aside():
        return linearise_problem(problem, *batches, **how)  # type: ignore[arg-type]


def state_of(problem: ClassificationProblem) -> list[Tensor]:
    tensors = [*problem.model.state_dict().values(), *problem.hyper.state_dict().values()]
    return [t.clone() for t in tensors]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_products_are_those_of_autograd(name: str, precision: str) -> None:
    dtype, allowed = PRECISIONS[precision]
    problem = make(name, dtype)
    before = state_of(problem)
    exact, found = linearised(problem), linearised(problem, products="difference")
    for mine, theirs in zip(found.vector, exact.vector, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.05 if dtype is None else 1e-4, atol=1e-2)
    along = exact.vector
    pairs = [(found.operator.matvec(along), exact.operator.matvec(along))]
    pairs.append((found.products(along)[1], exact.products(along)[1]))  # type: ignore[arg-type]
    for product, truth in pairs:
        assert relative_error(product, truth) < allowed
        lengths = float(norm(product) * norm(truth))
        assert float(dot(product, truth)) > (1.0 - 0.3 * allowed) * lengths
    assert all(map(torch.equal, before, state_of(problem)))  # to the bit, buffers among them


@pytest.mark.parametrize(
    "inverse",
    [
        Neumann(terms=4, alpha=0.2),
        Neumann(terms=2),
        Identity(),
        ConjugateGradient(max_steps=4, damping=0.1),
        Nystrom(rank=5, damping=0.1),
        Dense(damping=0.1),
    ],
    ids=lambda inverse: inverse.name,
)
@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("hyper", [ExampleWeights, WeightDecay])
def test_every_inverse_has_the_same_hypergradient(
    inverse: Inverse, curvature: str, hyper: type[HyperKind]
) -> None:
    problem, gauss_newton = make("mlp", hyper=hyper), curvature == "gauss_newton"
    exact = solve(linearised(problem, gauss_newton=gauss_newton), inverse)
    found = solve(linearised(problem, gauss_newton=gauss_newton, products="difference"), inverse)
    assert relative_error(found.grads, exact.grads) < 1e-5
    assert found.stats.hvps == exact.stats.hvps


def test_a_piece_is_kept_where_units_change_sides() -> None:
    problem = make("cnn", torch.float32)
    exact, found = linearised(problem), linearised(problem, products="difference")
    along = randn_like(exact.vector, 5)
    assert relative_error(found.operator.matvec(along), exact.operator.matvec(along)) < 0.02
    source = found.source
    assert isinstance(source, Differences)
    source.kinks, source.step = False, 0.01  # as in compiled code, where nobody sees them
    assert relative_error(found.operator.matvec(along), exact.operator.matvec(along)) > 0.05


def test_weights_that_move_before_the_last_product_are_refused() -> None:
    problem = make("mlp")
    found = linearised(problem, products="difference")
    with torch.no_grad():
        problem.weights()[0].mul_(1.5)
    with pytest.raises(UsageError, match=r"linearise anew .* got weights that have moved"):
        found.operator.matvec(found.vector)


def test_a_gradient_that_two_weights_share_is_not_added_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (nn.Parameter(torch.full((6, 3), x)) for x in (0.1, 0.3))

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs.tanh() @ (self.one + self.two)

    MODELS["twice"] = (Twice, (6,))
    problem = make("twice")
    del MODELS["twice"]
    exact, found = linearised(problem), linearised(problem, products="difference")
    along = randn_like(exact.vector, 1)
    assert relative_error(found.operator.matvec(along), exact.operator.matvec(along)) < 1e-6


@pytest.mark.parametrize("products", ["exact", "difference"])
@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("hyper", [ExampleWeights, WeightDecay])
def test_micro_batches_have_the_numbers_of_the_whole(
    products: str, curvature: str, hyper: type[HyperKind]
) -> None:
    problem, gauss_newton = make("mlp", hyper=hyper), curvature == "gauss_newton"
    problem.model.eval()  # without dropout, whose masks are others in parts
    how = {"gauss_newton": gauss_newton, "products": products}
    whole = linearised(problem, **how)
    grads = solve(whole, Neumann(terms=3, alpha=0.2)).grads
    for sizes in [(7, 5), (1, ROWS), (None, 11)]:
        parts = linearised(problem, **how, micro_batch=MicroBatch(*sizes))
        assert (
            relative_error([parts.train_loss, parts.val_loss], [whole.train_loss, whole.val_loss])
            < 1e-12
        )
        found = solve(parts, Neumann(terms=3, alpha=0.2)).grads
        assert relative_error(found, grads) < (1e-10 if products == "exact" else 1e-6)


def parts_of_validation(problem: ClassificationProblem) -> Sequence[Tensor]:
    return linearised(problem, products="difference", micro_batch=MicroBatch(None, 5)).vector


def test_running_statistics_are_followed_in_parts_too() -> None:
    problem = make("cnn")
    exact = linearised(problem).vector
    assert relative_error(parts_of_validation(problem), exact) < 1e-9
