"""The inverse-Hessian study on problems with a closed form."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from ift_tune import UsageError
from ift_tune.joint.config import MetaConfig
from ift_tune.studies.inverse import POWER_STEPS, Training, study_inverses
from ift_tune.studies.inverse_findings import judge_inverses
from ift_tune.studies.methods import solve_exactly
from ift_tune.studies.writing import Study, Verdict
from ift_tune.testing import Quadratic
from ift_tune.testing.frozen import FrozenProblem

WEIGHTS = 6
STEPS = (0, 1, 2, 3, 6, 20, 50)
TRAINING = Training(MetaConfig())


@pytest.fixture(scope="module")
def study() -> Study:
    """Return the study of a quadratic."""
    return study_inverses(Quadratic(WEIGHTS), TRAINING, steps=STEPS, repeats=1)


def _course(study: Study, method: str, state: str = "trained") -> pd.DataFrame:
    table = study.tables["inverse"]
    return table[(table["method"] == method) & (table["state"] == state)].set_index("steps")


def _number(table: pd.DataFrame, row: object, column: str) -> float:
    return float(table[column].to_dict()[row])


def _verdict(study: Study, claim: str) -> Verdict:
    (found,) = (f for f in study.findings if f.claim == claim)
    return found.verdict


def test_the_reference_is_the_closed_form() -> None:
    problem = Quadratic(WEIGHTS)
    frozen = FrozenProblem(problem)
    frozen.move_to([problem.solution()])
    exact = solve_exactly(frozen.linearise())
    torch.testing.assert_close(exact.grads[0], problem.exact_hypergradient())
    values = torch.linalg.eigvalsh(problem.matrix)
    assert exact.smallest_eigenvalue == pytest.approx(float(values[0]))
    assert exact.largest_eigenvalue == pytest.approx(float(values[-1]))
    assert not exact.indefinite
    assert exact.residual < 1e-12


def test_without_a_dense_matrix_the_reference_is_the_same() -> None:
    frozen = FrozenProblem(Quadratic(WEIGHTS))
    dense, long = (solve_exactly(frozen.linearise(), dense_weights=n) for n in (WEIGHTS, 1))
    assert (dense.how, long.how) == ("dense", "minres")
    torch.testing.assert_close(long.grads[0], dense.grads[0])
    assert long.residual < 1e-8
    assert long.smallest_eigenvalue == pytest.approx(dense.smallest_eigenvalue, rel=0.1)


@pytest.mark.parametrize("dense_weights", [WEIGHTS, 1])
def test_an_indefinite_system_is_solved_and_said(dense_weights: int) -> None:
    problem = Quadratic(WEIGHTS)
    problem.matrix = problem.matrix - 0.3 * torch.eye(WEIGHTS)
    linearisation = FrozenProblem(problem).linearise()
    exact = solve_exactly(linearisation, dense_weights=dense_weights)
    truth = torch.linalg.solve(problem.matrix, linearisation.vector[0])
    torch.testing.assert_close(exact.solution[0], truth, rtol=1e-6, atol=1e-8)
    assert exact.indefinite


def test_neumann_comes_nearer_with_every_step(study: Study) -> None:
    course = _course(study, "neumann")
    assert list(course.index) == list(STEPS)
    assert course["relative_l2"].is_monotonic_decreasing
    assert course["cosine_q"].is_monotonic_increasing
    assert _verdict(study, "trained: more neumann steps help") is Verdict.CONFIRMED


def test_conjugate_gradient_is_exact_after_as_many_steps_as_weights(study: Study) -> None:
    for method in ("conjugate_gradient", "conjugate_gradient, gauss_newton"):
        course = _course(study, method)
        assert _number(course, WEIGHTS, "relative_l2") < 1e-12
        assert _number(course, 3, "relative_l2") > 1e-6


def test_costs_are_those_of_the_products(study: Study) -> None:
    neumann, identity = _course(study, "neumann"), _course(study, "identity")
    assert list(neumann["products"]) == [POWER_STEPS + k for k in STEPS]
    assert list(identity["products"]) == [0]
    # Two gradients of equal batches, the products and the mixed product at 2 each.
    expected = 2.0 + 2.0 * (neumann["products"] + 1)
    np.testing.assert_allclose(neumann["gradient_equivalents"], expected)
    # One more has measured the residual.
    assert _number(_course(study, "conjugate_gradient"), 3, "products") == 4


def test_unrolling_from_the_minimum_is_the_series(study: Study) -> None:
    relation = study.tables["relation"].set_index("state")["relative_difference"]
    assert relation["trained"].max() < 1e-8
    assert relation["initial"].max() > 1e-2
    assert _verdict(study, "trained: unrolled equals neumann") is Verdict.CONFIRMED
    assert _verdict(study, "initial: unrolled equals neumann") is Verdict.NOTE


def test_the_problem_is_not_touched() -> None:
    problem = Quadratic(WEIGHTS)
    before = [w.detach().clone() for w in problem.weights()]
    study_inverses(problem, TRAINING, steps=(1,), methods=(), repeats=1)
    assert torch.equal(problem.weights()[0], before[0])


def test_a_problem_too_large_to_solve_is_trained() -> None:
    training = Training(MetaConfig(inner_lr=0.1), inner_steps=7, solved_weights=1)
    study = study_inverses(Quadratic(WEIGHTS), training, steps=(1,), methods=(), repeats=1)
    states = study.tables["states"].set_index("state")
    assert states.loc["trained", "weights_found_by"] == "7 steps of adam"
    assert _number(states, "trained", "gradient_norm") > 1e-6


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [({"steps": ()}, "steps"), ({"repeats": 0}, "repeats"), ({"cosine": 2.0}, "cosine")],
)
def test_wrong_arguments_are_refused(wrong: dict[str, object], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        study_inverses(Quadratic(), TRAINING, **wrong)  # type: ignore[arg-type]


def _tables(neumann: list[float], cg: list[float]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return made-up tables: cosines by the number of steps, distances of 1 − cosine."""
    rows = [
        {
            "state": "trained",
            "method": method,
            "steps": step,
            "products": step,
            "gradient_equivalents": 4.0 + 2.0 * step,
            "cosine": value,
            "cosine_q": value,
            "relative_l2": 1.0 - value,
            "relative_l2_q": 1.0 - value,
        }
        for method, values in (("neumann", neumann), ("conjugate_gradient", cg))
        for step, value in enumerate(values, 1)
    ]
    state = {
        "state": "trained",
        "weights_found_by": "hand",
        "gradient_norm": 0.0,
        "reference": "dense",
        "reference_residual": 0.0,
        "smallest_eigenvalue": -1.0,
        "largest_eigenvalue": 1.0,
        "indefinite": True,
    }
    return pd.DataFrame(rows), pd.DataFrame([state])


