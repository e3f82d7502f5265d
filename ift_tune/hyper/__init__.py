"""Kinds of hyperparameters, one a file. A new one is a file here and a line in `KINDS`."""

from ift_tune.hyper.base import Compose, HyperKind
from ift_tune.hyper.example_weights import ExampleWeights
from ift_tune.hyper.knobs import Knob
from ift_tune.hyper.weight_decay import WeightDecay

KINDS: dict[str, type[HyperKind]] = {kind.name: kind for kind in (WeightDecay, ExampleWeights)}
"""Every elementary kind by name."""

__all__ = ["KINDS", "Compose", "ExampleWeights", "HyperKind", "Knob", "WeightDecay"]
