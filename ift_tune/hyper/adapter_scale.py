"""A scale for each adapter of a frozen model: how much each may change what the model does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ift_tune.base.errors import UsageError, require_integer, require_number
from ift_tune.base.views import Histogram, View
from ift_tune.hyper.adapter_folding import fold
from ift_tune.hyper.adapter_layers import labels_of
from ift_tune.hyper.adapter_sites import LoraSite, find_sites
from ift_tune.hyper.arguments import require_model
from ift_tune.hyper.base import CoarseParameter, HyperKind
from ift_tune.hyper.pictures import quantiles, sample
from ift_tune.hyper.transforms import Init, get_transform, initialise
from ift_tune.implicit.vectors import named

_LEAST, _MOST = 0.05, 20.0  # alpha over rank is searched from a few hundredths to tens
_MOST_FACTORS = 12  # as for decays
_MOST_NUMBERS = 20  # of a summary
_SHOWN = 5  # adapters at each end, in words
_BOUNDS = "a scale above 0"


class AdapterScale(HyperKind):
    """A positive scale s for each adapter: of LoRA, W·x becomes W·x + s·(α/r)·B·A·x.

    A LoRA layer is a module with ``lora_A``, ``lora_B`` and ``scaling``, the number by which its
    forward multiplies the adapter's contribution, or numbers by the names of several adapters:
    those of peft and of loralib are of that form, and so is one of your own. Of any other submodule
    that is named, an adapter between layers or a branch, the output is scaled.

    The scale is part of the model and not of the training loss alone: from now on whoever calls
    the model has it, so the validation loss depends on λ directly as well as through the
    weights. At a minimum of the training loss without a decay the two cancel, for then B makes
    up for any s: give the adapters a decay (`WeightDecay`), beside which a scale says how
    strongly each of them is held back, or few inner steps.

    Example:
        >>> import torch, ift_tune
        >>> class LoRA(torch.nn.Module):
        ...     def __init__(self, base, rank, alpha):
        ...         super().__init__()
        ...         self.base, self.scaling = base.requires_grad_(False), alpha / rank
        ...         self.lora_A = torch.nn.Linear(base.in_features, rank, bias=False)
        ...         self.lora_B = torch.nn.Linear(rank, base.out_features, bias=False)
        ...     def forward(self, x):
        ...         return self.base(x) + self.scaling * self.lora_B(self.lora_A(x))
        >>> layers = [LoRA(torch.nn.Linear(4, 4), 2, 4) for _ in range(2)]
        >>> model = torch.nn.Sequential(*layers)
        >>> kind = ift_tune.AdapterScale(model)
        >>> kind.summary()
        {'0': 1.0, '1': 1.0}
        >>> with torch.no_grad():
        ...     _ = kind.raw[1].fill_(-8.0)  # as learned
        >>> kind.pattern(rank=2, threshold=0.05)["target_modules"]
        ['0']
    """

    name: ClassVar[str] = "adapter_scale"

    def __init__(
        self,
        model: nn.Module,
        modules: str | Sequence[str] | None = None,
        *,
        adapter: str | None = None,
        init: Init = 1.0,
        transform: Literal["softplus", "exp"] = "softplus",
    ) -> None:
        """Put a scale into each of the adapters, in the place of an earlier kind's.

        Args:
            model: Where the adapters are. It is not registered as a submodule.
            modules: Names of submodules as ``model.named_modules()`` has them, or patterns such as
                ``"*.attn.*"``, which choose among the LoRA layers where they fit some; None for
                all LoRA layers.
            adapter: Which adapter is scaled where layers have several by name.
            init: The scale to start from, above 0; or a function that fills the raw λ in place.
            transform: s of λ: ``"softplus"`` or ``"exp"``, which moves small and large scales by
                the same factors.

        Raises:
            UsageError: If an argument is not one of these, or the model has no such adapters.
        """
        super().__init__()
        require_model(model)
        self.transform = get_transform(transform, ("softplus", "exp"))
        like = next(iter(named(model, "the model").values()))
        start = like.detach().new_zeros(())
        initialise(start, init if not callable(init) else 1.0, self.transform.inverse, _BOUNDS)
        # In a list, where nn.Module does not register the model's weights as hyperparameters.
        self._model = [model]
        self.sites = find_sites(model, modules, adapter, lambda number: partial(self.scale, number))
        self.raw = nn.Parameter(start.repeat(len(self.sites)))
        if callable(init):
            initialise(self.raw, init, self.transform.inverse, _BOUNDS)
        self.names = tuple(labels_of(site.name for site in self.sites))

    def scale(self, number: int) -> Tensor:
        """Return the scale of one adapter, a scalar."""
        return self.transform.forward(self.raw[number])

    def forward(self) -> Tensor:
        """Return the scales in the order of `names`, shape (adapters,)."""
        return self.transform.forward(self.raw)

    @property
    def made_of(self) -> nn.Module:
        """The model where the adapters are."""
        return self._model[0]

    def layers(self) -> dict[str, nn.Module]:
        """Return the scaled modules by their names."""
        return {name: site.module for name, site in zip(self.names, self.sites, strict=True)}

    def applied(self) -> AbstractContextManager[None]:
        """Return a context that does nothing: the scales are in the model, which is made sure of.

        Raises:
            UsageError: If they are no longer there.
        """
        gone = [site.name for site in self.sites if not site.acts]
        if gone:
            raise UsageError(
                "the scales of an AdapterScale must be in the model: they leave it by fold(), and "
                "where a later AdapterScale is made for it; make a new model and a new kind, got "
                f"none in {', '.join(gone[:3])}"
            )
        return super().applied()

    def in_use(self) -> dict[str, bool]:
        """Return which scales have acted in a call of the model."""
        named_sites = zip(self.names, self.sites, strict=True)
        return {f"the scale of {name}": site.reached for name, site in named_sites}

    def fold(self, inputs: Any = None) -> None:
        """Multiply the scales into the adapters' weights (of LoRA, into B) and leave the model.

        The model does what it did, without this kind: do it before adapters are merged, saved
        by their library, or exported. So calls of the model must come by the scaled modules, whose
        weights nothing else in it has. A function that uses a weight by itself beside the module
        shows in what the model returns alone: give inputs to be compared on.

        Args:
            inputs: Of a batch, as the model is given them: a tensor, or inputs by name. The model
                is called with them before and after, in evaluation mode. None: nothing is compared,
                and calls that the model has had before show that the scales act.

        Raises:
            UsageError: If a scaled module has no weights that it can be multiplied into, or others
                have them too; calls of the model pass it by; the model returns something else
                afterwards; or the scales are not in the model any more. Then all is as it was.
        """
        self.applied()
        fold(self._model[0], self.sites, inputs)

    def pattern(self, rank: int, threshold: float = 0.0) -> dict[str, Any]:
        """Return what `peft.LoraConfig` is to be told: which modules, of what rank and alpha.

        The largest scale gets `rank`, others a rank in proportion to theirs, at least 1. Alphas
        are such that each multiplies as it does now, with its scale. So
        ``LoraConfig(**kind.pattern(rank=8, threshold=0.1))`` adapts what has been found worth it.

        Args:
            rank: Of the module with the largest scale.
            threshold: Modules with a smaller scale are left out.

        Returns:
            ``r`` and ``lora_alpha``, those of the module with the largest scale;
            ``target_modules``, the names of those that are kept; and ``rank_pattern`` and
            ``alpha_pattern`` of all of these.

        Raises:
            UsageError: If none is left, or a scaled module is no LoRA layer.
        """
        require_integer("rank", rank, 1)
        require_number("threshold", threshold, least=0.0)
        sites = [site for site in self.sites if isinstance(site, LoraSite)]
        if len(sites) < len(self.sites):
            others = [site.name for site in self.sites if not isinstance(site, LoraSite)]
            raise UsageError(
                "pattern() must be asked of LoRA layers, which have a rank: leave others out of "
                f"modules=, got {', '.join(others[:3])}"
            )
        scales = dict(zip(self.names, self().detach().double().tolist(), strict=True))
        kept = {n: s for n, s in zip(self.names, sites, strict=True) if scales[n] >= threshold}
        if not kept:
            raise UsageError(
                f"threshold must leave a module: the largest scale is {max(scales.values()):.3g}, "
                f"got {threshold}"
            )
        most = max(scales[name] for name in kept)
        ranks = {name: max(1, round(rank * scales[name] / most)) for name in kept}
        alphas = {name: site.alpha(ranks[name], scales[name]) for name, site in kept.items()}
        first = max(kept, key=lambda name: scales[name])
        return {
            "r": rank,
            "lora_alpha": alphas[first],
            "target_modules": list(kept),
            "rank_pattern": ranks,
            "alpha_pattern": alphas,
        }

    def coarse_space(self) -> dict[str, CoarseParameter]:
        """Return a scale for all, and factors of it for the modules of a small model."""
        with torch.no_grad():
            mean = float(self().double().log().mean().exp())
        found = {"scale": CoarseParameter.near(_LEAST, _MOST, mean)}
        if 1 < len(self.names) <= _MOST_FACTORS:
            found |= {
                f"factor.{name}": CoarseParameter(0.1, 10.0, 1.0, secondary=True)
                for name in self.names
            }
        return found

    @torch.no_grad()
    def set_coarse(self, values: Mapping[str, float]) -> None:
        """Give every adapter the scale, times its factor."""
        for raw, name in zip(self.raw, self.names, strict=True):
            value = values["scale"] * values.get(f"factor.{name}", 1.0)
            initialise(raw, value, self.transform.inverse, _BOUNDS)

    @torch.no_grad()
    def learned(self) -> dict[str, Tensor]:
        """Return the scale of each adapter."""
        return dict(zip(self.names, self().unbind(), strict=True))

    @torch.no_grad()
    def summary(self) -> dict[str, float]:
        """Return the scale of each adapter; quantiles where there are many."""
        scales = self()
        if len(self.names) > _MOST_NUMBERS:
            return quantiles(scales)
        return dict(zip(self.names, scales.tolist(), strict=True))

    @torch.no_grad()
    def words(self) -> str:
        """Return the scales in a sentence, the largest first; of many, the ends."""
        ordered = sorted(zip(self().tolist(), self.names, strict=True), reverse=True)
        told = [f"{name} {scale:.3g}" for scale, name in ordered]
        if len(told) > 2 * _SHOWN:
            told = [*told[:_SHOWN], f"... ({len(told)} in all)", *told[-_SHOWN:]]
        return f"adapter scale: {', '.join(told)}"

    @torch.no_grad()
    def views(self) -> list[View]:
        """Return how the scales are distributed."""
        return [Histogram("scales of the adapters", {"all": sample(self())}, "scale", log=True)]

    @classmethod
    def example(cls, model: nn.Module, inputs: Tensor) -> HyperKind:
        """Scale what the linear layers return."""
        linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        return cls(model, linear, init=0.7)
