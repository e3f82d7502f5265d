"""What the contracts share: a law that names itself, and linear systems with known answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from ift_tune.base.errors import CheckFailedError, IFTTuneError
from ift_tune.base.randomness import RandomStream
from ift_tune.base.views import View, pack, unpack
from ift_tune.implicit.curvature import Operator
from ift_tune.implicit.inverse import Inverse, InverseResult, State
from ift_tune.implicit.vectors import Tensors, flatten, mul, randn_like, unflatten
from ift_tune.testing.problems import random_spd

Case = TypeVar("Case")

Laws: TypeAlias = Mapping[str, Callable[[Case], None]]
"""What each law says, in a sentence, and what checks it: raises a `CheckFailedError` if broken."""

MOST_NUMBERS = 20  # of a summary: each is a column of the tables
MOST_BYTES = 400_000  # of all views: they travel in the tables


def require(holds: bool, text: str) -> None:
    """Raise a `CheckFailedError` with a text unless something holds."""
    if not holds:
        raise CheckFailedError(text)


def check_laws(who: str, laws: Laws[Case], make: Callable[[], Case]) -> None:
    """Check every law, each on a case of its own, and list all that are broken.

    Args:
        who: What is checked, for the error.
        laws: The laws.
        make: Makes a case, always the same. What it raises goes through.

    Raises:
        CheckFailedError: If a law is broken; the message names it.
    """
    broken: list[str] = []
    cause: Exception | None = None
    # The caller's random numbers go on as if nothing had been checked.
    with RandomStream(0, torch.device("cpu")).aside():
        for law, check in laws.items():
            case = make()
            try:
                check(case)
            except IFTTuneError as error:  # CheckFailedError too
                broken.append(f"  - {law}: {error}")
            except Exception as error:  # noqa: BLE001  (it is the cause of what is raised)
                broken.append(f"  - {law}: raises {type(error).__name__}: {error}")
                cause = cause or error
    if broken:
        head = f"{who} breaks what holds for its family:"
        raise CheckFailedError("\n".join([head, *broken])) from cause


def require_numbers(summary: Mapping[str, float], *, most: int = MOST_NUMBERS) -> None:
    """Raise a `CheckFailedError` unless these are a few finite named numbers."""
    require(0 < len(summary) <= most, f"summary() gives {len(summary)} numbers, not 1 to {most}")
    for name, value in summary.items():
        require(
            isinstance(name, str) and type(value) is float and math.isfinite(value),
            f"summary() gives {name!r}: {value!r}, not a finite float by a name",
        )


def is_line(text: object) -> bool:
    """Return whether this is a line of text, with nothing to strip."""
    return isinstance(text, str) and text.strip() == text != "" and "\n" not in text


def require_words(words: str) -> None:
    """Raise a `CheckFailedError` unless this is a sentence that a text can go on after."""
    require(
        is_line(words) and not words.endswith("."),
        f"words() gives {words!r}, not a line without stop",
    )


def require_views(views: list[View]) -> None:
    """Raise a `CheckFailedError` unless pictures are finite, detached, on the CPU and small."""
    for view in views:
        for field in fields(view):
            value = getattr(view, field.name)
            for numbers in value.values() if isinstance(value, Mapping) else [value]:
                if hasattr(numbers, "shape"):
                    _require_plain(f"{field.name} of the picture {view.title!r}", numbers)
    packed = pack(views)
    require(
        [view.title for view in unpack(packed)] == [view.title for view in views],
        "pictures are lost where a run directory keeps them",
    )
    require(len(packed) <= MOST_BYTES, f"pictures take {len(packed)} of {MOST_BYTES} bytes")


def _require_plain(what: str, numbers: Any) -> None:
    tensor = torch.as_tensor(numbers)  # an array, or a tensor still
    require(not tensor.requires_grad, f"{what} have a graph: detach them")
    require(tensor.device.type == "cpu", f"{what} are on {tensor.device}, not on the CPU")
    require(bool(torch.isfinite(tensor).all()), f"{what} are not all finite")


SIZE = 11  # equations, of three tensors

FINITE = ("definite", "ill-conditioned", "indefinite", "singular", "zero")
"""Of condition 10 and 1,000, with eigenvalues of both signs, of rank 7, all 0; the others are
``"nan"`` and ``"infinite"``. No eigenvalue is above 1."""


class Known(Operator):
    """A matrix whose products count, with a part on the diagonal that is known in closed form."""

    def __init__(self, matrix: Tensor, known: Tensor, dtype: torch.dtype, device: str) -> None:
        shapes = ((3, 2), (), (1, 2, 2))
        super().__init__([torch.zeros(s, dtype=dtype, device=device) for s in shapes])
        self.matrix, self.known = matrix.to(device, dtype), known.to(device, dtype)

    def _product(self, vector: Tensors) -> list[Tensor]:
        return unflatten(self.matrix @ flatten(vector), self.like)

    def penalty_matvec(self, vector: Tensors) -> list[Tensor]:
        """Return the product with the known part."""
        return unflatten(self.known * flatten(vector), self.like)


@cache
def _matrix(system: str) -> tuple[Tensor, Tensor]:
    """Return a symmetric matrix with eigenvalues up to 1, and the known part of its diagonal."""
    generator = torch.Generator().manual_seed(1)
    known = torch.rand(SIZE, generator=generator, dtype=torch.float64)
    if system == "ill-conditioned":
        known = 1e-3 * known
    matrix = random_spd(SIZE, condition=1e3 if system == "ill-conditioned" else 8.0, seed=3)
    matrix = matrix + torch.diag(known)
    if system == "indefinite":
        matrix = matrix - 0.8 * torch.eye(SIZE, dtype=torch.float64)
    if system == "singular":
        values, vectors = torch.linalg.eigh(matrix)
        matrix = vectors[:, 4:] @ torch.diag(values[4:]) @ vectors[:, 4:].T
        known = torch.zeros_like(known)
    factor = {"zero": 0.0, "nan": float("nan"), "infinite": float("inf")}.get(system, 1.0)
    factor /= float(torch.linalg.matrix_norm(matrix, 2))
    return factor * 0.5 * (matrix + matrix.T), factor * known


def make_operator(system: str, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Known:
    """Return a system's matrix as an operator that counts its products."""
    return Known(*_matrix(system), dtype, device)


