"""What the outer search tunes: objects inside, flat at the edges, nonsense refused when built."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from dataclasses import dataclass
from typing import Any, get_type_hints

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ift_tune import Budget, MetaConfig, UsageError
from ift_tune.implicit.inverse import INVERSES, ConjugateGradient, Dense, Identity, Neumann, Nystrom
from ift_tune.implicit.preconditioner import (
    PRECONDITIONERS,
    DiagonalPreconditioner,
    NoPreconditioner,
)
from ift_tune.joint.config import OPTIMIZERS

_positive = st.floats(1e-6, 1e3)
EXAMPLES = [example for kind in INVERSES.values() for example in kind.examples()]


@st.composite
def _configs(draw: st.DrawFn) -> MetaConfig:
    inverse = draw(st.sampled_from(EXAMPLES))
    return MetaConfig(
        inverse=inverse,
        meta_lr=draw(_positive),
        meta_optimizer=draw(st.sampled_from(OPTIMIZERS)),
        inner_steps=draw(st.integers(1, 1000)),
        inner_lr=draw(_positive),
        inner_optimizer=draw(st.sampled_from(OPTIMIZERS)),
        warm_start=inverse.refines and draw(st.booleans()),
        curvature=draw(st.sampled_from(["hessian", "gauss_newton"])),
    )


@given(_configs())
def test_flat_and_back_is_the_same_config(config: MetaConfig) -> None:
    flat = config.to_flat()
    assert MetaConfig.from_flat(flat) == config
    assert MetaConfig.from_flat(json.loads(json.dumps(flat))) == config
    assert set(flat) <= set(MetaConfig.flat_keys())
    assert None not in flat.values()


@given(_configs())
def test_numpy_scalars_and_a_tables_gaps_give_the_same_config(config: MetaConfig) -> None:
    row: dict[str, Any] = dict.fromkeys(MetaConfig.flat_keys())
    row |= {k: math.nan for k in row if k in ("sketch_seed", "max_weights")}
    row |= {k: np.asarray(v)[()] for k, v in config.to_flat().items()}
    assert MetaConfig.from_flat(row) == config


@given(_configs())
def test_whole_floats_are_integers_where_the_field_is_one(config: MetaConfig) -> None:
    flat = config.to_flat()
    as_floats = {
        k: float(v) if isinstance(v, int) and not isinstance(v, bool) else v
        for k, v in flat.items()
    }
    again = MetaConfig.from_flat(as_floats).to_flat()
    assert again == flat
    assert type(again["inner_steps"]) is int


@given(_configs())
def test_configs_are_frozen_and_travel_by_pickle(config: MetaConfig) -> None:
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.meta_lr = 1.0  # type: ignore[misc]
    assert hash(config) == hash(MetaConfig.from_flat(config.to_flat()))


@pytest.mark.parametrize(
    ("kind", "keyword", "text"),
    [
        (MetaConfig, "inner_step", "in MetaConfig; did you mean 'inner_steps'"),
        (MetaConfig, "terms", r"write inverse=Neumann\(terms=\.\.\.\)"),
        (MetaConfig, "probes", r"write preconditioner=DiagonalPreconditioner\(probes="),
        (Budget, "step", "there is no 'step' in Budget"),
        (Neumann, "term", "in Neumann; did you mean 'terms'"),
        (Nystrom, "ranks", "in Nystrom; did you mean 'rank'"),
        (DiagonalPreconditioner, "probe", "did you mean 'probes'"),
    ],
)
def test_an_unknown_keyword_is_refused_with_the_place_it_has(
    kind: type, keyword: str, text: str
) -> None:
    with pytest.raises(UsageError, match=text):
        kind(**{keyword: 3})


def test_names_of_fields_that_the_flat_form_could_not_tell_apart_are_refused() -> None:
    @dataclass(frozen=True)
    class Clashing(Identity):
        inner_steps: int = 3

    @dataclass(frozen=True)
    class Scaling(NoPreconditioner):
        tolerance: float = 0.1

    with pytest.raises(UsageError, match="Clashing and MetaConfig both have a field 'inner_steps'"):
        MetaConfig(inverse=Clashing(), inner_steps=7)
    with pytest.raises(UsageError, match="Scaling and Neumann both have a field 'tolerance'"):
        MetaConfig(inverse=Neumann(preconditioner=Scaling()))


def test_no_names_of_fields_clash_in_the_package() -> None:
    for kind in INVERSES.values():
        MetaConfig(inverse=kind())
        for inner in PRECONDITIONERS.values() if hasattr(kind(), "preconditioner") else ():
            MetaConfig.from_flat({"inverse": kind.name, "preconditioner": inner.name})


def test_a_preconditioner_is_a_choice_inside_the_inverse() -> None:
    inverse = ConjugateGradient(preconditioner=DiagonalPreconditioner(probes=4))
    flat = MetaConfig(inverse=inverse).to_flat()
    assert (flat["preconditioner"], flat["probes"]) == ("diagonal", 4)
    assert MetaConfig.from_flat(flat).inverse == inverse
    default = MetaConfig.from_flat({"preconditioner": "diagonal"})
    assert default.inverse == Neumann(preconditioner=DiagonalPreconditioner())


def test_no_preconditioner_leaves_no_trace_in_tables() -> None:
    """Configurations of runs from before there was one are read, and compared, as they were."""
    assert not MetaConfig().to_flat().keys() & {"preconditioner", "probes"}
    assert MetaConfig.from_flat({"preconditioner": "none"}) == MetaConfig()


def test_updating_chooses_and_changes_preconditioners() -> None:
    chosen = MetaConfig().updated({"preconditioner": "diagonal", "probes": 3})
    assert chosen.inverse == Neumann(preconditioner=DiagonalPreconditioner(3))
    assert chosen.updated({"terms": 2}).inverse == Neumann(
        terms=2, preconditioner=DiagonalPreconditioner(3)
    )
    assert chosen.updated({"preconditioner": "none"}) == MetaConfig()
    other = chosen.updated({"inverse": "conjugate_gradient"})
    assert other.inverse == ConjugateGradient()


@pytest.mark.parametrize(
    ("flat", "text"),
    [
        (
            {"preconditioner": "diagnal"},
            "unknown preconditioner 'diagnal'; did you mean 'diagonal'",
        ),
        ({"probes": 2}, "probes belongs to the preconditioner diagonal, not none: set precond"),
        ({"preconditioner": "none", "probes": 2}, "not none: set preconditioner too"),
        ({"inverse": "identity", "preconditioner": "diagonal"}, "to the inverse neumann or conj"),
        ({"inverse": "dense", "probes": 1}, "probes belongs to the preconditioner diagonal"),
        ({"preconditioner": "diagonal", "probes": -1}, "probes must be an integer of at least 0"),
    ],
)
def test_a_wrong_preconditioner_is_refused(flat: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        MetaConfig.from_flat(flat)


@pytest.mark.parametrize(
    ("key", "point", "applies"),
    [
        ("meta_lr", {"inverse": "dense"}, True),
        ("terms", {}, True),
        ("terms", {"inverse": "neumann"}, True),
        ("terms", {"inverse": "dense"}, False),
        ("preconditioner", {"inverse": "dense"}, False),
        ("probes", {"inverse": "neumann"}, True),
        ("probes", {"preconditioner": "diagonal"}, True),
        ("probes", {"preconditioner": "none"}, False),
        ("probes", {"inverse": "dense", "preconditioner": "diagonal"}, False),
    ],
)
def test_a_key_applies_where_what_is_chosen_has_it(
    key: str, point: dict[str, Any], applies: bool
) -> None:
    assert MetaConfig.applies(key, point) is applies


def test_whoever_can_refine_is_named_where_a_warm_start_is_asked_of_another() -> None:
    with pytest.raises(UsageError) as caught:
        MetaConfig(inverse=Identity(), warm_start=True)
    named = str(caught.value).partition("use ")[2]
    assert {name for name in INVERSES if name in named} == {
        name for name, kind in INVERSES.items() if kind.refines
    }


@pytest.mark.parametrize("name", sorted(INVERSES))
def test_the_defaults_of_every_inverse_survive(name: str) -> None:
    config = MetaConfig.from_flat({"inverse": name})
    assert config == MetaConfig(inverse=INVERSES[name]())
    assert MetaConfig.from_flat(config.to_flat()) == config


def test_an_empty_mapping_is_the_default() -> None:
    assert MetaConfig.from_flat({}) == MetaConfig()


@pytest.mark.parametrize("missing", [None, math.nan, np.float64("nan"), np.float32("nan")])
def test_none_and_nan_count_as_missing(missing: Any) -> None:
    flat = {"inverse": "neumann", "terms": missing, "meta_lr": missing, "inverse_of": None}
    assert MetaConfig.from_flat(flat) == MetaConfig()
    assert MetaConfig(meta_lr=0.5).updated({"meta_lr": missing}) == MetaConfig(meta_lr=0.5)


@pytest.mark.parametrize(
    ("key", "right"),
    [("inner_step", "inner_steps"), ("term", "terms"), ("metalr", "meta_lr")],
)
def test_an_unknown_key_is_refused_with_the_nearest_right_one(key: str, right: str) -> None:
    with pytest.raises(UsageError, match=rf"{key} .*did you mean '{right}'"):
        MetaConfig.from_flat({key: 1})


@pytest.mark.parametrize(
    ("flat", "words"),
    [
        ({"inverse": "neumann", "max_steps": 3}, ["max_steps", "conjugate_gradient", "neumann"]),
        ({"rank": 3}, ["rank", "nystrom", "neumann"]),
        ({"inverse": "identity", "damping": 1.0}, ["damping", "nystrom", "dense", "identity"]),
    ],
)
def test_a_key_of_another_inverse_names_its_owners(flat: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        MetaConfig.from_flat(flat)
    assert all(word in str(caught.value) for word in words)


def test_an_unknown_inverse_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'nystrom'"):
        MetaConfig.from_flat({"inverse": "nystrm"})


@pytest.mark.parametrize("field", ["meta_lr", "inner_lr"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan, "0.1", True, None])
def test_a_bad_learning_rate_is_refused(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=field):
        MetaConfig(**{field: value})


@pytest.mark.parametrize("value", [0, -1, 2.5, np.float32(2.5), math.inf, True, "3", None])
def test_a_bad_number_of_inner_steps_is_refused(value: Any) -> None:
    with pytest.raises(UsageError, match="inner_steps"):
        MetaConfig(inner_steps=value)


@pytest.mark.parametrize("field", ["meta_optimizer", "inner_optimizer"])
@pytest.mark.parametrize("value", ["adm", "", "AdamW", 3, None])
def test_an_unknown_optimiser_is_refused(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=field):
        MetaConfig(**{field: value})


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"inverse": "neumann"}, "inverse"),
        ({"inverse": Neumann}, "inverse"),
        ({"warm_start": 1}, "warm_start"),
        ({"warm_start": "yes"}, "warm_start"),
        ({"inverse": Identity(), "warm_start": True}, "warm_start"),
        ({"inverse": Nystrom(), "warm_start": True}, "warm_start"),
        ({"curvature": "fisher"}, "curvature"),
        ({"curvature": None}, "curvature"),
    ],
)
def test_other_bad_values_are_refused(values: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        MetaConfig(**values)


@pytest.mark.parametrize("name", sorted(INVERSES))
def test_every_setting_of_every_inverse_refuses_nonsense(name: str) -> None:
    for field in dataclasses.fields(INVERSES[name]):
        for nonsense in ("many", -1, True):
            with pytest.raises(UsageError, match=field.name):
                MetaConfig.from_flat({"inverse": name, field.name: nonsense})


def test_a_fraction_is_no_integer() -> None:
    for key in ("inner_steps", "terms"):
        with pytest.raises(UsageError, match=key):
            MetaConfig.from_flat({key: 2.5})


@given(_configs())
def test_updating_with_nothing_changes_nothing(config: MetaConfig) -> None:
    assert config.updated({}) == config
    assert config.updated(config.to_flat()) == config


def test_updating_changes_what_is_named_only() -> None:
    config = MetaConfig(inverse=Neumann(terms=7), meta_lr=0.5)
    changed = config.updated({"inner_steps": 3, "terms": 2})
    assert changed == MetaConfig(inverse=Neumann(terms=2), meta_lr=0.5, inner_steps=3)
    assert config == MetaConfig(inverse=Neumann(terms=7), meta_lr=0.5)


def test_another_inverse_starts_from_its_own_defaults() -> None:
    config = MetaConfig(inverse=ConjugateGradient(damping=3.0), meta_lr=0.5)
    assert config.updated({"inverse": "dense"}) == MetaConfig(inverse=Dense(), meta_lr=0.5)
    kept = config.updated({"inverse": "conjugate_gradient", "max_steps": 4})
    assert kept.inverse == ConjugateGradient(max_steps=4, damping=3.0)


def test_of_alpha_and_alpha_scale_a_change_of_one_drops_the_other() -> None:
    scaled = MetaConfig(inverse=Neumann(alpha_scale=1.5))
    fixed = MetaConfig(inverse=Neumann(alpha=0.1))
    assert scaled.updated({"alpha": 0.1}) == fixed
    assert fixed.updated({"alpha_scale": 1.5}) == scaled
    assert fixed.updated({"alpha": "auto"}) == MetaConfig()
    with pytest.raises(UsageError, match="not both"):
        fixed.updated({"alpha": 0.1, "alpha_scale": 1.0})


def test_flat_keys_are_every_key_once() -> None:
    keys = MetaConfig.flat_keys()
    own = set(get_type_hints(MetaConfig)) - {"__dataclass_fields__", "user"}
    kinds: list[Any] = [*INVERSES.values(), *PRECONDITIONERS.values()]
    theirs = {f.name for kind in kinds for f in dataclasses.fields(kind)}
    assert len(keys) == len(set(keys))
    assert set(keys) == own | theirs
    assert keys[0] == "inverse"


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({}, "budget needs"),
        ({"outer_steps": 0}, "outer_steps"),
        ({"outer_steps": 1.5}, "outer_steps"),
        ({"outer_steps": True}, "outer_steps"),
        ({"gradient_equivalents": 0.0}, "gradient_equivalents"),
        ({"gradient_equivalents": math.nan}, "gradient_equivalents"),
        ({"seconds": -1.0}, "seconds"),
        ({"seconds": math.inf}, "seconds"),
        ({"seconds": "10"}, "seconds"),
        ({"outer_steps": 1, "eval_every": 0}, "eval_every"),
        ({"outer_steps": 1, "eval_every": None}, "eval_every"),
        ({"outer_steps": 1, "retrain": "no"}, "retrain"),
    ],
)
def test_a_bad_budget_is_refused(values: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        Budget(**values)


def test_budgets_are_frozen_and_travel_by_pickle() -> None:
    budget = Budget(outer_steps=3, seconds=2.0)
    assert pickle.loads(pickle.dumps(budget)) == budget
    with pytest.raises(dataclasses.FrozenInstanceError):
        budget.seconds = 1.0  # type: ignore[misc]


def test_given_limits_take_the_place_of_all_a_budgets_own() -> None:
    budget = Budget(outer_steps=3, eval_every=2, retrain=False)
    assert budget.limited_to() is budget
    assert budget.limited_to(seconds=9.0) == Budget(seconds=9.0, eval_every=2, retrain=False)
    with pytest.raises(UsageError, match="outer_steps"):
        budget.limited_to(outer_steps=0)
