"""Kinds of hyperparameters, one a file. A new one is a file here and a line in `KINDS`."""

from ift_tune.hyper.affine_color import AffineColorAugmentation
from ift_tune.hyper.augmentation_network import AugmentationNetwork
from ift_tune.hyper.base import CoarseParameter, Compose, HyperKind
from ift_tune.hyper.class_weights import ClassWeights
from ift_tune.hyper.distilled_data import DistilledData
from ift_tune.hyper.dropout_rates import DropoutRates
from ift_tune.hyper.dropout_sites import DropoutSite
from ift_tune.hyper.example_weights import ExampleWeights
from ift_tune.hyper.l1_decay import L1Decay
from ift_tune.hyper.label_smoothing import LabelSmoothing
from ift_tune.hyper.loss_mixture import LossMixture
from ift_tune.hyper.weight_decay import WeightDecay

KINDS: dict[str, type[HyperKind]] = {
    kind.name: kind
    for kind in (
        WeightDecay,
        ExampleWeights,
        AugmentationNetwork,
        AffineColorAugmentation,
        DropoutRates,
        DistilledData,
        LabelSmoothing,
        ClassWeights,
        LossMixture,
        L1Decay,
    )
}
"""Every elementary kind by name."""

__all__ = [
    "KINDS",
    "AffineColorAugmentation",
    "AugmentationNetwork",
    "ClassWeights",
    "Compose",
    "DistilledData",
    "DropoutRates",
    "DropoutSite",
    "ExampleWeights",
    "HyperKind",
    "CoarseParameter",
    "L1Decay",
    "LabelSmoothing",
    "LossMixture",
    "WeightDecay",
]
