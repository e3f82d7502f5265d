"""Two published logistic regressions with a decay for each weight, and the rates of hypergradients.

Used by `published.py`. All of it is float64 on one thread and takes some ten seconds.

- hypertorch's notebook ``logistic_regression.ipynb`` (Grazzi et al. 2020): 20 decays.
- Hataya and Yamada 2023, as in ``logistic_regression.py`` of hypergrad: 100 decays.
- Grazzi, Franceschi, Pontil, Salzo 2020: how fast the error of a hypergradient falls.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F

import ift_tune
from ift_tune import ConjugateGradient, Inverse, Neumann, Nystrom

NOTEBOOK = {
    0: 0.5743989944458008,
    10: 0.5337678790092468,
    20: 0.3615218698978424,
    30: 0.3225042521953583,
    40: 0.2987646162509918,
    50: 0.2944669723510742,
    60: 0.2905733585357666,
    70: 0.2885856032371521,
    80: 0.2871982753276825,
    90: 0.28584417700767517,
    100: 0.2853544056415558,
    110: 0.284612774848938,
    120: 0.2834946811199188,
    130: 0.2829788625240326,
}
"""The validation losses that the notebook prints, by outer step, in float32."""

INNER_STEPS, INNER_LR, UNROLLED = 100, 0.1, 10


class Logistic(NamedTuple):
    """Training and validation examples of a logistic regression without a bias."""

    train: Tensor
    train_targets: Tensor
    val: Tensor
    val_targets: Tensor

    def train_loss(self, w: Tensor, decays: Tensor) -> Tensor:
        """Return the mean loss with half the weighted squares of the weights."""
        fit = F.binary_cross_entropy_with_logits(self.train @ w, self.train_targets)
        return fit + 0.5 * (decays * w.square()).sum()

    def val_loss(self, w: Tensor) -> Tensor:
        """Return the mean loss alone."""
        return F.binary_cross_entropy_with_logits(self.val @ w, self.val_targets)

    def descend(self, decays: Tensor, steps: int) -> Tensor:
        """Return the weights after so many steps of gradient descent from 0, as a leaf."""
        w = torch.zeros_like(decays)
        with torch.no_grad():
            for _ in range(steps):
                wrong = (self.train @ w).sigmoid() - self.train_targets
                w = w - INNER_LR * (self.train.T @ wrong / len(wrong) + decays * w)
        return w.requires_grad_()


def notebook_data() -> Logistic:
    """Return the notebook's 500 and 500 examples: seed 1, 20 inputs, noise of 0.1 on the score."""
    np.random.seed(1)
    oracle = np.random.randn(20)
    inputs = np.random.randn(1000, 20)
    scores = inputs @ oracle + 0.1 * np.random.randn(1000)
    parts = train_test_split(inputs, (scores > 0.0).astype(float), test_size=0.5)
    train, val, train_targets, val_targets = map(torch.from_numpy, parts)
    return Logistic(train, train_targets, val, val_targets)


def hataya_data() -> Logistic:
    """Return 500 and 500 examples with 100 inputs, drawn by PyTorch from seed 1."""
    generator = torch.Generator().manual_seed(1)
    oracle = torch.randn(100, generator=generator)
    inputs = torch.randn(1000, 100, generator=generator)
    scores = inputs @ oracle + 0.1 * torch.randn(1000, generator=generator)
    inputs, targets = inputs.double(), (scores > 0.0).double()
    return Logistic(inputs[:500], targets[:500], inputs[500:], targets[500:])


def tune(
    data: Logistic, outer_steps: int, gradient: Callable[[Tensor, int], tuple[Tensor, float]]
) -> list[float]:
    """Return the validation loss before each outer step: SGD 1.0 with momentum 0.9 from ones.

    Args:
        data: The examples.
        outer_steps: How many.
        gradient: Takes the decays and the number of the step; returns their gradient and the
            validation loss.
    """
    decays = torch.ones(data.train.shape[1], dtype=torch.double, requires_grad=True)
    outer = torch.optim.SGD([decays], lr=1.0, momentum=0.9)
    losses = []
    for step in range(outer_steps):
        decays.grad, loss = gradient(decays, step)
        losses.append(loss)
        outer.step()
        with torch.no_grad():
            decays.clamp_(min=1e-8)
    return losses


def notebook_losses(outer_steps: int, *, implicit: bool = False) -> list[float]:
    """Return hypertorch's curve: 100 inner steps, differentiated through the last ten.

    Args:
        outer_steps: How many.
        implicit: By the implicit function theorem at the last weights instead, with as many terms.
    """
    data = notebook_data()

    def gradient(decays: Tensor, step: int) -> tuple[Tensor, float]:
        if implicit:
            w = data.descend(decays, INNER_STEPS)
            inverse = Neumann(terms=UNROLLED - 1, alpha=INNER_LR)
            result = ift_tune.hypergradient(
                data.train_loss(w, decays), data.val_loss(w), [w], [decays], inverse=inverse
            )
        else:
            result = ift_tune.unrolled_hypergradient(
                lambda weights: data.train_loss(weights[0], decays),
                lambda weights: data.val_loss(weights[0]),
                [data.descend(decays, INNER_STEPS - UNROLLED)],
                [decays],
                steps=UNROLLED,
                lr=INNER_LR,
            )
        return result.grads[0], float(result.val_loss)

    return tune(data, outer_steps, gradient)


