"""scikit-learn estimators over the package's own trials: a model with hyperparameters learned.

The folder has the name of the library, which is always imported from the top: ``import sklearn``.
"""

from ift_tune.sklearn.classifier import IFTClassifier
from ift_tune.sklearn.regressor import IFTRegressor

__all__ = ["IFTClassifier", "IFTRegressor"]
