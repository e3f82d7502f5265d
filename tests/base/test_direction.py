"""Which way a metric is better: by what its name says, and by what the user says."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from ift_tune import UsageError
from ift_tune.base.direction import (
    Direction,
    chosen_metric,
    direction_of,
    is_penalty,
    named_direction,
)

HIGHER = [
    *("accuracy", "search_accuracy", "search_acc", "top5_accuracy", "acc@1", "balancedAccuracy"),
    *("AUC", "search_auc", "ROC-AUC", "roc_auc_ovr", "AUPRC", "valAUC", "average_precision"),
    *("f1", "search_f1", "F1Score", "f1[/macro]", "macro_f1", "macroF1", "f0.5", "fbeta"),
    *("precision", "recall", "search_score", "r2", "R^2", "r2_score", "R_squared", "mAP", "map50"),
    *("log_likelihood", "neg_log_loss", "neg_mean_squared_error", "mean_iou", "kappa", "ndcg@10"),
]
LOWER = [
    *("error", "search_loss", "dice_loss", "f1_loss", "top1_error", "brier_score", "fid_score"),
    *("nll", "negative_log_likelihood", "neg_accuracy", "perplexity", "cross_entropy", "log_loss"),
    *("mse", "rmse", "hinge", "wer", "inaccuracy"),
]
SILENT = ["search_foo", "search_bits", "search_off1", "search_pinball", "wrong_share", "latency"]


@pytest.mark.parametrize("name", HIGHER)
def test_a_name_that_says_higher_is_better_needs_a_mode(name: str) -> None:
    assert named_direction(name) is Direction.MAX
    with pytest.raises(UsageError, match="say mode='max'"):
        direction_of(name, None)
    assert direction_of(name, "max") is Direction.MAX
    assert direction_of(name, "min") is Direction.MIN


@pytest.mark.parametrize("name", LOWER + SILENT)
def test_other_names_are_minimised_unless_it_is_said_otherwise(name: str) -> None:
    assert named_direction(name) is (None if name in SILENT else Direction.MIN)
    assert direction_of(name, None) is Direction.MIN
    assert direction_of(name, "max") is Direction.MAX


@pytest.mark.parametrize(
    ("metric", "mode", "mend"),
    [
        ("search_loss", "maximize", "must be 'min' or 'max', got 'maximize'"),
        ("search_loss", "", "must be 'min' or 'max', got ''"),
        (None, "max", "name what is to be maximised"),
        ("", "min", "metric must be a name"),
        (3, "min", "metric must be a name"),
    ],
)
def test_what_means_nothing_is_refused(metric: str | None, mode: str, mend: str) -> None:
    with pytest.raises(UsageError, match=mend):
        direction_of(metric, mode)


def test_without_a_metric_the_error_or_the_loss_is_minimised() -> None:
    assert direction_of(None, None) is direction_of(None, "min") is Direction.MIN
    assert chosen_metric(None, ["search_loss", "search_error", "test_error"]) == "search_error"
    assert chosen_metric(None, ["search_loss", "search_accuracy"]) == "search_loss"


@pytest.mark.parametrize("metric", [None, "search_f1", "test_accuracy", "accuracy"])
def test_what_is_not_measured_is_refused_with_what_is(metric: str | None) -> None:
    with pytest.raises(UsageError, match="choose a metric from search_accuracy, search_recall"):
        chosen_metric(metric, ["search_recall", "search_accuracy", "test_accuracy"])


@pytest.mark.parametrize("direction", Direction)
def test_comparisons_agree_with_those_of_the_negated_values(direction: Direction) -> None:
    values = [0.3, -0.2, 0.9, 0.9, 0.1]
    losses = values if direction is Direction.MIN else [-v for v in values]
    assert direction.best(values) == values[losses.index(min(losses))]
    assert [direction.better(v, 0.3) for v in values] == [
        loss < direction.sign * 0.3 for loss in losses
    ]
    so_far = [min(losses[: k + 1]) for k in range(len(losses))]
    assert list(direction.sign * direction.best_so_far(pd.Series(values))) == so_far
    assert all(direction.better(v, direction.worst) for v in values)
    assert all(direction.better(v, direction.penalty) for v in values)
    assert math.isfinite(direction.penalty)
    assert is_penalty(direction.penalty)
    assert direction.best([]) == direction.worst
    assert not is_penalty(0.5)


def test_runs_of_before_there_was_a_mode_minimised() -> None:
    assert Direction.of_run({"metric": "search_accuracy"}) is Direction.MIN
    assert Direction.of_run({"mode": "max"}) is Direction.MAX
