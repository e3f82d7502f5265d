"""An embedding's padding row has no gradient by definition: that is no wrong derivative."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from ift_tune import (
    Batches,
    ClassificationProblem,
    Compose,
    ExampleWeights,
    JointOptimizer,
    MetaConfig,
    Neumann,
    Splits,
    StartCheckError,
    WeightDecay,
)
from ift_tune.testing import check_hypergradient

WORDS, LENGTH = 7, 5


class MeanOfWords(nn.Module):
    """Means of words' vectors, the padding's among them, through a layer."""

    def __init__(self, padding: int, hook: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 4, padding_idx=padding)
        nn.init.normal_(self.words.weight)  # the padding's too, as a loaded vocabulary may have it
        self.out = nn.Linear(4, 3)
        self.hook = hook

    def forward(self, inputs: Tensor) -> Tensor:
        found = self.words(inputs).mean(dim=1)
        if self.hook and found.requires_grad:
            found.register_hook(lambda gradient: 0.5 * gradient)
        outputs: Tensor = self.out(found.tanh())
        return outputs


def problem(padding: int, hook: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(1)
    inputs = torch.randint(WORDS, (60, LENGTH))
    inputs[:, -2:] = padding  # every example ends with it
    targets = torch.randint(3, (60,))
    model = MeanOfWords(padding, hook).to(dtype)
    hyper = ExampleWeights(60).to(dtype)
    batches = Batches(inputs, targets, torch.arange(60))
    return ClassificationProblem(model, hyper, Splits(*[batches] * 4))


@pytest.mark.parametrize("padding", [0, 3, WORDS - 1])
@pytest.mark.parametrize("products", ["exact", "difference"])
def test_a_run_begins_and_leaves_the_row_as_it_is(
    padding: int, products: Literal["exact", "difference"]
) -> None:
    made = problem(padding)
    before = made.model.words.weight.detach().clone()
    config = MetaConfig(inverse=Neumann(terms=2), inner_steps=3, products=products)
    joint = JointOptimizer(made, config)
    joint.step()
    assert joint.start_check is not None
    moved = (made.model.words.weight != before).any(dim=1)
    assert moved.tolist() == [row != padding for row in range(WORDS)]


def test_what_is_wrong_beside_it_is_still_found() -> None:
    with pytest.raises(StartCheckError, match="is not its derivative: look for gradient"):
        JointOptimizer(problem(0, hook=True), MetaConfig(inverse=Neumann(terms=2))).step()


def test_the_hypergradient_is_that_of_a_model_whose_row_has_no_part_in_training() -> None:
    made = problem(2, dtype=torch.float64)
    decay = WeightDecay(made.model, "tensor", init=0.05)
    hyper = Compose({"weights": made.hyper, "decay": decay})
    check_hypergradient(ClassificationProblem(made.model, hyper, made.splits))
