"""What both estimators share: their parameters, and a fit by the package's own trials."""

from __future__ import annotations

import abc
import contextlib
import copy
from collections.abc import Iterator, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.base import BaseEstimator
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from ift_tune.base.arguments import plain, require_flag, require_path, require_writable, shown
from ift_tune.base.errors import UsageError, nearest, require_integer, require_number
from ift_tune.joint.config import Budget, MetaConfig
from ift_tune.problem.modes import evaluating
from ift_tune.problem.outputs import call_model
from ift_tune.report.audit import audit
from ift_tune.search.space import MetaSpace
from ift_tune.sklearn.awaited import AwaitedAudit
from ift_tune.sklearn.kinds import kind_names
from ift_tune.sklearn.learned import Learned
from ift_tune.sklearn.recipe import Recipe, first_weight
from ift_tune.sklearn.rows import Array, Rows, split_rows
from ift_tune.sklearn.runs import Home, Plan, train, weighs_examples

_AT_ONCE = 8192  # rows that are predicted at once
_MOST_AWAITED = 16 * 2**20  # bytes of what an audit needs that are pickled along


class IFTEstimator(BaseEstimator, abc.ABC):  # type: ignore[misc]  # scikit-learn has no types
    """What `IFTClassifier` and `IFTRegressor` share.

    Attributes:
        module_: The trained module, in evaluation mode.
        hyper_: What was learned, arrays by name.
        trials_: The table of the trials, one row without a search.
        steps_: The table of all outer steps.
        split_: Of ``"train"``, ``"val"`` and ``"search"``, the positions of their rows: in `X`, or
            of the latter two in `X_val` where that was given.
        run_dir_: The run directory, where one was asked for; else None.
        n_features_in_: The number of columns.
        feature_names_in_: Their names, where `X` was a frame that has some.
    """

    def __init__(
        self,
        module: Any = None,
        *,
        tune: Any = "weight_decay",
        search: int | None = None,
        refit: bool = True,
        hidden_layer_sizes: tuple[int, ...] = (64,),
        outer_steps: int = 100,
        inner_steps: int = 5,
        learning_rate: float = 5e-3,
        meta_lr: float = 0.1,
        batch_size: int | None = 256,
        validation_fraction: float = 0.3,
        patience: int | None = None,
        config: Mapping[str, Any] | None = None,
        space: MetaSpace | None = None,
        device: str = "auto",
        random_state: Any = None,
        verbose: int = 0,
        run_dir: str | Path | None = None,
    ) -> None:
        """Take the parameters, which `fit` checks.

        Args:
            module: The model: an `nn.Module`, which each fit trains a copy of, from the weights
                that it has; a class or function ``module(n_features, n_outputs)`` that returns one;
                or None for a perceptron on standardised inputs. It maps inputs (B, n_features) to
                outputs (B, n_outputs): a logit for each class, or a number for each target.
            tune: What is learned on the validation rows, by gradients: ``"weight_decay"`` (one for
                each matrix of weights), ``"features"`` (a decay for each column),
                ``"example_weights"``, ``"class_weights"``; a `HyperKind`; a function
                ``(model, inputs, targets)`` of the training rows that returns one; a list of words
                or a mapping of names to any of these.
            search: Trials of a search over the settings around that, by Optuna; None for one trial
                with the settings given here.
            refit: Whether the final model is trained from scratch, λ frozen, on the validation rows
                too; else it is the run's own at its best step.
            hidden_layer_sizes: Of the default module; ``()`` for a linear model.
            outer_steps: Updates of λ.
            inner_steps: Updates of the weights to each of them; few, so that λ has a say before the
                weights have memorised the training rows.
            learning_rate: Of the weights.
            meta_lr: Of λ.
            batch_size: Of the inner steps; None for all rows.
            validation_fraction: Of the rows of `X` that are not trained on at first: two thirds of
                them fit λ, a third chooses steps and trials.
            patience: Outer steps without a better one after which a trial ends; None for none.
            config: Further settings of `MetaConfig` by their flat names, such as
                ``{"terms": 10, "inner_optimizer": "sgd"}``.
            space: What `search` varies; None for the package's own space and the learning rate.
            device: Where to train.
            random_state: Of splits, weights and batches.
            verbose: Above 0, a line is printed for each outer step.
            run_dir: A directory that keeps the run of each fit, in ``fit-0``, ``fit-1``, ...; None
                for none.
        """
        self.module = module
        self.tune = tune
        self.search = search
        self.refit = refit
        self.hidden_layer_sizes = hidden_layer_sizes
        self.outer_steps = outer_steps
        self.inner_steps = inner_steps
        self.learning_rate = learning_rate
        self.meta_lr = meta_lr
        self.batch_size = batch_size
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.config = config
        self.space = space
        self.device = device
        self.random_state = random_state
        self.verbose = verbose
        self.run_dir = run_dir

    # --- fitting -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Leave the estimator as it was where a fit fails: no weights beside others' scales."""
        before = dict(self.__dict__)
        try:
            yield
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    def _fit(self, rows: Rows, val: Rows | None, classes: int | None) -> None:
        """Run the trials on rows that have been checked."""
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        plan = self._plan(seed)
        self._forget_audit()
        self.split_ = split_rows(
            rows, val, self.validation_fraction, seed, stratify=classes is not None
        )
        held = rows if val is None else val
        recipe = Recipe(
            self.module,
            self.tune,
            self._hidden(),
            classes,
            rows.at(self.split_["train"]),
            held.at(self.split_["val"]),
            held.at(self.split_["search"]),
            self.batch_size,
        )
        home = Home(self.run_dir)
        try:
            with home.writing():
                found = train(recipe, plan, home)
        except BaseException:
            home.leave()
            raise
        # The default module's weights are exact in float64 too, and the prediction of a row then
        # does not depend on the rows beside it, beyond rounding.
        widened = self.module is None and first_weight(found.model).device.type != "mps"
        self.module_ = found.model.double() if widened else found.model
        self.hyper_ = Learned(kind_names(self.tune, found.hyper))
        self.trials_, self.steps_ = found.trials, found.steps
        self.run_dir_ = home.path if home.kept else None
        if weighs_examples(found.hyper):
            self._audited = AwaitedAudit(home, recipe)
        else:
            home.leave()

    def _plan(self, seed: int) -> Plan:
        """Return how to train.

        Raises:
            UsageError: If a parameter is wrong.
        """
        refit = plain(self.refit)
        require_flag("refit", refit)
        require_number("learning_rate", self.learning_rate, above=0.0)
        if self.run_dir is not None:
            require_writable("run_dir", require_path("run_dir", self.run_dir))
        if not isinstance(self.verbose, Integral):
            raise UsageError(f"verbose must be a number or a flag, got {shown(self.verbose)}")
        if self.search is not None:
            require_integer("search", self.search, 1)
        if self.batch_size is not None:
            require_integer("batch_size", self.batch_size, 1)
        if not (self.space is None or isinstance(self.space, MetaSpace)):
            raise UsageError(f"space must be a MetaSpace or None, got {shown(self.space)}")
        if self.space is not None and self.search is None:
            raise UsageError("space goes with search: say how many trials, got search=None")
        if not (self.config is None or isinstance(self.config, Mapping)):
            raise UsageError(
                f'config must be a mapping such as {{"terms": 10}}, got {shown(self.config)}'
            )
        own = {
            "inner_steps": "inner_steps",
            "inner_lr": "learning_rate",
            "meta_lr": "meta_lr",
        }
        if twice := [name for name in own if name in (self.config or {})]:
            raise UsageError(
                f"config must leave {twice[0]} to the parameter {own[twice[0]]}, got both"
            )
        settings = {name: getattr(self, parameter) for name, parameter in own.items()}
        return Plan(
            MetaConfig.from_flat({**settings, **(self.config or {})}),
            Budget(outer_steps=self.outer_steps, patience=self.patience, retrain=False),
            self.search,
            self.space,
            refit,
            seed,
            self.device,
            bool(self.verbose),
        )

    def _hidden(self) -> tuple[int, ...]:
        try:
            sizes = tuple(self.hidden_layer_sizes)
        except TypeError as error:
            raise UsageError(
                "hidden_layer_sizes must be a tuple such as (64,), or () for a linear model, got "
                f"{shown(self.hidden_layer_sizes)}"
            ) from error
        for size in sizes:
            require_integer("hidden_layer_sizes", size, 1)
        return tuple(int(size) for size in sizes)

    def _scaled(self, scaler: StandardScaler | None, values: Array) -> Array:
        return values if scaler is None else np.asarray(scaler.transform(values))

    # --- predicting ----------------------------------------------------------------------------

    def _checked(self, X: Any) -> Array:
        """Return inputs to predict from, scaled as those of `fit`.

        Raises:
            NotFittedError: Before `fit`.
        """
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        return self._scaled(self.scaler_, X)

    def _outputs(self, X: Array) -> torch.Tensor:
        """Return what the module predicts, on the CPU."""
        like = first_weight(self.module_)
        found = []
        with torch.no_grad(), evaluating(self.module_):
            for start in range(0, len(X), _AT_ONCE):
                rows = X[start : start + _AT_ONCE]
                inputs = torch.tensor(rows, dtype=like.dtype, device=like.device)
                outputs = call_model(self.module_, inputs).outputs
                if outputs is None:
                    raise UsageError(
                        "module must return predictions: let it return a tensor, or an object with "
                        "'logits', got its loss alone"
                    )
                found.append(outputs.detach().cpu())
        return torch.cat(found)

    # --- the audit -----------------------------------------------------------------------------

    @property
    def audit_(self) -> pd.DataFrame:
        """The training rows, the most suspect first: `ift_tune.audit` of the fit's run.

        Computed when it is first asked for, by a few trainings more. Column ``row`` is the position
        in `X`, ``index`` that in the training split. Of several targets there is no one label to
        be given or suggested, which is NaN. What it takes, the rows of the fit among it, travels
        with the estimator until then, if it is not large.

        Raises:
            AttributeError: If no weight was learned for each example, or the run has been left.
        """
        check_is_fitted(self)
        if "_audit" not in vars(self):
            if "_audited" not in vars(self):
                raise AttributeError(self._no_audit())
            awaited = self._audited
            table = audit(awaited.home.path, awaited.recipe, folds=0, device=self.device)
            table.insert(1, "row", self.split_["train"][table["index"].to_numpy()])
            if awaited.recipe.train.targets.ndim == 1:
                for column in ("given_label", "suggested_label"):
                    table[column] = self._as_given(table[column].to_numpy())
            self._audit = table
            del self._audited  # and the folder, unless a copy still has it
        return self._audit

    def _no_audit(self) -> str:
        """Return why there is none."""
        if (size := vars(self).get("_audit_left")) is not None:
            return (
                "audit_ was left behind when the estimator was pickled or copied: ask the fitted "
                f"one for it before, got {size / 2**20:.0f} MB of rows and run, of which at most "
                f"{_MOST_AWAITED // 2**20} travel"
            )
        return (
            "audit_ is there after a fit that has learned a weight for each row: fit with "
            f"tune='example_weights', got tune={shown(self.tune)}"
        )

    @abc.abstractmethod
    def _as_given(self, targets: Array) -> Array:
        """Return targets of the problem in the form that `fit` was given them in."""

    def _forget_audit(self) -> None:
        """Drop what an earlier fit has left for the audit."""
        for name in ("_audited", "_audit", "_audit_left"):
            self.__dict__.pop(name, None)

    # --- travelling ----------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled and copied, the module on the CPU."""
        state: dict[str, Any] = {**super().__getstate__()}
        if "_audited" in state and (size := state["_audited"].size) > _MOST_AWAITED:
            del state["_audited"]
            state["_audit_left"] = size
        if "module_" in state:
            state["module_"] = copy.deepcopy(state["module_"]).cpu()
        return state


def refuse_others(given: Mapping[str, object]) -> None:
    """Raise a `UsageError` if `fit` was given more than it takes.

    Weights of rows cannot be handed to a splitter and three losses and keep what is promised of
    them, that a weight of 2 is the row twice: who needs that gives the rows so.
    """
    if given.get("sample_weight") is not None:
        raise UsageError(
            "fit takes no sample_weight: repeat rows by their weights, or draw them, as by "
            "rng.choice(len(X), len(X), p=weights / weights.sum()), or have weights learned by "
            f"tune='example_weights' or 'class_weights', got {shown(given['sample_weight'])}"
        )
    for name in given.keys() - {"sample_weight"}:
        known = ("X", "y", "X_val", "y_val")
        raise UsageError(f"fit takes {', '.join(known)}{nearest(name, known)}, got {name}")


def require_both(X_val: object, y_val: object) -> None:
    """Raise a `UsageError` unless validation rows come with their targets, or neither is there."""
    if (X_val is None) != (y_val is None):
        there, lacking = ("X_val", "y_val") if y_val is None else ("y_val", "X_val")
        raise UsageError(f"X_val and y_val go together: give {lacking} too, got {there} alone")
