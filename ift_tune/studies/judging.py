"""What a trained model says of each training example: the loss of its label, and another label."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ift_tune.base.randomness import RandomStream
from ift_tune.hyper.answers import Answers
from ift_tune.hyper.predictions import positions
from ift_tune.hyper.supervised import ClassificationProblem, SupervisedProblem
from ift_tune.problem.batches import to_device
from ift_tune.problem.loaders import once_through
from ift_tune.problem.modes import evaluating
from ift_tune.testing.symptoms import curvature_split


@dataclass(frozen=True)
class Judgement:
    """By position in the training split, on the CPU; NaN for what no batch of a pass has brought.

    Attributes:
        losses: Of the examples with the labels that they have, shape (N,).
        given: The labels: class numbers, or what a regression is to predict; NaN where an example
            has many, as a text has.
        predicted: Likewise by the model.
        probabilities: Of the classes, shape (N, classes); None where there are none.
    """

    losses: Tensor
    given: Tensor
    predicted: Tensor
    probabilities: Tensor | None

    @classmethod
    def mean(cls, judgements: Iterable[Judgement]) -> Judgement:
        """Return what several models say together: their mean losses and mean probabilities."""
        every = list(judgements)
        losses = torch.stack([j.losses for j in every]).mean(dim=0)
        chances = [j.probabilities for j in every if j.probabilities is not None]
        if not chances:
            predicted = torch.stack([j.predicted for j in every]).mean(dim=0)
            return cls(losses, every[0].given, predicted, None)
        together = torch.stack(chances).mean(dim=0)
        return cls(losses, every[0].given, _most_likely(together), together)


@torch.no_grad()
def judge(problem: SupervisedProblem, examples: int) -> Judgement:
    """Return what a problem's model, in evaluation mode, says of its training examples.

    Args:
        problem: With its trained model; λ is not at work.
        examples: In the training split.

    Raises:
        UsageError: If the losses of single examples cannot be told.
    """
    device = problem.weights()[0].device
    losses, given, predicted = torch.full((3, examples), torch.nan, dtype=torch.float64)
    probabilities: Tensor | None = None
    classes = isinstance(problem, ClassificationProblem)
    with RandomStream(0, device).aside(), evaluating(problem.model):
        for batch in once_through(getattr(problem.splits, curvature_split(problem))):
            here = to_device(batch, device)
            answers, found = problem.example_losses(here)
            index = positions(problem, here).cpu()
            losses[index] = found.double().cpu()
            if classes and answers.outputs.ndim == 2:
                chances = answers.outputs.double().softmax(dim=1).cpu()
                if probabilities is None:
                    shape = (examples, chances.shape[1])
                    probabilities = torch.full(shape, torch.nan, dtype=torch.float64)
                probabilities[index] = chances
                given[index] = _class_numbers(answers)
            elif not classes and answers.targets[0].numel() == 1:
                given[index] = answers.targets.double().flatten().cpu()
                predicted[index] = answers.outputs.double().flatten().cpu()
    if probabilities is not None:
        predicted = _most_likely(probabilities)
    return Judgement(losses, given, predicted, probabilities)


def _class_numbers(answers: Answers) -> Tensor:
    """Return the classes that the targets name, NaN where they do not count."""
    targets = answers.targets if answers.targets.ndim == 1 else answers.targets.argmax(dim=1)
    numbers = targets.double()
    if answers.counted is not None:
        numbers = torch.where(answers.counted, numbers, torch.nan)
    return numbers.cpu()


def _most_likely(probabilities: Tensor) -> Tensor:
    known = probabilities.isfinite().all(dim=1)
    return torch.where(known, probabilities.nan_to_num().argmax(dim=1).double(), torch.nan)
