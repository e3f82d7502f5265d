"""The bare `hypergradient` in a loop of one's own: no problem class, no optimiser class, no search.

    python examples/bare_hypergradient.py

A softmax regression on scikit-learn's digits, a weight decay for each of its 650 weights, and four
PyTorch lines around one call. Takes two seconds.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import ift_tune

INNER_STEPS = 20  # weight updates between two hyperparameter updates
OUTER_STEPS = 60

torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
inputs = torch.tensor(pixels, dtype=torch.float32) / 16
targets = torch.tensor(labels)
order = torch.randperm(len(inputs))
train, val, test = order[:100], order[100:300], order[300:]

model = nn.Linear(64, 10)
decay = ift_tune.WeightDecay(model, per="weight", init=1e-2)  # calling it gives the penalty
inner = torch.optim.Adam(model.parameters(), lr=1e-2)
outer = torch.optim.Adam(decay.parameters(), lr=3e-2)


def loss(rows: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of some rows, without the decay."""
    return F.cross_entropy(model(inputs[rows]), targets[rows])


losses = []
for outer_step in range(OUTER_STEPS):
    for _ in range(INNER_STEPS):
        inner.zero_grad()
        (loss(train) + decay()).backward()
        inner.step()
    result = ift_tune.hypergradient(
        loss(train) + decay(),
        loss(val),
        model,
        decay,
        inverse=ift_tune.Neumann(terms=10),  # α from the largest eigenvalue
    )
    for parameter, gradient in zip(decay.parameters(), result.grads, strict=True):
        parameter.grad = gradient
    outer.step()
    losses.append(float(result.val_loss))
    if outer_step % 20 == 0:
        print(f"outer step {outer_step}: validation loss {losses[-1]:.3f} ({result.status.value})")

error = float((model(inputs[test]).argmax(1) != targets[test]).float().mean())
print(f"validation loss {losses[0]:.3f} -> {losses[-1]:.3f}, test error {error:.3f}")
assert losses[-1] < 0.6 * losses[0], "expected the validation loss to fall below 60 %"
