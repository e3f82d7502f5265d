"""The regressor."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import RegressorMixin
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import validate_data
from typing_extensions import Self

from ift_tune.sklearn.base import IFTEstimator, refuse_others, require_both
from ift_tune.sklearn.recipe import as_targets
from ift_tune.sklearn.rows import Array, Rows


class IFTRegressor(RegressorMixin, IFTEstimator):  # type: ignore[misc]  # without types
    """A regressor whose hyperparameters are learned by gradients on rows that are held out.

    Its parameters are those of `IFTEstimator`, which also tells its further attributes. The loss
    is the squared error, of targets that are standardised where `module` is None.

    Example:
        >>> from sklearn.datasets import load_diabetes
        >>> from ift_tune.sklearn import IFTRegressor
        >>> X, y = load_diabetes(return_X_y=True)
        >>> model = IFTRegressor(
        ...     hidden_layer_sizes=(), outer_steps=20, random_state=0, device="cpu"
        ... )
        >>> model.fit(X[:300], y[:300]).score(X[300:], y[300:]) > 0.4
        True
        >>> model.hyper_
        Learned:
          weight_decay  ()  ...
    """

    def fit(self, X: Any, y: Any, X_val: Any = None, y_val: Any = None, **others: Any) -> Self:
        """Train the module, and its hyperparameters on the validation rows.

        Args:
            X: Rows (N, n_features).
            y: Their targets (N,) or (N, n_outputs).
            X_val: Rows for the validation instead of some of `X`. Two thirds fit λ, a third chooses
                steps.
            y_val: Their targets.
            others: Nothing: `sample_weight`, say, is refused with a sentence.

        Returns:
            Itself.

        Raises:
            ValueError: If rows or parameters are wrong.
            IFTTuneError: If the training comes to no model.
        """
        refuse_others(others)
        require_both(X_val, y_val)
        known = {"dtype": [np.float64, np.float32], "multi_output": True, "y_numeric": True}
        with self._all_or_nothing():
            X, y = validate_data(self, X, y, ensure_min_samples=3 if X_val is None else 1, **known)
            own = self.module is None
            self._target_shape = y.shape[1:]
            self.scaler_ = StandardScaler().fit(X) if own else None
            self.target_scaler_ = StandardScaler().fit(y.reshape(len(y), -1)) if own else None
            val = None
            if X_val is not None:
                X_val, y_val = validate_data(
                    self, X_val, y_val, reset=False, ensure_min_samples=2, **known
                )
                if y_val.shape[1:] != self._target_shape:
                    raise ValueError(
                        f"y_val must have the form of y, (N{_more(self._target_shape)}), got shape "
                        f"{y_val.shape}"
                    )
                val = self._rows(X_val, y_val)
            self._fit(self._rows(X, y), val, None)
        return self

    def predict(self, X: Any) -> Array:
        """Return the prediction for each row, (N,) or (N, n_outputs)."""
        outputs = as_targets(self._outputs(self._checked(X)), 1 + len(self._target_shape))
        return self._as_given(outputs.numpy())

    def __sklearn_tags__(self) -> Any:
        """Say that there may be several targets."""
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _rows(self, X: Array, y: Array) -> Rows:
        targets = self._scaled(self.target_scaler_, y.reshape(len(y), -1)).reshape(y.shape)
        return Rows(self._scaled(self.scaler_, X), targets)

    def _as_given(self, targets: Array) -> Array:
        if self.target_scaler_ is None:
            return targets
        columns = targets.reshape(len(targets), -1)
        found: Array = self.target_scaler_.inverse_transform(columns).reshape(targets.shape)
        return found


def _more(shape: tuple[int, ...]) -> str:
    return "".join(f", {size}" for size in shape) or ","
