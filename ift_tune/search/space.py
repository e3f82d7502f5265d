"""The space of meta-hyperparameters that the outer search walks, for Optuna and for Ray Tune."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ift_tune.base.arguments import require_instance, shown
from ift_tune.base.errors import MissingDependencyError, UsageError, nearest
from ift_tune.implicit.inverse import INVERSES
from ift_tune.joint.config import MetaConfig
from ift_tune.joint.flat import CHOICES, USER, Flat, FlatValue
from ift_tune.search.distributions import Choice as Choice  # this was their home once
from ift_tune.search.distributions import Distribution as Distribution
from ift_tune.search.distributions import Float as Float
from ift_tune.search.distributions import Int as Int
from ift_tune.search.distributions import as_distribution

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class Space:
    """Distributions by name; Optuna's and Ray Tune's are turned into the package's own.

    Attributes:
        distributions: By name.

    Raises:
        UsageError: If there is none.
    """

    distributions: Mapping[str, Distribution]

    def __post_init__(self) -> None:
        require_instance(
            "a space", self.distributions, Mapping, 'a mapping such as {"terms": Int(0, 20)}'
        )
        own = {key: as_distribution(key, d) for key, d in self.distributions.items()}
        object.__setattr__(self, "distributions", own)
        if not self.distributions:
            raise UsageError(
                "the space is empty: there is nothing to search; one trial by itself is run_single"
            )

    def suggest(self, trial: optuna.trial.BaseTrial) -> Flat:
        """Return one point, drawn by an Optuna trial."""
        point: Flat = {}
        for key in self._order():
            if not self._applies(key, point):
                continue
            d = self.distributions[key]
            if isinstance(d, Int):
                point[key] = trial.suggest_int(key, d.low, d.high, log=d.log, step=d.step or 1)
            elif isinstance(d, Float):
                point[key] = trial.suggest_float(key, d.low, d.high, log=d.log, step=d.step)
            else:
                point[key] = trial.suggest_categorical(key, d.options)
        return point

    def clipped(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return `values` with those of ranges moved to the nearest value inside.

        Population based training multiplies values without looking at the ranges.
        """
        return {**values} | {
            key: d.nearest(values[key])
            for key, d in self.distributions.items()
            if key in values and not isinstance(d, Choice)
        }

    def first(self) -> Flat:
        """Return the low ends of the ranges, and the first of the options."""
        return {
            key: d.options[0] if isinstance(d, Choice) else d.low
            for key, d in self.distributions.items()
        }

    def check(self, config: MetaConfig) -> None:
        """Raise the `UsageError` that some point would give, before any trial runs."""

    def applicable(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values that mean something beside each other."""
        return dict(values)

    def _order(self) -> list[str]:
        """Return the names in the order in which they are drawn."""
        return list(self.distributions)

    def _applies(self, key: str, point: Mapping[str, Any]) -> bool:
        """Return whether `key` means anything beside what is drawn already."""
        return True

    def to_optuna(self) -> dict[str, optuna.distributions.BaseDistribution]:
        """Return the space for ``study.ask(fixed_distributions)``."""
        from optuna import distributions as optuna_distributions

        found: dict[str, optuna.distributions.BaseDistribution] = {}
        for key, d in self.distributions.items():
            if isinstance(d, Int):
                found[key] = optuna_distributions.IntDistribution(
                    d.low, d.high, log=d.log, step=d.step or 1
                )
            elif isinstance(d, Float):
                found[key] = optuna_distributions.FloatDistribution(
                    d.low, d.high, log=d.log, step=d.step
                )
            else:
                found[key] = optuna_distributions.CategoricalDistribution(d.options)
        return found

    def to_ray(self) -> dict[str, Any]:
        """Return the space as a Ray Tune ``param_space``.

        Raises:
            MissingDependencyError: If Ray Tune is not installed.
        """
        try:
            from ray import tune
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                "to_ray needs Ray Tune: pip install 'ift_tune[ray]'"
            ) from error
        found: dict[str, Any] = {}
        for key, d in self.distributions.items():
            if isinstance(d, Choice):
                found[key] = tune.choice(list(d.options))
            elif d.step is not None:
                # Ray's steps are multiples: of others the values are listed.
                multiples = d.values() == [d.step * round(v / d.step) for v in d.values()]
                quantized: Any = tune.qrandint if isinstance(d, Int) else tune.quniform
                found[key] = (
                    quantized(d.low, d.high, d.step) if multiples else tune.choice(d.values())
                )
            elif isinstance(d, Int):  # Ray's upper ends are excluded
                found[key] = (tune.lograndint if d.log else tune.randint)(d.low, d.high + 1)
            else:
                found[key] = (tune.loguniform if d.log else tune.uniform)(d.low, d.high)
        return found

    def to_json(self) -> dict[str, Any]:
        """Return plain values that tell one space from another."""
        # Without a step that is not there: spaces of before there were steps keep their identity.
        return {
            key: {"kind": type(d).__name__}
            | {k: v for k, v in asdict(d).items() if k != "step" or v is not None}
            for key, d in self.distributions.items()
        }


@dataclass(frozen=True)
class MetaSpace(Space):
    """Distributions over flat `MetaConfig` keys; what is not in the space keeps its default.

    Keys of the user's own, ``user.NAME``, reach the problem factory as ``config.user["NAME"]``.
    Where the inverse itself varies, keys that the drawn one does not have are left out.

    A distribution is an `Int`, `Float` or `Choice`, or one of Optuna's, or a domain of Ray Tune's
    (``tune.loguniform(1e-3, 1.0)``), which becomes one of these.

    Attributes:
        distributions: By key.

    Raises:
        UsageError: If a key is no meta-hyperparameter, a range of numbers stands for an integer,
            or `alpha` and `alpha_scale` both vary.

    Example:
        >>> import optuna
        >>> from ift_tune import Choice, Int, MetaSpace
        >>> space = MetaSpace({"inverse": Choice(("identity", "neumann")), "terms": Int(1, 20)})
        >>> space.suggest(optuna.trial.FixedTrial({"inverse": "neumann", "terms": 3}))
        {'inverse': 'neumann', 'terms': 3}
        >>> space.suggest(optuna.trial.FixedTrial({"inverse": "identity"}))  # it has no terms
        {'inverse': 'identity'}
        >>> sorted(MetaSpace.parse({"terms": "0:20", "meta_lr": "0.001:0.1:log"}).distributions)
        ['meta_lr', 'terms']
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in self.distributions:
            if not MetaConfig.is_key(key):
                raise UsageError(
                    f"{key} is not a meta-hyperparameter{nearest(key, MetaConfig.flat_keys())}; "
                    "keys of your own are written user.NAME, and reach the factory as config.user"
                )
        integers = MetaConfig.integer_keys()
        for key, d in self.distributions.items():
            if (
                isinstance(d, Float)
                and key in integers
                and not (d.step and float(d.step).is_integer() and float(d.low).is_integer())
            ):
                raise UsageError(
                    f"{key} takes integers: vary it by Int({math.ceil(d.low)}, "
                    f"{math.floor(d.high)}), got {shown(d)}"
                )
        for group in {group for kind in INVERSES.values() for group in kind.alternatives}:
            varied = [key for key in group if key in self.distributions]
            if len(varied) > 1:
                raise UsageError(f"vary {' or '.join(varied)}, not both: they exclude each other")

    @classmethod
    def default(cls) -> MetaSpace:
        """Return ranges for Neumann's terms and α, the meta learning rate and the inner steps."""
        return cls(
            {
                "terms": Int(0, 20),
                "alpha_scale": Float(0.1, 1.5),  # of 1/λ_max: the same range for every model
                "meta_lr": Float(1e-3, 0.3, log=True),
                "inner_steps": Int(5, 50, log=True),
            }
        )

    @classmethod
    def parse(cls, texts: Mapping[str, str]) -> MetaSpace:
        """Build from ``{"meta_lr": ".01:1:log", "terms": "0:20", "inverse": "neumann,dense"}``.

        Raises:
            UsageError: If a text is neither LOW:HIGH, LOW:HIGH:log, LOW:HIGH:STEP nor A,B,C.
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
        """Return the keys with the inverse first: which others apply depends on what is chosen."""
        first = [key for key in CHOICES if key in self.distributions]
        return [*first, *(key for key in self.distributions if key not in first)]

    def _applies(self, key: str, point: Mapping[str, Any]) -> bool:
        """Return whether the inverse that a point names, if it names one, has the key."""
        return MetaConfig.applies(key, point)


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
    step = None if scale in ("", "log") else parse_value(scale)
    ends = [low, high] if step is None else [low, high, step]
    if not all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends):
        raise UsageError(
            f"{key}={text} is not a range: write {key}=LOW:HIGH, {key}=LOW:HIGH:log, "
            f"{key}=LOW:HIGH:STEP or {key}=A,B"
        )
    whole = all(isinstance(end, int) for end in ends)
    kind: Any = Int
    if not whole or not (key in MetaConfig.integer_keys() or key.startswith(USER)):
        kind, ends = Float, [float(end) for end in ends]  # type: ignore[arg-type]
    distribution: Distribution = kind(*ends[:2], log=scale == "log", step=(*ends, None)[2])
    return distribution