@pytest.mark.parametrize(
    ("neumann", "cosine", "distance", "more"),
    [
        ([0.3, 0.4], Verdict.CONTRADICTED, Verdict.CONFIRMED, Verdict.CONFIRMED),
        ([0.8, 0.9], Verdict.CONFIRMED, Verdict.CONTRADICTED, Verdict.CONFIRMED),
        ([0.6, 0.5], Verdict.MIXED, Verdict.MIXED, Verdict.CONTRADICTED),
        ([0.5, 0.7], Verdict.UNDECIDED, Verdict.UNDECIDED, Verdict.CONFIRMED),
        ([0.1, 0.1], Verdict.CONTRADICTED, Verdict.CONFIRMED, Verdict.UNDECIDED),
    ],
)
def test_sentences_follow_the_tables(
    neumann: list[float], cosine: Verdict, distance: Verdict, more: Verdict
) -> None:
    inverse, states = _tables(neumann, [0.5, 0.7])
    findings = judge_inverses(inverse, states, pd.DataFrame(), 0.6)
    found = {f.claim: f.verdict for f in findings}
    assert found["trained: Neumann has the better cosine per step"] is cosine
    assert found["trained: conjugate gradient has the smaller L2 distance"] is distance
    assert found["trained: more neumann steps help"] is more
    assert "indefinite" in findings[0].sentence
    best = max([*neumann, 0.7])
    assert "the best is" in judge_inverses(inverse, states, pd.DataFrame(), 0.95)[1].sentence
    assert f"{best:.3f}" in judge_inverses(inverse, states, pd.DataFrame(), 0.95)[1].sentence
