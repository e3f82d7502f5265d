"""What the studies compare is made of the registry: a new inverse needs no line of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

from ift_tune.base.errors import UsageError
from ift_tune.implicit.inverse import INVERSES, ConjugateGradient, Inverse, Neumann
from ift_tune.report.studies import METHOD_STYLES, method_styles
from ift_tune.studies.methods import METHODS, all_methods, least_steps, with_steps

STEPPED = [kind for kind in INVERSES.values() if kind.steps_field is not None]


def test_the_methods_of_the_published_tables_are_among_them() -> None:
    published = [
        ("identity", 0, 0, False),
        ("neumann", 0, None, False),
        ("conjugate_gradient", 1, None, False),
        ("nystrom", 1, None, False),
        ("neumann, gauss_newton", 0, None, True),
        ("conjugate_gradient, gauss_newton", 1, None, True),
    ]
    found = [(m.name, m.least, m.most, m.gauss_newton) for m in METHODS]
    assert [method for method in found if method in published] == published
    made = {m.name: m.make(7) for m in METHODS}
    assert made["neumann, gauss_newton"] == made["neumann"] == Neumann(terms=7)
    # A tolerance that stops a solve only where float64 holds nothing more.
    assert made["conjugate_gradient"] == ConjugateGradient(max_steps=7, tolerance=1e-14)


@pytest.mark.parametrize("kind", STEPPED)
def test_the_number_of_steps_is_that_of_products(kind: type[Inverse]) -> None:
    least = least_steps(kind)
    bounds = [with_steps(kind, k).max_hvps(1000, previous=False) for k in (least, 5, 6)]
    assert bounds[2] - bounds[1] == 1
    assert bounds[1] - bounds[0] == 5 - least
    with pytest.raises(UsageError):
        with_steps(kind, least - 1)


def test_a_new_inverse_is_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Slow(ConjugateGradient):
        name: ClassVar[str] = "slow"

    monkeypatch.setitem(INVERSES, "slow", Slow)
    new = {m.name: m for m in all_methods() if m.name.startswith("slow")}
    assert [*new] == ["slow", "slow, gauss_newton"]
    assert new["slow"].make(3) == Slow(max_steps=3, tolerance=1e-14)
    assert new["slow"].among([0, 1, 5]) == [1, 5]


def test_new_methods_are_told_apart_by_colour_and_by_mark() -> None:
    names = ["neumann", "slow", "slow, gauss_newton", "third"]
    styles = method_styles(names)
    assert all(styles[name] == style for name, style in METHOD_STYLES.items())
    for key in ("color", "marker"):
        assert len({styles[name][key] for name in [*METHOD_STYLES, *names]}) == len(
            {*METHOD_STYLES, *names}
        )
