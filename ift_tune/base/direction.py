"""Which way a metric is better: the one place that compares, ranks and penalises values."""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Container, Iterable
from typing import TYPE_CHECKING, Any, Literal

from ift_tune.base.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_METRICS = ("search_error", "search_loss")
"""What decides where no metric is named: the first of them that is measured."""

_PENALTY = 1e9

_HIGHER = {
    *("accuracy", "acc", "auc", "auroc", "auprc", "aucpr", "prauc", "roc", "fbeta", "precision"),
    *("recall", "score", "ap", "map", "ndcg", "mrr", "iou", "miou", "dice", "jaccard", "mcc"),
    *("kappa", "sensitivity", "specificity", "bleu", "rouge", "meteor", "psnr", "ssim", "elbo"),
    *("likelihood", "probability", "logprob", "tpr", "tnr", "ppv", "npv", "reward", "return"),
    *("gain", "profit", "utility", "fitness", "correlation", "corr", "pearson", "spearman"),
    *("kendall", "matthews", "explained", "rsquared", "correct", "hit", "hits", "top"),
    *("ari", "nmi", "silhouette", "gini", "purity", "similarity", "agreement", "overlap", "win"),
    *("success", "quality", "lift"),
}
_LOWER = {
    *("error", "err", "loss", "nll", "perplexity", "ppl", "mse", "rmse", "mae", "mape", "rmsle"),
    *("brier", "entropy", "bce", "ce", "hinge", "deviance", "risk", "regret", "cost", "distance"),
    *("divergence", "kl", "wer", "cer", "eer", "fid", "fpr", "fnr", "hamming", "ece", "bpc", "bpd"),
    *("incorrect", "inaccuracy", "imprecision", "dissimilarity", "disagreement"),
}
_NUMBERED = re.compile(r"(?:macro|micro|weighted|mean|binary|val|test)?f\d|r(?:2|squared)")
"""F1, F2, F0.5 and R²: a letter with a number."""
_NEGATED = {"neg", "negative", "minus", "inverse"}
_WORDS = re.compile(r"[a-z]+|\d+")


class Direction(str, enum.Enum):
    """Which of two values of a metric is better. Its own value is the ``mode`` that users give.

    Example:
        >>> from ift_tune.base.direction import Direction
        >>> up = Direction("max")
        >>> up.better(0.9, 0.8), up.best([0.7, 0.9, 0.8]), up.words
        (True, 0.9, 'higher is better')
    """

    MIN = "min"
    MAX = "max"

    @property
    def sign(self) -> float:
        """What a value is multiplied by to be something to minimise."""
        return 1.0 if self is Direction.MIN else -1.0

    @property
    def worst(self) -> float:
        """The value that every other one is better than."""
        return self.sign * math.inf

    @property
    def penalty(self) -> float:
        """What stands for the value of a trial that has none: finite, so that no search stumbles.

        A trial that diverged must not win, whichever way the search looks.
        """
        return self.sign * _PENALTY

    @property
    def optuna(self) -> Literal["minimize", "maximize"]:
        """Optuna's name of it."""
        return "minimize" if self is Direction.MIN else "maximize"

    @property
    def words(self) -> str:
        """What a reader has to know of the metric."""
        return f"{self.comparative} is better"

    @property
    def comparative(self) -> str:
        """What a better value is: "lower" or "higher"."""
        return "lower" if self is Direction.MIN else "higher"

    def better(self, value: float, than: float) -> bool:
        """Return whether a value is better than another; equal ones are not."""
        return self.sign * value < self.sign * than

    def best(self, values: Iterable[float], default: float | None = None) -> float:
        """Return the best of some values.

        Args:
            values: They.
            default: Where there is none. Default: `worst`.
        """
        found = self.worst if default is None else default
        return min(values, key=lambda value: self.sign * value, default=found)

    def best_so_far(self, values: pd.Series[Any]) -> pd.Series[Any]:
        """Return the best up to and including each entry."""
        return values.cummin() if self is Direction.MIN else values.cummax()

    def best_row(self, rows: pd.DataFrame, column: str) -> pd.Series[Any]:
        """Return the row with the best value in a column; of equal ones, the first trial's."""
        ascending = [self is Direction.MIN, True]
        return rows.sort_values([column, "trial"], ascending=ascending).iloc[0]

    @classmethod
    def of_run(cls, run: Any) -> Direction:
        """Return the direction that a run.json records; before it did, all runs minimised."""
        return cls((run or {}).get("mode") or cls.MIN)