def hataya_losses(inverse: Inverse, outer_steps: int = 100) -> list[float]:
    """Return the curve of Hataya and Yamada's regression with an inverse.

    A Nyström sketch is drawn anew at each outer step, as theirs is.
    """
    data = hataya_data()

    def gradient(decays: Tensor, step: int) -> tuple[Tensor, float]:
        # Their first outer step comes after one inner step more than the others.
        w = data.descend(decays, INNER_STEPS + (step == 0))
        now = inverse
        if isinstance(inverse, Nystrom):
            now = Nystrom(rank=inverse.rank, damping=inverse.damping, sketch_seed=step)
        result = ift_tune.hypergradient(
            data.train_loss(w, decays), data.val_loss(w), [w], [decays], inverse=now
        )
        return result.grads[0], float(result.val_loss)

    return tune(data, outer_steps, gradient)


class Rate(NamedTuple):
    """How fast an error falls.

    Attributes:
        method: Of the hypergradient.
        proven: The factor a step of Grazzi et al.'s bound.
        measured: The geometric mean factor a step, over the later half of the steps.
        largest_excess: The largest error over the bound with its constant; at most 1 if it holds.
    """

    method: str
    proven: float
    measured: float
    largest_excess: float


def rates(weights: int = 60, seed: int = 0) -> list[Rate]:
    """Measure the errors of fixed-point and of conjugate-gradient hypergradients after k products.

    On a ridge regression at its minimum, whose Hessian has eigenvalues from 0.1 to 2, evenly
    spread, with a decay for each weight; the hypergradient is known in closed form. The bounds have
    the factors (κ − 1)/(κ + 1), which the fixed point with the step 2/(λ_min + λ_max) attains, and
    (√κ − 1)/(√κ + 1) with the constant 2√κ, which conjugate gradients undercut on any one spectrum
    of finitely many eigenvalues.

    Args:
        weights: How many.
        seed: Of the regression.
    """
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(weights, weights, generator=generator).double()).Q
    spectrum = torch.linspace(0.1, 2.0, weights, dtype=torch.double)
    decays = torch.full((weights,), 0.05, dtype=torch.double, requires_grad=True)
    gram = (basis * (spectrum - 0.05)) @ basis.T  # with the decay, eigenvalues of `spectrum`
    hessian = (basis * spectrum) @ basis.T
    linear, aim = torch.randn(2, weights, generator=generator).double()
    optimum = torch.linalg.solve(hessian, linear)

    def train_loss(w: Tensor) -> Tensor:
        loss: Tensor = 0.5 * w @ (gram @ w) - linear @ w + 0.5 * (decays * w.square()).sum()
        return loss

    def val_loss(w: Tensor) -> Tensor:
        loss: Tensor = 0.5 * (w - aim).square().sum()
        return loss

    exact = -optimum * torch.linalg.solve(hessian, optimum - aim)
    scale = float(optimum.abs().max() * torch.linalg.solve(hessian, optimum - aim).norm())
    low, high = float(spectrum[0]), float(spectrum[-1])
    kappa, alpha = high / low, 2.0 / (low + high)
    q, q_cg = (kappa - 1) / (kappa + 1), (math.sqrt(kappa) - 1) / (math.sqrt(kappa) + 1)
    w = optimum.clone().requires_grad_()

    def implicit(inverse: Inverse) -> Tensor:
        return ift_tune.hypergradient(
            train_loss(w), val_loss(w), [w], [decays], inverse=inverse
        ).grads[0]

    def rate(
        method: str,
        q: float,
        steps: range,
        bound: Callable[[int], float],
        make: Callable[[int], Tensor],
    ) -> Rate:
        errors = {k: float((make(k) - exact).norm()) for k in steps}
        first, last = steps[len(steps) // 2], steps[-1]
        measured = (errors[last] / errors[first]) ** (1.0 / (last - first))
        return Rate(method, q, measured, max(e / bound(k) for k, e in errors.items()))

    # The fixed point after k steps is α times the sum of k powers, and misses (I − αH)^k of H⁻¹v.
    return [
        rate(
            "fixed point (Neumann)",
            q,
            range(10, 161, 10),
            lambda k: scale * q**k,
            lambda k: implicit(Neumann(terms=k - 1, alpha=alpha)),
        ),
        rate(
            "conjugate gradients",
            q_cg,
            range(4, 45, 4),
            lambda k: 2.0 * math.sqrt(kappa) * scale * q_cg**k,
            lambda k: implicit(ConjugateGradient(max_steps=k, tolerance=1e-15)),
        ),
    ]
