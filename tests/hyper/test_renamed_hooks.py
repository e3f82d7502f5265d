"""Kinds from before `knobs` and `turn` were named `coarse_space` and `set_coarse` go on working."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ift_tune.hyper import CoarseParameter, Compose, HyperKind, WeightDecay


def model() -> nn.Linear:
    return nn.Linear(2, 2)


def make_old_kind() -> type[Any]:
    class OldKind(HyperKind):
        name = "old"

        def __init__(self) -> None:
            super().__init__()
            self.raw = nn.Parameter(torch.zeros(()))

        def summary(self) -> dict[str, float]:
            return {"value": float(self.raw.detach().exp())}

        def knobs(self) -> dict[str, CoarseParameter]:
            inherited: dict[str, CoarseParameter] = super().knobs()
            return inherited | {"value": CoarseParameter(0.1, 10.0, 1.0)}

        def turn(self, values: Mapping[str, float]) -> None:
            super().turn(values)
            self.raw.data.fill_(values["value"]).log_()

        @classmethod
        def example(cls, model: nn.Module, inputs: Tensor) -> HyperKind:
            return cls()

    return OldKind


@pytest.fixture
def old_kind() -> type[Any]:
    with pytest.warns(DeprecationWarning, match="rename it") as caught:
        kind = make_old_kind()
    assert [str(warning.message) for warning in caught] == [
        "OldKind.knobs is now coarse_space: rename it",
        "OldKind.turn is now set_coarse: rename it",
    ]
    assert {warning.filename for warning in caught} == {__file__}  # where the class is written
    return kind


def test_old_names_are_answered_with_a_warning() -> None:
    decay = WeightDecay(model(), "model")
    with pytest.warns(
        DeprecationWarning, match=r"WeightDecay\.knobs is now coarse_space"
    ) as caught:
        assert decay.knobs() == decay.coarse_space()
    assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match=r"WeightDecay\.turn is now set_coarse"):
        decay.turn({"decay": 0.25})
    assert decay.summary()["mean"] == pytest.approx(0.25)


@pytest.mark.filterwarnings("ignore:.* is now:DeprecationWarning")
def test_a_kind_with_old_names_is_set_by_the_new_ones(old_kind: type[Any]) -> None:
    both = Compose({"old": old_kind(), "decay": WeightDecay(model(), "model")})
    assert set(both.coarse_space()) == {"old.value", "decay.decay"}
    both.set_coarse({"old.value": 4.0, "decay.decay": 0.5})
    assert both.summary()["old.value"] == pytest.approx(4.0)
    kind = old_kind()
    with pytest.warns(DeprecationWarning, match=r"OldKind\.knobs is now coarse_space"):
        assert kind.knobs() == kind.coarse_space()


@pytest.mark.filterwarnings("ignore:.* is now:DeprecationWarning")
def test_subclasses_of_it_need_nothing(old_kind: type[Any]) -> None:
    class Child(old_kind):  # type: ignore[misc]
        pass

    child = Child()
    child.set_coarse({"value": 2.0})
    assert child.summary()["value"] == pytest.approx(2.0)
    assert set(child.coarse_space()) == {"value"}


def test_old_names_in_a_subclass_of_a_built_in_kind_count() -> None:
    with pytest.warns(DeprecationWarning, match=r"Wide\.knobs is now coarse_space"):

        class Wide(WeightDecay):
            def knobs(self) -> dict[str, CoarseParameter]:
                with pytest.warns(DeprecationWarning, match="coarse_space"):
                    found: dict[str, CoarseParameter] = super().knobs()
                return found | {"decay": CoarseParameter(1e-9, 1e9, 1.0)}

    assert Wide(model(), "model").coarse_space() == {"decay": CoarseParameter(1e-9, 1e9, 1.0)}


def test_old_names_in_a_mixin_count() -> None:
    class Mixin:
        def knobs(self) -> dict[str, CoarseParameter]:
            return {}

    with pytest.warns(DeprecationWarning, match=r"Mixed\.knobs is now coarse_space"):

        class Mixed(Mixin, WeightDecay):
            pass

    assert Mixed(model(), "model").coarse_space() == {}


def test_new_kinds_may_use_the_old_names_for_something_else() -> None:
    class Turning(WeightDecay):
        def set_coarse(self, values: Mapping[str, float]) -> None:
            super().set_coarse(values)

        def turn(self) -> str:
            return "by ninety degrees"

    assert Turning(model()).turn() == "by ninety degrees"