def is_penalty(value: object) -> bool:
    """Return whether a value is the `Direction.penalty` of either direction."""
    return value in (_PENALTY, -_PENALTY)


def named_direction(metric: str) -> Direction | None:
    """Return which way a metric's name says that it is better; None where it says nothing.

    The last word that says something decides, as in "dice_loss", and a negation turns it round, as
    in scikit-learn's "neg_log_loss", which is maximised.
    """
    # "F1Score", "valAUC" and "mAP" are words too.
    spaced = re.sub(r"(?<=[a-z\d])(?=[A-Z][a-z])|(?<=[a-z]{2})(?=[A-Z])", " ", metric)
    tokens = _WORDS.findall(spaced.lower())
    direction: Direction | None = None
    for index, token in enumerate(tokens):
        if _says(token, _LOWER):
            direction = Direction.MIN
        # "brier_score" is an error, whatever it is called; other scores are to be raised.
        elif token == "score" and direction is not None:
            continue
        elif _says(token, _HIGHER) or _NUMBERED.fullmatch("".join(tokens[index : index + 2])):
            direction = Direction.MAX
    if direction is not None and not _NEGATED.isdisjoint(tokens):
        return Direction.MAX if direction is Direction.MIN else Direction.MIN
    return direction


def _says(token: str, known: set[str]) -> bool:
    """Return whether a word is a known one, or ends in a long one, as "crossentropy" does."""
    return token in known or any(len(word) >= 5 and token.endswith(word) for word in known)


def direction_of(metric: str | None, mode: str | None) -> Direction:
    """Return the direction that a user's `metric` and `mode` mean.

    Without a mode the metric is minimised, unless its name says that higher is better: then nothing
    is guessed. A name that says nothing is taken for a loss.

    Args:
        metric: As ``"search_accuracy"``; None: the error, or the loss.
        mode: ``"min"``, ``"max"`` or None.

    Raises:
        UsageError: If the mode is another, is missing where the name asks for one, or is given as
            ``"max"`` without a metric.

    Example:
        >>> from ift_tune.base.direction import direction_of
        >>> direction_of("search_loss", None).value, direction_of("search_f1", "max").value
        ('min', 'max')
        >>> direction_of("search_accuracy", None)
        Traceback (most recent call last):
        ...
        ift_tune.base.errors.UsageError: search_accuracy sounds as if higher were better: say ...
    """
    if mode is not None and mode not in ("min", "max"):
        raise UsageError(f"mode must be 'min' or 'max', got {mode!r}")
    if metric is not None and not (isinstance(metric, str) and metric):
        raise UsageError(f"metric must be a name such as 'search_loss', got {metric!r}")
    if metric is None and mode == "max":
        raise UsageError(
            "mode='max' without a metric would maximise an error or a loss: name what is to be "
            "maximised, as metric='search_accuracy', got metric=None"
        )
    if mode is not None:
        return Direction(mode)
    if metric is not None and named_direction(metric) is Direction.MAX:
        raise UsageError(
            f"{metric} sounds as if higher were better: say mode='max' (--mode max) to maximise "
            "it, or mode='min' to minimise it, got no mode"
        )
    return Direction.MIN


def default_metric(measured: Container[str]) -> str:
    """Return what decides where no metric is named; the loss where nothing is measured yet."""
    return next((name for name in DEFAULT_METRICS if name in measured), DEFAULT_METRICS[-1])


def chosen_metric(metric: str | None, measured: Iterable[str]) -> str:
    """Return the column that decides, given what is measured of the search split.

    Args:
        metric: What the user named; None: the first of `DEFAULT_METRICS` that is there.
        measured: Columns.

    Raises:
        UsageError: If it is not measured; what is, is named.
    """
    columns = sorted(column for column in measured if column.startswith("search_"))
    chosen = metric or default_metric(columns)
    if chosen in columns:
        return chosen
    wanted = DEFAULT_METRICS if metric is None else [metric]
    raise UsageError(
        f"{' or '.join(map(str, wanted))} is not measured of the search split; choose a metric "
        f"from {', '.join(columns) or 'nothing'}, and a mode, 'min' or 'max' (--metric NAME "
        "--mode max); of several metrics the first has to be one of these"
    )
