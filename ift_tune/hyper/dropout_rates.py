"""Dropout rates: of whole layers, of units, or of every single weight."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ift_tune.base.arguments import shown
from ift_tune.base.errors import UsageError, require_number
from ift_tune.base.views import Histogram, View
from ift_tune.hyper.arguments import require_mapping, require_model
from ift_tune.hyper.base import CoarseParameter, HyperKind
from ift_tune.hyper.dropout_sites import DropoutSite, find
from ift_tune.hyper.named_state import NamedState
from ift_tune.hyper.pictures import heat_map, quantiles, sample
from ift_tune.hyper.transforms import Init, initialise
from ift_tune.implicit.vectors import flatten, named

_LEAST_RATE, _MOST_RATE = 1e-3, 0.9
_MOST_NUMBERS = 20  # of a summary


class DropoutRates(NamedState, HyperKind):
    """Dropout at named sites of a model, with rates p = sigmoid(λ).

    A value x becomes x·(1 − z)/(1 − p), where z is 1 with probability p, made differentiable by
    the concrete relaxation: z = sigmoid((logit p + logit u)/t), u uniform on (0, 1), t the
    temperature (Maddison, Mnih, Teh 2017; for dropout rates Gal, Hron, Kendall 2017). Lorraine,
    Vicol, Duvenaud 2020, section 5.4, tune such rates of an LSTM.

    Where a site has many rates, λ is a number common to the site plus each rate's own.

    It acts inside ``applied()``: elsewhere the model has no dropout at all, in whatever mode it
    is, so validation is clean. Masks of parameters are drawn when the context begins, masks of
    outputs at each call.

    Example:
        >>> import torch, ift_tune
        >>> nn = torch.nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ELU(), nn.Linear(8, 3))
        >>> sites = {"1": ift_tune.DropoutSite("unit", units=8), "2.weight": ift_tune.DropoutSite()}
        >>> kind = ift_tune.DropoutRates(model, sites, init=0.25)
        >>> kind.summary()
        {'1': 0.25, '2.weight': 0.25}
        >>> inputs = torch.ones(1, 4)
        >>> with kind.applied():
        ...     first, second = model(inputs), model(inputs)
        >>> torch.equal(first, second), torch.equal(model(inputs), model(inputs))
        (False, True)
    """

    name: ClassVar[str] = "dropout_rates"

    def __init__(
        self,
        model: nn.Module,
        sites: Mapping[str, DropoutSite],
        *,
        init: Init = 0.1,
        temperature: float = 0.1,
    ) -> None:
        """Make the raw parameters λ, on the device and of the dtype of the weights.

        Args:
            model: Where the sites are. It is not registered as a submodule.
            sites: By the name of a submodule, whose outputs are dropped, or of a parameter, whose
                entries are; as ``model.named_modules()`` and ``named_parameters()`` have them.
            init: The rate to start from, in (0, 1); or a function that fills in place each rate's
                own λ, or the one λ of a site.
            temperature: t, above 0. The lower, the closer masks are to 0 and 1, and the noisier
                the gradient by λ.

        Raises:
            UsageError: If an argument is not one of these, or a site is not in the model.
        """
        super().__init__()
        require_model(model)
        require_mapping("sites", sites, "names in the model to DropoutSite(...)")
        if not sites or not all(isinstance(site, DropoutSite) for site in sites.values()):
            raise UsageError(
                f"sites must map names in the model to DropoutSite(...), got {shown(sites)}"
            )
        require_number("temperature", temperature, above=0.0)
        self.temperature = temperature
        # In a list, where nn.Module does not register the model's weights as hyperparameters.
        self._model = [model]
        self._places = [find(model, name, site) for name, site in sites.items()]
        like = next(iter(named(model, "the model").values()))
        # The gradient by a single rate is mostly noise, for it sees one mask; the sum over a site
        # is not. So the common number is learned in tens of outer steps, long before the others.
        common, own = [], []
        for place in self._places:
            shape, one = place.shape(model), place.site.per == "site"
            common.append(like.detach().new_zeros(()))
            own += [] if one else [like.detach().new_zeros(shape)]
            filled = own[-1] if callable(init) and not one else common[-1]
            initialise(filled, init, torch.logit, "a rate in (0, 1)")
        self.common = nn.ParameterList(nn.Parameter(raw) for raw in common)
        self.own = nn.ParameterList(nn.Parameter(raw) for raw in own)

    def meaning(self) -> dict[str, list[Any]]:
        """Return the sites, and what has a rate at each."""
        places = self._places
        return {"sites": [p.name for p in places], "per": [str(p.site.per) for p in places]}

    @property
    def made_of(self) -> nn.Module:
        """The model where the sites are."""
        return self._model[0]

    def logits(self) -> list[Tensor]:
        """Return λ of each site: a scalar, (units,), (rows, 1, ...) or the parameter's shape."""
        own = iter(self.own)
        return [
            common if place.site.per == "site" else common + next(own)
            for place, common in zip(self._places, self.common, strict=True)
        ]

    def rates(self) -> dict[str, Tensor]:
        """Return p = sigmoid(λ) of each site, by its name."""
        names = [place.name for place in self._places]
        return {n: torch.sigmoid(logit) for n, logit in zip(names, self.logits(), strict=True)}

    def factors(self, logit: Tensor, shape: Sequence[int]) -> Tensor:
        """Return (1 − z)/(1 − p) with fresh noise of `shape`, which λ = `logit` broadcasts to."""
        noise = torch.rand(shape, dtype=logit.dtype, device=logit.device).logit_()
        # 1 − sigmoid(x) = sigmoid(−x), and 1/(1 − p) = 1 + exp(λ)
        return torch.sigmoid((logit + noise) / -self.temperature) * (1.0 + logit.exp())

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Let dropout act at all sites; afterwards hooks and masks are gone, whatever happened."""
        (model,) = self._model
        with contextlib.ExitStack() as stack:
            for place, logit in zip(self._places, self.logits(), strict=True):
                stack.enter_context(place.dropping(model, partial(self.factors, logit)))
            yield

    @torch.no_grad()
    def learned(self) -> dict[str, Tensor]:
        """Return the rates of each site."""
        return self.rates()

    def summary(self) -> dict[str, float]:
        """Return the mean rate of each site; quantiles of all where there are many sites."""
        rates = self.rates()
        if len(rates) > _MOST_NUMBERS:
            return quantiles(flatten(list(rates.values())))
        return {name: float(rate.detach().mean()) for name, rate in rates.items()}

    @torch.no_grad()
    def views(self) -> list[View]:
        """Return how the rates of each site are distributed, and maps of those of matrices."""
        rates = self.rates()
        maps = [
            heat_map(f"dropout rates of {name}", rate, "row", "column")
            for name, rate in rates.items()
            if rate.ndim > 1 and rate[0].numel() > 1
        ]
        counted = {name: sample(rate) for name, rate in rates.items()}
        return [Histogram("dropout rates", counted, axis="rate"), *maps]

    def coarse_space(self) -> dict[str, CoarseParameter]:
        """Return a rate for each site."""
        return {
            name: CoarseParameter.near(
                _LEAST_RATE, _MOST_RATE, float(rate.detach().log().mean().exp())
            )
            for name, rate in self.rates().items()
        }

    @torch.no_grad()
    def set_coarse(self, values: Mapping[str, float]) -> None:
        """Give all of a site the same rate."""
        for own in self.own:
            own.zero_()
        for place, common in zip(self._places, self.common, strict=True):
            initialise(common, values[place.name], torch.logit, "a rate in (0, 1)")

    @classmethod
    def example(cls, model: nn.Module, inputs: Tensor) -> HyperKind:
        """Drop what enters the last linear layer, and the weights of the first."""
        names = [name for name, _ in model.named_modules() if name]
        linear = {n: m for n in names if isinstance(m := model.get_submodule(n), nn.Linear)}
        first, *_, last = linear
        before = names[names.index(last) - 1]
        sites = {
            before: DropoutSite("unit", units=linear[last].in_features),
            f"{first}.weight": DropoutSite("weight"),
        }
        return cls(model, sites, init=0.2, temperature=0.5)
