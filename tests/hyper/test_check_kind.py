"""`check_kind` takes what keeps the laws, and names the law that something else breaks."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from ift_tune.base.errors import CheckFailedError, UsageError
from ift_tune.base.views import Histogram, View
from ift_tune.hyper import CoarseParameter, Compose, ExampleWeights, HyperKind, L1Decay, WeightDecay
from ift_tune.hyper.base import Criterion
from ift_tune.hyper.decays import DecayPenalty
from ift_tune.implicit.vectors import Tensors
from ift_tune.testing import CheckReport
from ift_tune.testing.contracts import check_kind
from ift_tune.testing.contracts import kind as contract


class LogitScale(HyperKind):
    """A kind of one's own that is right: logits are multiplied by exp(λ)."""

    name: ClassVar[str] = "logit_scale"

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.raw = nn.Parameter(like.new_zeros(()))

    def criterion(self, loss: Criterion) -> Criterion:
        return lambda logits, targets: loss(self.raw.exp() * logits, targets)

    def summary(self) -> dict[str, float]:
        return {"scale": float(self.raw.detach().exp())}

    def coarse_space(self) -> dict[str, CoarseParameter]:
        return {"scale": CoarseParameter.near(0.1, 10.0, self.summary()["scale"])}

    @torch.no_grad()
    def set_coarse(self, values: Mapping[str, float]) -> None:
        self.raw.fill_(values["scale"]).log_()

    @classmethod
    def example(cls, model: nn.Module, inputs: Tensor) -> HyperKind:
        return cls(inputs)


class WrongPenalty(DecayPenalty):
    def mixed(self, weights: Tensors, vector: Tensors) -> list[Tensor]:
        return [2.0 * product for product in super().mixed(weights, vector)]


class NoEffect(LogitScale):
    def criterion(self, loss: Criterion) -> Criterion:
        return loss


class WrongDecay(WeightDecay):
    def penalty(self) -> DecayPenalty:
        return WrongPenalty(self)


class InSinglePrecision(LogitScale):
    @classmethod
    def example(cls, model: nn.Module, inputs: Tensor) -> HyperKind:
        return cls(inputs.float())


class TakesAWeight(LogitScale):
    @classmethod
    def example(cls, model: nn.Module, inputs: Tensor) -> HyperKind:
        kind = cls(inputs)
        kind.weight = next(model.parameters())
        return kind


class Nameless(LogitScale):
    name: ClassVar[str] = ""


class ForgetsPartOfItsState(LogitScale):
    """An offset that the loss sees and no state_dict."""

    def __init__(self, like: Tensor) -> None:
        super().__init__(like)
        self.offset = like.new_zeros(())

    def criterion(self, loss: Criterion) -> Criterion:
        return lambda logits, targets: loss((self.raw + self.offset).exp() * logits, targets)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        self.offset = self.offset + 1.0
        return super().load_state_dict(state_dict, strict, assign)


class SaysTheSameAlways(LogitScale):
    def summary(self) -> dict[str, float]:
        return {"scale": 1.0}


class IsItsOwnCopy(LogitScale):
    def __deepcopy__(self, memo: dict[int, Any]) -> IsItsOwnCopy:
        return self


class ChangesShapes(LogitScale):
    def weigh(self, losses: Tensor, index: Tensor | None) -> Tensor:
        return losses.mean()


class LeavesAHook(LogitScale):
    def __init__(self, model: nn.Module, like: Tensor) -> None:
        super().__init__(like)
        self._model = [model]

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        handle = self._model[0].register_forward_hook(lambda *_: None)
        yield
        handle.remove()  # not where an exception passes

    @classmethod
    def example(cls, model: nn.Module, inputs: Tensor) -> HyperKind:
        return cls(model, inputs)


class ClaimsAClosedForm(L1Decay):
    def weigh(self, losses: Tensor, index: Tensor | None) -> Tensor:
        scale: Tensor = self.raw[0].exp().mean()
        return losses * scale


class DrawsFromItsOwnGenerator(LogitScale):
    def __init__(self, like: Tensor) -> None:
        super().__init__(like)
        self.seed = 0

    def inputs(self, inputs: Tensor, index: Tensor | None) -> Tensor:
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        return inputs + torch.randn(inputs.shape, generator=generator, dtype=inputs.dtype)


class HasNoNumbers(LogitScale):
    def summary(self) -> dict[str, float]:
        return {"scale": float("nan") * float(self.raw.detach())}


class SpeaksInSentences(LogitScale):
    def words(self) -> str:
        return "Logits are scaled."


class ShowsInfinity(LogitScale):
    def views(self) -> list[View]:
        return [Histogram("scales", {"all": torch.tensor([float("inf")])})]


class DrawsToShow(LogitScale):
    def words(self) -> str:
        return f"about {float(torch.rand(())):.1f}"


class StartsOutside(LogitScale):
    def coarse_space(self) -> dict[str, CoarseParameter]:
        return {"scale": CoarseParameter(2.0, 10.0, self.summary()["scale"])}


class SetsSomethingElse(LogitScale):
    @torch.no_grad()
    def set_coarse(self, values: Mapping[str, float]) -> None:
        self.raw.fill_(values["scale"])


class DependsOnBefore(LogitScale):
    @torch.no_grad()
    def set_coarse(self, values: Mapping[str, float]) -> None:
        super().set_coarse(values)
        self.raw.mul_(1.0 + 1e-9 * self.calls)
        self.calls += 1

    calls = 0


class PutsAnotherTensor(LogitScale):
    def set_coarse(self, values: Mapping[str, float]) -> None:
        self.raw = nn.Parameter(self.raw.new_tensor(values["scale"]).log())


