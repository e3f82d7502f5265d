"""The space of meta-hyperparameters that the outer search walks, for Optuna and for Ray Tune."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ift_tune.config import FlatValue, MetaConfig
from ift_tune.errors import UsageError, nearest
from ift_tune.inverse import INVERSES
from ift_tune.search.distributions import Choice, Distribution, Float, Int, Space


@dataclass(frozen=True)
class MetaSpace(Space):
    """Distributions over flat `MetaConfig` keys; what is not in the space keeps its default.

    Where the inverse itself varies, keys that the drawn one does not have are left out.

    Attributes:
        distributions: By key.

    Raises:
        UsageError: If a key is no meta-hyperparameter, or `alpha` and `alpha_scale` both vary.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in self.distributions:
            if key not in MetaConfig.flat_keys():
                raise UsageError(
                    f"{key} is not a meta-hyperparameter{nearest(key, MetaConfig.flat_keys())}"
                )
        if {"alpha", "alpha_scale"} <= set(self.distributions):
            raise UsageError("vary alpha or alpha_scale, not both: each sets Neumann's step")

    @classmethod
    def default(cls) -> MetaSpace:
        """Return ranges for Neumann's terms and α, the meta learning rate and the inner steps."""
        return cls(
            {
                "terms": Int(0, 20),
                "alpha": Float(1e-3, 1.0, log=True),
                "meta_lr": Float(1e-3, 0.3, log=True),
                "inner_steps": Int(5, 50, log=True),
            }
        )

    @classmethod
    def parse(cls, texts: Mapping[str, str]) -> MetaSpace:
        """Build from ``{"alpha": "0.001:1:log", "terms": "0:20", "inverse": "identity,neumann"}``.

        Raises:
            UsageError: If a text is neither LOW:HIGH, LOW:HIGH:log nor A,B,C.
        """
        return cls({key: _parse(key, text) for key, text in texts.items()})

    def check(self, config: MetaConfig) -> None:
        """Raise the `UsageError` that some point of the space would give, before any trial runs.

        Tried are all combinations of choices, with all ranges at their low end, inside, and high.

        Args:
            config: The defaults that a point changes.
        """
        choices = {k: d.options for k, d in self.distributions.items() if isinstance(d, Choice)}
        for options in itertools.product(*choices.values()):
            for fraction in (0.0, 0.618, 1.0):
                point = dict(zip(choices, options, strict=True)) | {
                    key: d.at(fraction)
                    for key, d in self.distributions.items()
                    if not isinstance(d, Choice)
                }
                config.updated(
                    {key: point[key] for key in self._order() if self._applies(key, point)}
                )

    def applicable(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return `values` without the keys of the space that the drawn inverse does not have.

        Ray Tune draws all keys, whatever inverse is drawn beside them. Keys that are not in the
        space are kept: whoever wrote them means them.
        """
        return {
            k: v
            for k, v in values.items()
            if k not in self.distributions or self._applies(k, values)
        }

    def _order(self) -> list[str]:
        """Return the keys with the inverse first: which others apply depends on it."""
        return sorted(self.distributions, key=lambda key: key != "inverse")

    def _applies(self, key: str, point: Mapping[str, Any]) -> bool:
        """Return whether the inverse that a point names, if it names one, has the key."""
        inverse = INVERSES.get(str(point.get("inverse")))
        if inverse is None or key in {item.name for item in fields(MetaConfig)}:
            return True
        return key in {item.name for item in fields(inverse)}


def parse_value(text: str) -> FlatValue:
    """Return the number, truth value or word that a command line gives for a key."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _parse(key: str, text: str) -> Distribution:
    if "," in text:
        return Choice(tuple(parse_value(part) for part in text.split(",")))
    low_text, _, rest = text.partition(":")
    high_text, _, scale = rest.partition(":")
    low, high = parse_value(low_text), parse_value(high_text)
    numbers = isinstance(low, int | float) and isinstance(high, int | float)
    if scale not in ("", "log") or not numbers:
        raise UsageError(
            f"{key}={text} is not a range: write {key}=LOW:HIGH, {key}=LOW:HIGH:log or {key}=A,B"
        )
    whole = isinstance(low, int) and isinstance(high, int)
    if whole and key in MetaConfig.integer_keys():
        return Int(low, high, log=bool(scale))  # type: ignore[arg-type]
    return Float(float(low), float(high), log=bool(scale))  # type: ignore[arg-type]
