"""Cleanlab's order of suspects, from predicted probabilities that are out of sample.

Confident learning (Northcutt, Jiang and Chuang 2021) asks of each given label what a model says
that has not been trained on it. Such models are made here as the plain training beside the audited
run is, each with one part of the training examples at weight 0: they weigh nothing in its loss, and
only the statistics of batch normalisation have seen them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ift_tune.base.errors import UsageError, require
from ift_tune.hyper.supervised import SupervisedProblem
from ift_tune.studies.audit_findings import Ranking
from ift_tune.studies.audited import Trained, Trainings
from ift_tune.studies.audited_problems import LeftOut
from ift_tune.studies.judging import Judgement, judge


def cleanlab_ranking(
    trainings: Trainings,
    make_problem: Callable[[Trained], SupervisedProblem],
    plain: Judgement,
    folds: int,
) -> Ranking:
    """Return cleanlab's ranking: its label quality scores, and the issues that it finds.

    Args:
        trainings: Train the models.
        make_problem: Returns the problem with a trained model.
        plain: What the plain training says, of which the classes are read.
        folds: Parts of the training split.

    Raises:
        MissingDependencyError: If cleanlab is not installed.
    """
    rank = require("cleanlab.rank", extra="audit", what="this ranking")
    issues = require("cleanlab.filter", extra="audit", what="this ranking")
    if plain.probabilities is None:
        raise UsageError("cleanlab ranks examples of one class each, got none")
    probabilities, cost = torch.full_like(plain.probabilities, torch.nan), 0.0
    for part in range(folds):
        trained = trainings.left_out(part, folds)
        judged = judge(make_problem(trained), len(probabilities))
        if judged.probabilities is not None:
            members = LeftOut.members(len(probabilities), part, folds)
            probabilities[members] = judged.probabilities[members]
        cost += trained.cost
    known = (probabilities.isfinite().all(dim=1) & plain.given.isfinite()).numpy()
    labels = plain.given.numpy()[known].astype(int)
    chances = probabilities.numpy()[known]
    scores = np.full(len(known), np.nan)
    flags = np.zeros(len(known), dtype=bool)
    # Its scores are of quality: low where a label is suspect.
    scores[known] = -rank.get_label_quality_scores(labels, chances)
    flags[known] = issues.find_label_issues(labels, chances, n_jobs=1)
    words = f"cleanlab, on predictions of {folds} plain trainings that have not seen the example"
    return Ranking("cleanlab", words, scores, flags, cost)