def draw_vector(operator: Operator, seed: int = 0) -> list[Tensor]:
    """Return a right-hand side for an operator."""
    vector = randn_like(operator.like, seed)
    vector[0] = vector[0].T.contiguous().T  # as autograd's gradients often are
    return vector


@dataclass(frozen=True)
class Solved:
    """A solve of one system."""

    operator: Known
    state: State
    vector: list[Tensor]
    result: InverseResult

    @property
    def q(self) -> Tensor:
        """The answer as one vector."""
        return flatten(self.result.value)

    def dense(self) -> Tensor:
        """Return the matrix that is inverted, its damping included."""
        return self.state.operator.dense()

    def residual(self) -> float:
        """Return ‖v − H·q‖ in the norm of the state, by the dense matrix."""
        flat = flatten(self.vector) - self.dense() @ self.q
        return self.state.norm(unflatten(flat, self.operator.like))

    def spectrum(self) -> Tensor:
        """Return the eigenvalues of M⁻¹H, those of the symmetric M^(−1/2)·H·M^(−1/2)."""
        like = self.operator.like
        identity = torch.eye(SIZE, dtype=like[0].dtype)
        columns = [flatten(self.state.precondition(unflatten(e, like))) for e in identity]
        values, vectors = torch.linalg.eigh(torch.stack(columns, 1))
        root: Tensor = vectors @ torch.diag(values.sqrt()) @ vectors.T
        eigenvalues: Tensor = torch.linalg.eigvalsh(root @ self.dense() @ root)
        return eigenvalues


def solve(
    inverse: Inverse,
    system: str,
    *,
    seed: int = 0,
    scale: float = 1.0,
    guess: Tensors | None = None,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> Solved:
    """Solve a system, for a right-hand side that is `scale` times that of `seed`."""
    operator = make_operator(system, dtype, device)
    vector = mul(draw_vector(operator, seed), scale)
    state = inverse.init(operator)
    return Solved(operator, state, vector, inverse.solve(state, vector, guess))


def near(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> bool:
    """Return whether two vectors differ by little beside their length."""
    length = float(torch.linalg.vector_norm(b))
    return float(torch.linalg.vector_norm(a - b)) <= tolerance * length + 1e-300
