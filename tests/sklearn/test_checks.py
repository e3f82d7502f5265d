"""scikit-learn's own checks, on small instances: nothing is expected to fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import estimator_checks_generator

from ift_tune.sklearn import IFTClassifier, IFTRegressor

SMALL: dict[str, Any] = {
    "hidden_layer_sizes": (16,),
    "outer_steps": 3,
    "inner_steps": 20,
    "learning_rate": 3e-2,
    "device": "cpu",
}
OTHERS = [
    IFTRegressor(**SMALL),
    *(IFTClassifier(tune=tune, **SMALL) for tune in ("example_weights", "class_weights")),
    *(IFTRegressor(tune=tune, **SMALL) for tune in ("example_weights", "features")),
    IFTClassifier(tune=["class_weights", "features"], search=2, **SMALL),
    IFTClassifier(refit=False, **SMALL),
    IFTClassifier(),
    IFTRegressor(),
]


def checks(*estimators: Any) -> list[Any]:
    """Return each check of each, in a list: pytest will not take scikit-learn's iterator."""
    return [
        pytest.param(estimator, check, id=f"{type(estimator).__name__}-{place}-{number}")
        for place, instance in enumerate(estimators)
        for number, (estimator, check) in enumerate(estimator_checks_generator(instance))
    ]


@pytest.mark.parametrize(("estimator", "check"), checks(IFTClassifier(**SMALL)))
def test_the_checks_of_scikit_learn(estimator: Any, check: Callable[[Any], None]) -> None:
    check(estimator)


@pytest.mark.nightly
@pytest.mark.parametrize(("estimator", "check"), checks(*OTHERS))
def test_the_checks_of_scikit_learn_on_further_settings(
    estimator: Any, check: Callable[[Any], None]
) -> None:
    check(estimator)


def test_the_tags_say_what_the_estimators_take() -> None:
    classifier, regressor = get_tags(IFTClassifier()), get_tags(IFTRegressor())
    assert (classifier.estimator_type, regressor.estimator_type) == ("classifier", "regressor")
    assert classifier.target_tags.required
    assert regressor.target_tags.required
    assert regressor.target_tags.multi_output
    assert not classifier.input_tags.sparse
    assert not classifier.input_tags.allow_nan