class SetsWithoutASpace(ExampleWeights):
    @torch.no_grad()
    def set_coarse(self, values: Mapping[str, float]) -> None:
        self.raw.zero_()


class Fails(LogitScale):
    def criterion(self, loss: Criterion) -> Criterion:
        raise KeyError("logits")


def test_a_kind_of_ones_own_passes_and_random_numbers_go_on() -> None:
    before = torch.get_rng_state()
    check_kind(LogitScale)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("kind", "law", "what"),
    [
        (Nameless, "declares itself", "its name is ''"),
        (InSinglePrecision, "declares itself", "λ is torch.float32 on cpu, and the model"),
        (TakesAWeight, "declares itself", "1 tensors are both weights and hyperparameters"),
        (WrongDecay, "hypergradient is right", "FAIL closed-form penalty, mixed product"),
        (NoEffect, "hypergradient is right", "kind.raw: the gradient of the train"),
        (ForgetsPartOfItsState, "state_dict holds its state", "with equal λ"),
        (SaysTheSameAlways, "state_dict holds its state", "does not tell one λ from another"),
        (IsItsOwnCopy, "copies are independent", "what changes a copy changes the kind"),
        (ChangesShapes, "hooks keep shapes", "weigh() makes"),
        (LeavesAHook, "hooks leave nothing behind", "traces in the model after an exception"),
        (ClaimsAClosedForm, "closed_form", "λ acts in the training loss itself"),
        (DrawsFromItsOwnGenerator, "global generator", "from the same torch.manual_seed"),
        (HasNoNumbers, "finite and detached", "summary() gives 'scale': nan"),
        (SpeaksInSentences, "finite and detached", "'Logits are scaled.', not a line"),
        (ShowsInfinity, "finite and detached", "the picture 'scales' are not all finite"),
        (DrawsToShow, "finite and detached", "draws numbers"),
        (StartsOutside, "coarse space is consistent", "starts outside its range"),
        (SetsSomethingElse, "coarse space is consistent", "set to scale="),
        (DependsOnBefore, "coarse space is consistent", "depends on the λ of before"),
        (PutsAnotherTensor, "coarse space is consistent", "replaces the tensors of λ"),
        (SetsWithoutASpace, "coarse space is consistent", "there is no coarse space"),
        (Fails, "its hypergradient is right", "raises KeyError: 'logits'"),
    ],
)
def test_a_broken_law_is_named(
    kind: type[HyperKind], law: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "hypergradient" not in law:  # the dearest law, which most of these keep
        monkeypatch.setattr(contract, "check_hypergradient", lambda *_, **__: CheckReport())
    with pytest.raises(CheckFailedError, match=f"^{kind.__name__} ") as caught:
        check_kind(kind)
    message = str(caught.value)
    assert law in message
    assert what in message


def test_all_broken_laws_are_listed_at_once() -> None:
    class Both(StartsOutside, SpeaksInSentences):
        pass

    with pytest.raises(CheckFailedError) as caught:
        check_kind(Both)
    assert len(re.findall("^  - ", str(caught.value), re.MULTILINE)) == 2


def _regression() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1), nn.Flatten(0))
    return model, (torch.randn(6, 3), torch.randn(6))


@pytest.mark.parametrize(
    "make",
    [
        lambda model: WeightDecay(model, "channel", init=0.05, transform="exp"),
        lambda model: Compose({"a": ExampleWeights(6), "b": WeightDecay(model, init=0.05)}),
    ],
)
def test_an_instance_is_checked_in_its_model_and_left_alone(
    make: Callable[[nn.Module], HyperKind],
) -> None:
    model, batch = _regression()
    kind = make(model)
    before = [p.detach().clone() for p in (*model.parameters(), *kind.parameters())]
    check_kind(kind, model=model, batch=batch)
    after = [*model.parameters(), *kind.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_broken_instance_is_named_too() -> None:
    model, batch = _regression()
    with pytest.raises(CheckFailedError, match="WrongDecay breaks"):
        check_kind(WrongDecay(model, init=0.05), model=model, batch=batch)


def test_an_instance_without_its_model_is_refused() -> None:
    with pytest.raises(UsageError, match="give check_kind its model and a batch"):
        check_kind(ExampleWeights(3))


def test_a_class_without_an_example_says_so() -> None:
    with pytest.raises(UsageError, match="take their examples"):
        check_kind(Compose)


class WithoutExample(HyperKind):
    """As users write one: hooks and a summary."""

    name: ClassVar[str] = "temperature"

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.raw = nn.Parameter(like.new_zeros(()))

    def criterion(self, loss: Criterion) -> Criterion:
        return lambda logits, targets: loss(logits / self.raw.exp(), targets)

    def summary(self) -> dict[str, float]:
        return {"value": float(self.raw.detach().exp())}


def test_a_kind_needs_no_example_to_be_checked() -> None:
    check_kind(lambda model, inputs: WithoutExample(inputs))
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    batch = torch.randn(6, 2).double(), torch.arange(6) % 2
    check_kind(WithoutExample(batch[0]), model=model, batch=batch)
    with pytest.raises(UsageError, match=r"WithoutExample has no example: give .* a function"):
        check_kind(WithoutExample)


@pytest.mark.parametrize("wrong", [nn.Linear, "temperature", None, 3])
def test_what_makes_no_kind_is_refused(wrong: Any) -> None:
    with pytest.raises(UsageError, match="takes a HyperKind, its class, or a function"):
        check_kind(wrong)


def test_a_function_that_makes_something_else_is_named() -> None:
    with pytest.raises(UsageError, match="a function that makes a kind"):
        check_kind(lambda model, inputs: nn.Linear(1, 1))  # type: ignore[arg-type, return-value]
