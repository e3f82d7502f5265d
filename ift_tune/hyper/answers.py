"""What a model answers and what it should have: brought into one form, or refused by name."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ift_tune.base.errors import UsageError
from ift_tune.implicit.vectors import is_stacked
from ift_tune.problem.contents import contents_of

_LOOKED_AT, _FEWEST = 64, 4  # examples whose outputs are looked at; answers that tell something


class Answers(NamedTuple):
    """Outputs and targets as a criterion takes them.

    Attributes:
        outputs: Logits of shape (B, classes, ...), or whatever a loss of one's own takes.
        targets: Class numbers (B, ...) from 0, or probabilities of the shape of the outputs.
        counted: Which answers count, shape (B, ...): padding does not. None if all do.
    """

    outputs: Tensor
    targets: Tensor
    counted: Tensor | None = None


class ExampleLosses(NamedTuple):
    """The losses of single examples, and what each counts for in the mean over all answers.

    They come apart because a share is a matter of the batch: what a kind of hyperparameters makes
    of an example must not depend on how many answers its neighbours have.

    Attributes:
        losses: The mean over each example's answers that count, shape (B,); 0 if there is none.
        shares: How many answers of each example count, relative to the mean of the batch, shape
            (B,). None if all have as many.
    """

    losses: Tensor
    shares: Tensor | None = None

    def mean(self) -> Tensor:
        """Return the mean over all answers that count, a scalar; 0 if there is none."""
        return (self.losses if self.shares is None else self.losses * self.shares).mean()


def may_read(tensor: Tensor, hyper: nn.Module) -> bool:
    """Return whether to look at the values of a batch: not in inner steps on a GPU.

    Each look makes the CPU wait for all that the GPU has yet to do. λ is constant in inner steps,
    by which they are told; outer steps and evaluations look. Nobody can where a tensor stands for
    those of several trials.
    """
    if is_stacked(tensor):
        return False
    return tensor.is_cpu or any(h.requires_grad for h in hyper.parameters())


def class_answers(
    outputs: Tensor, targets: Tensor, ignore_index: int, *, read: bool = True
) -> Answers:
    """Return the answers of a classifier.

    A single logit z, (B,) or (B, 1, ...), stands for the two logits 0 and z: the cross-entropy is
    then the binary one, and every kind of hyperparameters finds its classes. Targets of
    `ignore_index` become class 0 and are not counted.

    Args:
        outputs: The model's.
        targets: Class numbers, or probabilities.
        ignore_index: The class number of what is not counted.
        read: Whether to look at the values (see `may_read`) where they are not known already
            (see `problem.contents`). Else wrong class numbers are left to the loss's kernel, which
            stops at them, and wrong probabilities become NaN.

    Raises:
        UsageError: If the targets are neither class numbers nor probabilities of the classes.
    """
    if outputs.ndim == 1:
        outputs = outputs.unsqueeze(1)
    single = outputs.ndim > 1 and outputs.shape[1] == 1
    if single:
        outputs = torch.cat([torch.zeros_like(outputs), outputs], dim=1)
        if targets.ndim == outputs.ndim and targets.shape[1] == 1:
            targets = targets.squeeze(1)
    if targets.shape == (outputs.shape[0], *outputs.shape[2:]):
        if single and targets.is_floating_point():
            return _chances(outputs, targets, ignore_index, read)
        return _numbers(outputs, targets, ignore_index, read)
    if targets.shape == outputs.shape:
        return Answers(outputs, _probabilities(outputs, targets, read))
    wanted = (outputs.shape[0], *outputs.shape[2:])
    raise UsageError(
        f"targets must be class numbers of shape {wanted}, or probabilities of the logits' shape "
        f"{tuple(outputs.shape)}, which is (B, classes, ...): reshape them, or move the model's "
        f"classes to dimension 1; got {tuple(targets.shape)}"
    )


def _numbers(outputs: Tensor, targets: Tensor, ignore_index: int, read: bool) -> Answers:
    if targets.is_floating_point() or targets.is_complex():
        raise UsageError(
            f"class numbers must be integers: give targets.long(), got {targets.dtype}; real "
            "numbers are for a RegressionProblem"
        )
    told = contents_of(targets)
    targets, classes = targets.long(), outputs.shape[1]
    if not targets.numel():
        return Answers(outputs, targets)
    if read or told is not None:
        low, high = _ends(targets) if told is None else told.fact("ends", _ends)
        if low >= 0 and high < classes:
            return Answers(outputs, targets)
    counted = targets != ignore_index
    targets = targets.masked_fill(~counted, 0)
    if told is not None:
        low, high = told.fact(("ends", ignore_index), partial(_ends_but, ignored=ignore_index))
    elif read:
        low, high = _ends(targets)
    else:
        # The kernel leaves out -100 in silence, whatever is to be ignored here.
        known = targets if ignore_index == -100 else targets.masked_fill(targets < 0, classes)
        return Answers(outputs, known, counted)
    if not (low >= 0 and high < classes):
        raise UsageError(
            f"targets must be class numbers from 0 to {classes - 1}, as many as the model has "
            f"outputs, or {ignore_index} where there is no label; got {low} to {high}"
        )
    return Answers(outputs, targets, counted)


def _ends(numbers: Tensor) -> tuple[int, int]:
    """Return the least and the largest of some integers."""
    low, high = numbers.aminmax()
    return int(low), int(high)


def _ends_but(numbers: Tensor, ignored: int) -> tuple[int, int]:
    """Return the least and the largest of the integers other than one; 0 if there are none."""
    return _ends(numbers.long().masked_fill(numbers == ignored, 0))


def count_but(targets: Tensor, ignored: int) -> int | Tensor:
    """Return how many targets count, class numbers or chances.

    Of probabilities it is as many times more as there are classes. A tensor where it takes a look
    at a device to know.
    """
    if (told := contents_of(targets)) is not None:
        if targets.is_floating_point():
            facts = told.fact(("chances", ignored), partial(_are_chances, ignored=ignored))
            some = facts[0]
        else:
            low, high = told.fact("ends", _ends)
            some = low <= ignored <= high
        if not some:
            return targets.numel()
    counted = (targets != ignored).sum()
    return int(counted) if counted.is_cpu else counted


def _chances(outputs: Tensor, targets: Tensor, ignore_index: int, read: bool) -> Answers:
    """Return answers to chances of the one class, as binary cross-entropy takes them."""
    told = contents_of(targets)
    ignored = targets == ignore_index
    chances = targets.masked_fill(ignored, 0.0).to(outputs.dtype)
    right = (chances >= 0.0) & (chances <= 1.0)
    if told is not None:
        some, fine = told.fact(
            ("chances", ignore_index), partial(_are_chances, ignored=ignore_index)
        )
        counted, read = ~ignored if some else None, not fine
    else:
        counted = ~ignored if not read or bool(ignored.any()) else None
        if not read:
            chances = chances.masked_fill(~right, torch.nan)
    if read and not bool(right.all()):
        raise UsageError(
            "targets of a single logit must be 0, 1 or a probability between, got "
            f"{float(chances.min()):.3g} to {float(chances.max()):.3g}"
        )
    return Answers(outputs, torch.stack([1.0 - chances, chances], dim=1), counted)


def _are_chances(targets: Tensor, ignored: int) -> tuple[bool, bool]:
    """Return whether some chances are ignored, and whether all others are chances."""
    out = targets == ignored
    return bool(out.any()), bool((out | ((targets >= 0.0) & (targets <= 1.0))).all())


def _probabilities(outputs: Tensor, targets: Tensor, read: bool) -> Tensor:
    detached = targets.detach()
    if not detached.is_floating_point():
        worst = f"{detached.dtype}"
    else:
        if (told := contents_of(targets)) is not None:
            if told.fact("probabilities", _are_probabilities):
                return targets.to(outputs.dtype)
            read = True
        right, off = right_probabilities(detached)
        if not read:
            return targets.to(outputs.dtype).masked_fill(~right, torch.nan)
        if bool(right.all()):
            return targets.to(outputs.dtype)
        worst = f"sums that are off by up to {float(off.max()):.3g}"
    raise UsageError(
        "targets of the logits' shape must be probabilities that sum to 1 over dimension 1; for "
        f"several labels at once, {one_logit_each(outputs.shape[1])}, or subclass "
        f"SupervisedProblem with binary_cross_entropy_with_logits, got {worst}"
    )


def one_logit_each(labels: int) -> str:
    """Return the mend for several labels at once: each is classified by itself, by one logit."""
    return f"end the model with nn.Unflatten(1, (1, {labels})), for one logit of each label"


def _are_probabilities(targets: Tensor) -> bool:
    return bool(right_probabilities(targets)[0].all())


def right_probabilities(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return which entries are right as probabilities, and how far off their sums are."""
    # To the rounding of the targets themselves: rows of float16 do not sum to 1 in float32.
    off = (targets.double().sum(dim=1) - 1.0).abs()
    allowed = 4.0 * targets.shape[1] * torch.finfo(targets.dtype).eps + 1e-6
    return (targets >= 0.0) & (off <= allowed).unsqueeze(1), off


