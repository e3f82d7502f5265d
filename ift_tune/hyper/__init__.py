"""Kinds of hyperparameters, one a file. A new one is a file here and its line of import below."""

import inspect

from ift_tune.hyper.adapter_scale import AdapterScale as AdapterScale
from ift_tune.hyper.affine_color import AffineColorAugmentation as AffineColorAugmentation
from ift_tune.hyper.augmentation_network import AugmentationNetwork as AugmentationNetwork
from ift_tune.hyper.base import CoarseParameter as CoarseParameter
from ift_tune.hyper.base import Compose as Compose
from ift_tune.hyper.base import HyperKind as HyperKind
from ift_tune.hyper.base import kinds_in as kinds_in
from ift_tune.hyper.decays import L1Decay as L1Decay
from ift_tune.hyper.decays import WeightDecay as WeightDecay
from ift_tune.hyper.distilled_data import DistilledData as DistilledData
from ift_tune.hyper.domain_weights import DomainWeights as DomainWeights
from ift_tune.hyper.dropout_rates import DropoutRates as DropoutRates
from ift_tune.hyper.dropout_sites import DropoutSite as DropoutSite
from ift_tune.hyper.example_scorer import ExampleScorer as ExampleScorer
from ift_tune.hyper.label_smoothing import LabelSmoothing as LabelSmoothing
from ift_tune.hyper.loss_mixture import LossMixture as LossMixture
from ift_tune.hyper.loss_weights import ClassWeights as ClassWeights
from ift_tune.hyper.loss_weights import ExampleWeights as ExampleWeights
from ift_tune.hyper.position_weights import PositionWeights as PositionWeights

KINDS: dict[str, type[HyperKind]] = {
    kind.name: kind
    for kind in tuple(globals().values())
    if isinstance(kind, type) and issubclass(kind, HyperKind) and not inspect.isabstract(kind)
    if kind is not Compose
}
"""Every elementary kind by name: what is imported above joins by that alone."""
