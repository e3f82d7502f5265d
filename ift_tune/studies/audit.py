"""Which training examples are suspect, by the weights that a run has learned for them.

The weights alone are a blunt order: among the examples that fit their labels, how heavy each is
says little. What they are good for is a model that was trained without the suspects: from scratch
with the weights, and on the validation examples too. The order is by the loss of each given label
under it and two others together; see `ift_tune.studies.rankings`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from ift_tune.base.errors import (
    MissingDependencyError,
    UsageError,
    require_integer,
)
from ift_tune.base.interrupt import Interrupt
from ift_tune.hyper import ExampleWeights, kinds_in
from ift_tune.hyper.supervised import SupervisedProblem
from ift_tune.joint.config import MetaConfig
from ift_tune.joint.joint import JointOptimizer
from ift_tune.problem.factory import require_factory
from ift_tune.problem.problem import BilevelProblem
from ift_tune.studies.audit_findings import (
    AUDIT,
    Flags,
    Numbers,
    Ranking,
    compared,
    overlap,
    sentences,
)
from ift_tune.studies.audited import Trained, Trainings
from ift_tune.studies.audited_problems import require_weights
from ift_tune.studies.cleanlab_ranking import cleanlab_ranking
from ift_tune.studies.influence import influence
from ift_tune.studies.judging import judge
from ift_tune.studies.rankings import Judged, SeedResult, judgement_by, rankings
from ift_tune.studies.shown import shown
from ift_tune.trial.best import fill, find_best, problem_of
from ift_tune.trial.tables import RunDirectory
from ift_tune.trial.trial import ProblemFactory


def measure(
    run_dir: str | os.PathLike[str],
    make_problem: ProblemFactory,
    folder: Path,
    *,
    seeds: int = 1,
    top: int = 50,
    folds: int = 5,
    products: int = 100,
    wrong: npt.ArrayLike | None = None,
    device: str | torch.device = "auto",
    say: Callable[[str], None] = lambda line: None,
) -> pd.DataFrame:
    """Return the audit of a run; see `ift_tune.audit`, which writes it.

    Args:
        run_dir: The run directory.
        make_problem: The factory that the run was made with.
        folder: Where further trainings go.
        seeds: The run's own, and how many more.
        top: Examples that are shown and whose order is looked at.
        folds: Parts of the training split, each left out once, for cleanlab.
        products: Most products of the solve for what leaving out an example changes; 0 leaves that
            out.
        wrong: Which labels are wrong, where that is known.
        device: Where.
        say: Is told what goes on.

    Returns:
        A row for each training example, the most suspect first; attribute ``"audit"`` has what it
        is of, the comparison of the rankings, the sentences, and what the first `top` look like.

    Raises:
        UsageError: If there is no trained model or no weight for each example, or an argument is
            wrong.
        Interrupted: On Ctrl-C or SIGTERM, after saving.
    """
    _require_arguments(make_problem, seeds, top, folds, products)
    run = RunDirectory(run_dir, resume=True)
    problem = problem_of(find_best(run.path), make_problem, device)
    examples = len(require_weights(problem).raw)
    truth = _truth(problem, examples, wrong)
    notes: list[str] = []
    with Interrupt().listening() as interrupt:
        trainings = Trainings(run, make_problem, folder, device, interrupt, say)
        found = [_said(trainings, joint, products) for joint in trainings.of_seeds(seeds)]
        orders = rankings(found, _weights(trainings.fresh()))
        plain = found[0].models["loss"].judgement if found[0].models else None
        if folds and plain is not None and plain.probabilities is not None:
            try:
                orders.append(
                    cleanlab_ranking(trainings, lambda t: _supervised(t, trainings), plain, folds)
                )
            except MissingDependencyError as error:
                notes.append(f"Cleanlab's ranking is left out: {error}.")
        spread = _spread(found, trainings)
    return _table(problem, found, spread, orders, truth, min(top, examples), notes)


def _require_arguments(
    make_problem: object, seeds: object, top: object, folds: object, products: object
) -> None:
    require_factory(make_problem)
    require_integer("seeds", seeds, 1)
    require_integer("top", top, 1)
    require_integer("products", products, 0)
    require_integer("folds", folds, 0)
    if folds == 1:
        raise UsageError("folds must be 0, which leaves cleanlab out, or at least 2, got 1")


def _truth(problem: object, examples: int, wrong: npt.ArrayLike | None) -> Flags | None:
    """Return which labels are wrong: as given, or as a problem knows that spoiled them itself."""
    if wrong is None:
        clean = getattr(problem, "clean", None)
        if not isinstance(clean, torch.Tensor):
            return None
        wrong = ~clean.cpu().numpy().astype(bool)
    found = np.asarray(wrong)
    if found.shape != (examples,) or found.dtype != np.bool_:
        raise UsageError(
            f"wrong must be a truth value for each of the {examples} training examples, got "
            f"{found.dtype} of shape {found.shape}"
        )
    return found


def _said(trainings: Trainings, joint: Trained, products: int) -> SeedResult:
    """Return what a run says, by models trained from scratch with its weights."""
    problem, seed = trainings.fresh(joint.kept), int(joint.kept["seed"])
    fill(problem.hyper, joint.kept["hyper"], "hyper")
    weights = _weights(problem)
    changes, solve = torch.full_like(weights, torch.nan), {}
    if products:  # at a minimum of the training loss alone, which is what an example is left out of
        refitted = trainings.refitted(joint, "train")
        fill(problem.model, refitted.kept["model"], "model")
        config = MetaConfig.from_flat(joint.kept["config"])
        with closing(JointOptimizer(problem, config, seed=seed)) as optimiser:
            effect = influence(optimiser, require_weights(problem), products=products)
        changes = effect.changes.double().cpu()
        solve = {
            "status": effect.status.value,
            "gauss_newton": effect.gauss_newton,
            "products": effect.products,
        }
    models = {}
    if isinstance(problem, SupervisedProblem):
        trained = {
            "refit": trainings.refitted(joint, "train+val"),
            "loss": trainings.plain(joint),
            "val": trainings.on_validation(joint),
        }
        for name, each in trained.items():
            judgement = judge(_supervised(each, trainings), len(weights))
            models[name] = Judged(judgement, each.cost)
    return SeedResult(seed, weights, models, changes, solve, joint.cost)


def _spread(found: Sequence[SeedResult], trainings: Trainings) -> tuple[str, list[torch.Tensor]]:
    """Return over what standard errors are, seeds or trials, and the weights of each."""
    if len(found) > 1:
        return "seeds", [each.weights for each in found]
    weights = []
    for hyper in trainings.better_trials():
        problem = trainings.fresh()
        fill(problem.hyper, hyper, "hyper")
        weights.append(_weights(problem))
    return ("trials", weights) if weights else ("seeds", [found[0].weights])


def _weights(problem: BilevelProblem) -> torch.Tensor:
    """Return the weight of each training example, by all kinds together."""
    found = [kind().detach().double().cpu() for kind in kinds_in(problem.hyper, ExampleWeights)]
    return torch.stack(found).prod(dim=0)


def _supervised(trained: Trained, trainings: Trainings) -> SupervisedProblem:
    """Return the problem with a trained model."""
    problem = trainings.fresh()
    fill(problem.model, trained.kept["model"], "model")
    if not isinstance(problem, SupervisedProblem):
        raise UsageError(f"make_problem must make the same each time, got {type(problem).__name__}")
    return problem


def _table(
    problem: BilevelProblem,
    found: Sequence[SeedResult],
    spread: tuple[str, Sequence[torch.Tensor]],
    orders: Sequence[Ranking],
    truth: Flags | None,
    top: int,
    notes: Sequence[str],
) -> pd.DataFrame:
    """Return the rows, most suspect first, with everything else in an attribute."""
    weights = torch.stack([each.weights for each in found]).numpy()
    changes = torch.stack([each.changes for each in found]).numpy()
    own, examples = orders[0], weights.shape[1]
    columns: dict[str, Any] = {
        "index": np.arange(examples),
        "weight": weights.mean(axis=0),
        "weight_se": _standard_error(
            torch.stack(list(spread[1])).numpy(),
            # Of a search, the weight is that of its best trial, and no mean over the others.
            of_the_mean=spread[0] == "seeds",
        ),
    }
    if found[0].models:
        judgement = judgement_by(found)
        classes = judgement.probabilities is not None
        columns["given_label"] = _labels(judgement.given, classes)
        columns["suggested_label"] = _labels(judgement.predicted, classes)
        columns["mean_loss"] = own.scores
    columns["search_loss_change"] = changes.mean(axis=0)
    columns["search_loss_change_se"] = _standard_error(changes)
    for ranking in orders:
        if ranking.name in _COLUMNS:
            columns[_COLUMNS[ranking.name]] = ranking.scores
    if own.flags is not None:
        columns["flagged"] = own.flags
    if truth is not None:
        columns["wrong"] = truth
    order = own.top(examples)
    table = pd.DataFrame(columns).iloc[order].reset_index(drop=True)
    table.insert(0, "rank", np.arange(1, examples + 1))
    each_run = [rankings([each], torch.ones(examples))[0] for each in found]
    if spread[0] == "trials":
        each_run = [Ranking("weights", "", -weights.numpy(), None, 0.0) for weights in spread[1]]
    compared_rankings = compared(orders, truth, top)
    facts: dict[str, Any] = {
        "examples": examples,
        "seeds": [each.seed for each in found],
        "top": top,
        "over": spread[0],
        "runs": len(spread[1]),
        "overlap": overlap(each_run, top),
        "wrong": None if truth is None else int(truth.sum()),
        "unknown": int(np.isnan(own.scores).sum()),
        "solves": [each.solve for each in found],
    }
    facts["rankings"] = compared_rankings.to_dict("records")
    facts["sentences"] = [*sentences(facts, compared_rankings), *notes]
    facts["class_names"] = [str(name) for name in getattr(problem, "class_names", ())]
    looks = shown(problem, order[:top].tolist())
    facts["looks"] = {str(index): look for index, look in looks.items()}
    table.attrs[AUDIT] = facts
    return table


_COLUMNS = {
    "refit": "refitted_loss",
    "loss": "plain_loss",
    "val": "validation_model_loss",
    "cleanlab": "cleanlab_score",
}
"""Columns for the scores of other rankings."""


def _standard_error(values: Numbers, *, of_the_mean: bool = True) -> Numbers:
    """Return that of the mean over the first axis, or of one of the values; NaN of one alone."""
    number = len(values)
    if number == 1:
        return np.full(values.shape[1], np.nan)
    found: Numbers = values.std(axis=0, ddof=1) / (np.sqrt(number) if of_the_mean else 1.0)
    return found


def _labels(values: torch.Tensor, classes: bool) -> pd.Series[Any]:
    found = pd.Series(values.numpy())
    return found.astype("Int64") if classes else found