def look_like_probabilities(outputs: Tensor) -> bool:
    """Return whether what a model returns for a few examples at least looks like no logits.

    Logits of a single class are not told from a sigmoid's outputs, and logarithms of probabilities
    are as good as logits.
    """
    if is_stacked(outputs) or not outputs.is_floating_point() or outputs.ndim < 2:
        return False
    some = outputs.detach()[:_LOOKED_AT]
    if some.shape[1] < 2 or some.numel() < _FEWEST * some.shape[1] or float(some.min()) < 0.0:
        return False
    return _are_probabilities(some)


def example_losses(losses: Tensor, examples: int, counted: Tensor | None = None) -> ExampleLosses:
    """Return the loss of each example from the losses of its answers, shape (B, ...).

    Raises:
        UsageError: If the losses are not those of single examples.
    """
    shape = tuple(losses.shape)
    if not shape or shape[0] != examples or (counted is not None and shape != counted.shape):
        raise UsageError(
            'the loss must have an entry for each example where reduction is "none", here '
            f"{examples if counted is None else tuple(counted.shape)}, got shape {shape}"
        )
    if counted is None:
        # An example may have many answers, as a text has a next character at each place. Their
        # mean is taken first: examples are weighed, not answers.
        return ExampleLosses(losses.flatten(1).mean(dim=1) if losses.ndim > 1 else losses)
    losses = torch.where(counted, losses, 0.0)
    if losses.ndim > 1:
        losses, counted = losses.flatten(1).sum(dim=1), counted.flatten(1).sum(dim=1)
    # At least in float32: a half-precision number cannot hold the answers of a long batch. Double
    # precision stays, which PyTorch's default type would round.
    exact = torch.promote_types(losses.dtype, torch.float32)
    total = counted.sum().clamp(min=1).to(exact)
    shares = counted.to(exact) / (total / examples)
    # One over the example's count, and where all count the very factor that makes their sum a mean.
    each = examples / total / torch.where(shares > 0.0, shares, 1.0)
    return ExampleLosses(losses * each.to(losses.dtype), shares.to(losses.dtype))


