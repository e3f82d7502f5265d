"""The space of meta-hyperparameters: what it refuses, and that all its forms agree."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from typing import Any

import optuna
import pytest

from ift_tune import MetaConfig, UsageError
from ift_tune.search.space import Choice, Float, Int, MetaSpace, parse_value

MIXED = MetaSpace(
    {
        "terms": Int(1, 9, log=True),
        "alpha": Float(1e-3, 1.0, log=True),
        "meta_lr": Float(0.0, 0.5),
        "inner_optimizer": Choice(("adam", "sgd")),
        "warm_start": Choice((True, False)),
    }
)


def in_memory_study(seed: int = 0) -> optuna.Study:
    return optuna.create_study(
        sampler=optuna.samplers.RandomSampler(seed=seed), pruner=optuna.pruners.NopPruner()
    )


def test_the_default_space_covers_the_four_meta_hyperparameters() -> None:
    space = MetaSpace.default()
    assert set(space.distributions) == {"terms", "alpha_scale", "meta_lr", "inner_steps"}
    space.check(MetaConfig())


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("terms", "0:20", Int(0, 20)),
        ("inner_steps", "5:50:log", Int(5, 50, log=True)),
        ("alpha", "0.001:1:log", Float(0.001, 1.0, log=True)),
        ("alpha", "1e-3:1e-1", Float(0.001, 0.1)),
        ("inverse", "identity,neumann", Choice(("identity", "neumann"))),
        ("warm_start", "true,false", Choice((True, False))),
        ("terms", "1,3,10", Choice((1, 3, 10))),
        ("alpha", "auto,0.5", Choice(("auto", 0.5))),
        ("terms", "0:20:5", Int(0, 20, step=5)),
        ("user.width", "16:70:16", Int(16, 64, step=16)),
        ("alpha", "0.1:0.5:0.1", Float(0.1, 0.5, step=0.1)),
    ],
)
def test_parse(key: str, text: str, expected: Int | Float | Choice) -> None:
    assert MetaSpace.parse({key: text}) == MetaSpace({key: expected})


@pytest.mark.parametrize(
    "text", ["", "0.1", "a:b", "0.1:", ":1", "0.1:1:lin", "0.1:1:log:2", "0.1-1", "1:0.1"]
)
def test_parse_refuses_what_is_no_range(text: str) -> None:
    with pytest.raises(UsageError, match=r"alpha=|low <= high"):
        MetaSpace.parse({"alpha": text})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MetaSpace({}), "nothing to search"),
        (lambda: MetaSpace({"alhpa": Float(0.1, 1.0)}), "did you mean 'alpha'"),
        (lambda: MetaSpace.parse({"tems": "1:2"}), "did you mean 'terms'"),
        (
            lambda: MetaSpace({"alpha": Float(0.1, 1.0), "alpha_scale": Float(0.1, 1.0)}),
            "not both",
        ),
        (lambda: Int(3, 2), "low <= high"),
        (lambda: Float(1.0, 0.5), "low <= high"),
        (lambda: Float(float("nan"), 1.0), "low <= high"),
        (lambda: Int(0, 5, log=True), "above 0"),
        (lambda: Float(0.0, 5.0, log=True), "above 0"),
        (lambda: Choice(()), "at least one"),
        (
            lambda: MetaSpace({"inner_steps": Float(1.0, 10.5)}),
            r"inner_steps takes integers: vary it by Int\(1, 10\)",
        ),
    ],
)
def test_what_means_nothing_is_refused_when_built(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build()


@pytest.mark.parametrize("seed", range(5))
def test_suggest_draws_the_same_point_that_fixed_distributions_ask(seed: int) -> None:
    asked = in_memory_study(seed).ask(fixed_distributions=MIXED.to_optuna())
    suggested = in_memory_study(seed).ask()
    assert MIXED.suggest(suggested) == asked.params
    assert suggested.distributions == asked.distributions == MIXED.to_optuna()
    assert MIXED.suggest(asked) == asked.params


def test_a_fixed_trial_gives_its_point_back() -> None:
    point: dict[str, Any] = {
        "terms": 9,
        "alpha": 0.001,
        "meta_lr": 0.5,
        "inner_optimizer": "sgd",
        "warm_start": False,
    }
    suggested = MIXED.suggest(optuna.trial.FixedTrial(point))
    assert suggested == point
    assert {k: type(v) for k, v in suggested.items()} == {k: type(v) for k, v in point.items()}


def test_every_point_of_the_default_space_is_a_configuration() -> None:
    study = in_memory_study()
    points = [MetaSpace.default().suggest(study.ask()) for _ in range(30)]
    assert [MetaConfig().updated(p).to_flat() | p for p in points] == [
        MetaConfig().updated(p).to_flat() for p in points
    ]
    assert len({p["alpha_scale"] for p in points}) == 30


def test_json_form_tells_spaces_apart() -> None:
    spaces = [
        MetaSpace({"terms": Int(0, 3)}),
        MetaSpace({"terms": Int(0, 4)}),
        MetaSpace({"terms": Choice((0, 3))}),
        MetaSpace({"alpha": Float(1.0, 3.0)}),
        MetaSpace({"alpha": Float(1.0, 3.0, log=True)}),
        MIXED,
    ]
    assert len({json.dumps(space.to_json()) for space in spaces}) == len(spaces)


def test_a_space_travels() -> None:
    assert pickle.loads(pickle.dumps(MIXED)) == MIXED


@pytest.mark.parametrize(
    "space",
    [
        pytest.param(MetaSpace({"alpha": Float(0.0, 1.0)}), id="low-end"),
        pytest.param(MetaSpace({"alpha_scale": Float(0.1, 2.5)}), id="high-end"),
        pytest.param(MetaSpace({"terms": Int(-1, 4)}), id="negative-terms"),
        pytest.param(MetaSpace({"inner_optimizer": Choice(("adamm", "sgd"))}), id="first-option"),
        pytest.param(MetaSpace({"inner_optimizer": Choice(("sgd", "adamm"))}), id="last-option"),
        pytest.param(
            MetaSpace(
                {
                    "warm_start": Choice((False, True)),
                    "inverse": Choice(("neumann", "identity")),
                }
            ),
            id="only-the-last-options-together",
        ),
    ],
)
def test_check_finds_the_point_that_is_no_configuration(space: MetaSpace) -> None:
    with pytest.raises(UsageError):
        space.check(MetaConfig())


def test_check_looks_at_the_configuration_that_is_changed() -> None:
    space = MetaSpace({"damping": Float(0.0, 1.0)})
    space.check(MetaConfig().updated({"inverse": "conjugate_gradient"}))
    with pytest.raises(UsageError, match="belongs to the inverse"):
        space.check(MetaConfig())


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("-1", -1), ("1e-3", 0.001), ("true", True), ("False", False), ("adam", "adam")],
)
def test_parse_value(text: str, value: object) -> None:
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_keys_that_the_drawn_inverse_does_not_have_are_left_out() -> None:
    space = MetaSpace({"terms": Int(1, 5), "inverse": Choice(("neumann", "identity"))})
    space.check(MetaConfig())
    drawn = [space.suggest(optuna.create_study().ask()) for _ in range(20)]
    assert {point["inverse"] for point in drawn} == {"neumann", "identity"}
    for point in drawn:
        assert ("terms" in point) == (point["inverse"] == "neumann")
        assert MetaConfig().updated(point).inverse.name == point["inverse"]


MANY_INVERSES = MetaSpace(
    {
        "terms": Int(1, 5),
        "damping": Float(0.1, 1.0),
        "meta_lr": Float(0.01, 0.1),
        "inverse": Choice(("neumann", "identity", "conjugate_gradient")),
    }
)


@pytest.mark.parametrize(
    ("inverse", "kept"),
    [
        ("neumann", {"terms"}),
        ("conjugate_gradient", {"damping"}),
        ("identity", set()),
    ],
)
def test_keys_that_the_inverse_beside_them_does_not_have_are_not_applicable(
    inverse: str, kept: set[str]
) -> None:
    drawn = {"terms": 3, "damping": 0.5, "meta_lr": 0.05, "inverse": inverse}
    point = MANY_INVERSES.applicable(drawn)
    assert point == {key: drawn[key] for key in {"inverse", "meta_lr"} | kept}
    assert len(drawn) == 4  # the values drawn are left as they were
    assert MetaConfig().updated(point).inverse.name == inverse


def test_without_a_choice_of_inverses_every_key_is_applicable() -> None:
    space = MetaSpace({"terms": Int(1, 5), "meta_lr": Float(0.01, 0.1)})
    assert space.applicable({"terms": 3, "meta_lr": 0.05}) == {"terms": 3, "meta_lr": 0.05}
    assert space.applicable({"meta_lr": 0.05}) == {"meta_lr": 0.05}


def test_a_key_that_is_not_of_the_space_is_kept_and_refused_by_name() -> None:
    drawn = {"inverse": "identity", "terms": 3, "alpha": 0.5}
    point = MANY_INVERSES.applicable(drawn)
    assert point == {"inverse": "identity", "alpha": 0.5}
    with pytest.raises(UsageError, match="alpha"):
        MetaConfig().updated(point)


@pytest.mark.parametrize(
    ("value", "moved"),
    [
        ({"terms": 0}, {"terms": 1}),
        ({"terms": 7.2}, {"terms": 5}),
        ({"terms": 3.6}, {"terms": 4}),
        ({"terms": 3.0}, {"terms": 3}),
        ({"damping": 0.05}, {"damping": 0.1}),
        ({"damping": 2}, {"damping": 1.0}),
        ({"damping": 0.3, "meta_lr": 0.5}, {"damping": 0.3, "meta_lr": 0.1}),
        ({"inverse": "identity"}, {"inverse": "identity"}),
        ({"inverse": "unknown", "lr": 99.0}, {"inverse": "unknown", "lr": 99.0}),
        ({}, {}),
    ],
)
def test_clipped_moves_ranges_to_their_nearest_end_and_nothing_else(
    value: dict[str, Any], moved: dict[str, Any]
) -> None:
    before = dict(value)
    clipped = MANY_INVERSES.clipped(value)
    assert clipped == moved
    assert {k: type(v) for k, v in clipped.items()} == {k: type(v) for k, v in moved.items()}
    assert value == before


def test_a_clipped_point_is_a_configuration() -> None:
    mutated = {"inverse": "neumann", "terms": 40.0, "damping": 0.0, "meta_lr": 12.0}
    config = MetaConfig().updated(MANY_INVERSES.applicable(MANY_INVERSES.clipped(mutated)))
    assert (config.meta_lr, config.to_flat()["terms"]) == (0.1, 5)
