"""The classifier."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from sklearn.base import ClassifierMixin
from sklearn.preprocessing import StandardScaler
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import validate_data
from typing_extensions import Self

from ift_tune.base.errors import UsageError
from ift_tune.sklearn.base import IFTEstimator, refuse_others, require_both
from ift_tune.sklearn.rows import Array, Rows

_LOOKED_AT = 64  # rows


class IFTClassifier(ClassifierMixin, IFTEstimator):  # type: ignore[misc]  # without types
    """A classifier whose hyperparameters are learned by gradients on rows that are held out.

    Its parameters are those of `IFTEstimator`, which also tells its further attributes.

    Attributes:
        classes_: The labels, in the order of the module's outputs.

    Example:
        >>> from sklearn.datasets import load_wine
        >>> from ift_tune.sklearn import IFTClassifier
        >>> X, y = load_wine(return_X_y=True, as_frame=True)
        >>> model = IFTClassifier(
        ...     hidden_layer_sizes=(), tune="features", outer_steps=20, random_state=0, device="cpu"
        ... )
        >>> model.fit(X, y).score(X, y) > 0.9
        True
        >>> decays = dict(zip(model.feature_names_in_, model.hyper_["features"]))
        >>> bool(decays["alcohol"] < decays["magnesium"])  # alcohol matters more
        True
    """

    def fit(self, X: Any, y: Any, X_val: Any = None, y_val: Any = None, **others: Any) -> Self:
        """Train the module, and its hyperparameters on the validation rows.

        Args:
            X: Rows (N, n_features).
            y: Their labels (N,).
            X_val: Rows for the validation instead of some of `X`: clean ones beside noisy labels,
                or ones in the proportions that count. Two thirds fit λ, a third chooses steps.
            y_val: Their labels, each of them one of `y`.
            others: Nothing: `sample_weight`, say, is refused with a sentence.

        Returns:
            Itself.

        Raises:
            ValueError: If rows or parameters are wrong.
            IFTTuneError: If the training comes to no model.
        """
        refuse_others(others)
        require_both(X_val, y_val)
        known = {"dtype": [np.float64, np.float32]}
        with self._all_or_nothing():
            X, y = validate_data(self, X, y, ensure_min_samples=3 if X_val is None else 1, **known)
            check_classification_targets(y)
            self.classes_, targets = np.unique(y, return_inverse=True)
            if len(self.classes_) < 2:
                raise UsageError(
                    f"y must have at least two classes, got one class, {self.classes_[0]!r}"
                )
            self.scaler_ = StandardScaler().fit(X) if self.module is None else None
            val = None
            if X_val is not None:
                X_val, y_val = validate_data(
                    self, X_val, y_val, reset=False, ensure_min_samples=2, **known
                )
                if strangers := sorted(set(np.unique(y_val)) - set(self.classes_)):
                    raise UsageError(f"y_val must have classes of y alone, got {strangers[0]} too")
                if missing := sorted(set(self.classes_) - set(np.unique(y_val))):
                    warnings.warn(
                        f"y_val has no row of class {missing[0]}, for which nothing is learned on "
                        "the validation rows: give some of each class",
                        UserWarning,
                        stacklevel=2,
                    )
                val = Rows(self._scaled(self.scaler_, X_val), np.searchsorted(self.classes_, y_val))
            self._fit(Rows(self._scaled(self.scaler_, X), targets), val, len(self.classes_))
            if self.module is not None:
                self._warn_of_probabilities(self._outputs(X[:_LOOKED_AT]))
        return self

    def _warn_of_probabilities(self, outputs: torch.Tensor) -> None:
        """Warn of a module that ends in a softmax or sigmoid: the loss has one of its own."""
        if outputs.ndim == 2 and outputs.shape[1] > 1:
            sums = outputs.double().sum(dim=1)
            ends = bool((outputs >= 0.0).all() and (sums - 1.0).abs().max() < 1e-3)
        else:
            ends = isinstance(list(self.module_.modules())[-1], torch.nn.Sigmoid)
        if ends:
            warnings.warn(
                "module must return logits, and what it returns looks like probabilities: leave "
                "its last softmax or sigmoid out, for training through two of them is slow, and "
                "predict_proba is flat",
                UserWarning,
                stacklevel=3,
            )

    def predict_proba(self, X: Any) -> Array:
        """Return the probability of each class, (N, classes), in the order of `classes_`."""
        logits = self._outputs(self._checked(X))
        if logits.ndim == 1 or logits.shape[1] == 1:  # that of the second class
            second = torch.sigmoid(logits.reshape(-1))
            return torch.stack([1.0 - second, second], dim=1).numpy()
        return torch.softmax(logits, dim=1).numpy()

    def predict(self, X: Any) -> Array:
        """Return the likeliest label of each row, (N,)."""
        likeliest = self.predict_proba(X).argmax(axis=1)
        found: Array = self.classes_[likeliest]
        return found

    def _as_given(self, targets: Array) -> Array:
        found: Array = self.classes_[targets.astype(np.int64)]
        return found