_MEND = (
    "let the loader yield positions in the training split, counted from 0 (of a Subset, those "
    "within it)"
)


def as_positions(
    index: Tensor,
    examples: int,
    split: int,
    hyper: nn.Module,
    *,
    what: str = "the index of a batch",
    count: str | None = None,
    mend: str = _MEND,
) -> Tensor:
    """Return an index that gives each example's position in the training split, or its source.

    Args:
        index: As the loader gives it.
        examples: In the batch.
        split: In the training split, as the hyperparameters have been told; or of sources.
        hyper: The hyperparameters.
        what: It is, for errors.
        count: Says that there are `split`, for errors.
        mend: What to do about one that is wrong.

    Raises:
        UsageError: If it is something else.
    """
    count = count or f"there are {split} hyperparameters of examples"
    if (
        not isinstance(index, Tensor)
        or index.is_floating_point()
        or index.is_complex()
        or index.dtype is torch.bool
        or index.shape != (examples,)
    ):
        found = f"{index.dtype} of shape {tuple(index.shape)}" if isinstance(index, Tensor) else ""
        raise UsageError(
            f"{what} must be integers of shape ({examples},): {mend}; got "
            f"{found or type(index).__name__}"
        )
    told = contents_of(index)
    index = index.long()  # bytes would be a mask
    if told is None and not may_read(index, hyper):
        # Too large ones stop the kernel; negative ones would count from the end.
        return index.masked_fill(index < 0, split)
    if examples:
        low, high = _ends(index) if told is None else told.fact("ends", _ends)
        if low < 0 or high >= split:
            raise UsageError(
                f"{what} must lie in 0 to {split - 1}, for {count}: {mend}; got {low} to {high}"
            )
    return index


def require_one_example_each(index: Tensor, targets: Tensor | None) -> None:
    """Raise a `UsageError` if two examples of a batch share an index and have other targets."""
    if (
        targets is None
        or not isinstance(index, Tensor)
        or index.ndim != 1
        or len(index) != len(targets)
    ):
        return  # refused where it is used
    if (told := contents_of(index)) is not None and told.fact("distinct", _are_distinct):
        return
    order = index.argsort()
    again = index[order][1:] == index[order][:-1]
    if bool(again.any()):
        ones, others = targets[order[:-1][again]], targets[order[1:][again]]
        if not torch.equal(ones, others):
            raise UsageError(
                "two examples of a batch have one index and other targets: number the examples "
                f"of all parts of the training split, got index {int(index[order[:-1][again]][0])}"
                " twice"
            )


def _are_distinct(numbers: Tensor) -> bool:
    ordered = numbers.sort().values
    return not bool((ordered[1:] == ordered[:-1]).any())
