"""A small network that weighs training examples by what it sees of them, unseen ones too."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ift_tune.base.arguments import shown
from ift_tune.base.errors import UsageError, require_number
from ift_tune.base.views import Histogram, View
from ift_tune.hyper.answers import as_positions
from ift_tune.hyper.arguments import require_like, whole_number
from ift_tune.hyper.base import HyperKind
from ift_tune.hyper.pictures import quantiles, require_one_input, sample
from ift_tune.hyper.seen import features_of, in_precision_of, quadrature, sole_input
from ift_tune.hyper.weighing import times
from ift_tune.implicit.vectors import flatten
from ift_tune.problem.modes import evaluating
from ift_tune.problem.outputs import call_model

_TOLD = (0.0, 0.5, 1.0, 2.0, 5.0)  # losses whose weights are shown


class ExampleScorer(HyperKind):
    """The loss of an example x is multiplied by s(x) = sigmoid(network(x)): λ is the network.

    Where `ExampleWeights` has a number for each example of the split, the scorer has a function of
    it, which any other data can be weighed with: `scores` (DataRater, Calian et al. 2025). Its
    number of hyperparameters does not grow with the data, and no loader has to yield an index.

    Scores lie in (0, 1), each for itself. A softmax over the batch, as in DataRater, would make an
    example's weight depend on what else is in its batch: the losses of micro-batches, or of the
    shares of several processes, would not add up to that of the whole.

    It sees the inputs as the loader gives them, before another kind changes them (where a batch
    has one tensor by name, that tensor); or features of them; or the loss ℓ of the example, the
    mean over its answers that count (Meta-Weight-Net, Shu et al. 2019). In that case the training
    loss is ∫₀^ℓ s(u) du, by Gauss and Legendre's quadrature with 16 nodes: a function of weights
    and λ with exact derivatives. In the usual s(ℓ)·ℓ with s(ℓ) detached, autograd's second
    derivatives lack s′(ℓ)·∇ℓ∇ℓᵀ and the hypergradient is wrong; with s(ℓ) attached, the gradient
    weighs an example by s(ℓ) + ℓ·s′(ℓ), which is another weight, and may be negative.

    The gradient of the integral weighs it by s(ℓ) as far as the quadrature is exact: by
    Σₖ aₖ·(s(u) + u·s′(u)) over the nodes u = xₖ·ℓ with their shares aₖ. That is s(ℓ) to .001 where
    the output of a linear network changes by less than 20 between 0 and ℓ. Of steeper ones the
    weight swings about s(ℓ), by up to .13 at a change of 50 and .42 at 100, and may be negative
    too, down to −.01 and −.09.

    Example:
        >>> import torch, ift_tune
        >>> kind = ift_tune.ExampleScorer(64, hidden=8)  # an MLP on 8×8 pixels
        >>> kind.count
        529
        >>> kind.scores(torch.randn(2, 1, 8, 8))
        tensor([0.5000, 0.5000])
        >>> by_loss = ift_tune.ExampleScorer(sees="loss")
        >>> by_loss.weigh(torch.tensor([0.5, 3.0]), index=None).detach()
        tensor([0.2500, 1.5000])
    """

    name: ClassVar[str] = "example_scorer"
    table: Tensor | None
    shown: Tensor | None

    def __init__(
        self,
        network: nn.Module | int | None = None,
        *,
        sees: Literal["inputs", "loss"] = "inputs",
        features: Tensor | Callable[[Any], Tensor] | None = None,
        shown: Tensor | None = None,
        hidden: int = 16,
        init: float = 0.5,
        like: Tensor | None = None,
    ) -> None:
        """Take the network, or draw the weights of an MLP from the global generator.

        Args:
            network: Maps what it sees of B examples to (B,) or (B, 1) numbers; it scores each by
                itself, without batch normalisation. What it sees comes in the precision of its
                first weights. Frozen weights of it are no hyperparameters. Or
                the number of values that it sees of an example: an MLP on those, flattened, with
                one hidden layer. None where that number is known: of a loss, or a table.
            sees: What it is given: the examples' inputs, or their losses, shape (B, 1).
            features: What it is given in place of the inputs: a table with a row for each
                training example, for which the loader yields (inputs, targets, index); or a
                function of the inputs, such as a trained encoder, which is not differentiated.
            shown: Some inputs, or rows of features, whose scores summary and pictures tell.
            hidden: Units of the MLP.
            init: The weight, inside (0, 1), of an example for which the network gives 0: that of
                all examples at the start, for the MLP's last layer starts at 0.
            like: A tensor whose dtype and device λ takes.

        Raises:
            UsageError: If an argument is not one of these.
        """
        super().__init__()
        if sees not in ("inputs", "loss"):
            raise UsageError(f"sees must be 'inputs' or 'loss', got {sees!r}")
        if sees == "loss" and (features is not None or shown is not None):
            raise UsageError("features and shown are for a scorer that does not see the loss")
        require_number("init", init, above=0.0)
        if init >= 1.0:
            raise UsageError(f"init must be a weight between 0 and 1, got {init}")
        require_like(like)
        _require_features(features)
        table = features if isinstance(features, Tensor) else None
        if table is not None and (table.ndim < 2 or not len(table)):
            raise UsageError(
                f"features must have a row for each training example, got {tuple(table.shape)}"
            )
        self.sees = sees
        self.size: int | None = None
        # In a tuple, where nn.Module does not register an encoder's weights as hyperparameters.
        encoder = None if isinstance(features, Tensor) else features
        self._features = () if encoder is None else (encoder,)
        self._offset = math.log(init) - math.log1p(-init)
        if not isinstance(network, nn.Module):
            self.size = self._values(network, table)
            network = _mlp(self.size, hidden)
        _require_scorer(network)
        self.network = network
        self._frozen = {name for name, p in self.named_parameters() if not p.requires_grad}
        # Not saved with λ: they are arguments, and the next process has them from there.
        for name, tensor in (("table", table), ("shown", table if shown is None else shown)):
            kept = tensor if tensor is None else tensor.detach()
            self.register_buffer(name, kept, persistent=False)
        if like is not None:
            self.to(like)
        self._made_in = next(self.network.parameters()).dtype

    def _values(self, network: object, table: Tensor | None) -> int:
        """Return how many values of an example the MLP sees."""
        known = 1 if self.sees == "loss" else None if table is None else table[0].numel()
        size = known if network is None else network
        if isinstance(size, bool) or not isinstance(size, Integral) or size < 1:
            raise UsageError(
                "network must be a module, or the number of values of an example for an MLP, got "
                f"{shown(network)}"
            )
        size = int(size)
        if known is not None and size != known:
            raise UsageError(f"network must be for the {known} values of an example, got {size}")
        return size

    def forward(self, seen: Any) -> Tensor:
        """Return the weights of examples, shape (B,), from what the network is given of them.

        Raises:
            UsageError: If the network does not give one number for each example.
        """
        if self.size is not None:
            require_one_input(seen, self.name)
            if not seen.is_floating_point() or seen[0].numel() != self.size:
                raise UsageError(
                    f"this scorer is made for examples of {self.size} floating-point values: "
                    "make it with another size, or give a network of your own, got "
                    f"{seen.dtype} of shape {tuple(seen.shape)}"
                )
        seen = in_precision_of(self.network, seen)
        found = call_model(self.network, seen).outputs if isinstance(seen, Mapping) else None
        logits: Tensor = self.network(seen) if found is None else found
        if logits.ndim == 2 and logits.shape[1] == 1:
            logits = logits.squeeze(1)
        if logits.ndim != 1:
            raise UsageError(
                "a scorer's network must give one number for each example, shape (B,) or (B, 1), "
                f"got {tuple(logits.shape)}"
            )
        return torch.sigmoid(logits + self._offset)

    @torch.no_grad()
    def scores(self, seen: Any) -> Tensor:
        """Return the weights of any examples, shape (B,), those of the training split or others.

        Args:
            seen: Their inputs; rows of features, where those are a table; or their losses (B,).

        Raises:
            UsageError: If it is not what the network takes.
        """
        seen = seen.reshape(-1, 1) if self.sees == "loss" else self._featured(seen)
        with evaluating(self.network):
            scores: Tensor = self(seen)
            return scores

    def weigh(self, losses: Tensor, index: Tensor | None) -> Tensor:
        """Weigh losses where that can be done without the inputs.

        Raises:
            UsageError: If the network sees the inputs: `weigh_seen` takes them.
        """
        return self.weigh_seen(losses, None, index)

    def weigh_seen(self, losses: Tensor, inputs: Any, index: Tensor | None) -> Tensor:
        """Multiply each loss by its example's score.

        Raises:
            UsageError: If what the network sees is not given.
        """
        if self.sees == "loss":
            nodes, shares = quadrature(losses)
            points = (losses.unsqueeze(1) * nodes).reshape(-1, 1)
            scores: Tensor = self(points)
            return losses * (scores.reshape(-1, len(nodes)) * shares).sum(dim=1)
        weights: Tensor = self(self._seen(len(losses), inputs, index))
        return times(losses, weights, self)

    def _seen(self, examples: int, inputs: Any, index: Tensor | None) -> Any:
        """Return what the network is given of a batch, where that is not the losses."""
        if self.table is not None:
            if index is None:
                raise UsageError(
                    "a scorer with a table of features needs to know which examples are in a "
                    "batch: let the training loader yield (inputs, targets, index), as "
                    "Splits.from_arrays(..., index=True) does, got no index"
                )
            count = f"there are features of {len(self.table)} examples"
            return self.table[as_positions(index, examples, len(self.table), self, count=count)]
        if inputs is None:
            raise UsageError(
                "a scorer of inputs must be given them: call weigh_seen(losses, inputs, index) in "
                "a training loss of your own, got the losses alone"
            )
        return self._featured(inputs)

    def _featured(self, inputs: Any) -> Any:
        """Return the features of inputs, by an encoder as it was trained; else the inputs."""
        inputs = sole_input(inputs)
        for features in self._features:
            device = next(self.parameters()).device
            return features_of(features, inputs, device, self._made_in)
        return inputs

    def _learned(self) -> list[Tensor]:
        # By name, as remembered: in inner steps no λ has requires_grad.
        return [p for name, p in self.named_parameters() if name not in self._frozen]

    @property
    def count(self) -> int:
        """The number of hyperparameters: the network's weights that are not frozen."""
        return sum(p.numel() for p in self._learned())

    @property
    def examples_known(self) -> int | None:
        """How many training examples have features in a table."""
        return None if self.table is None else len(self.table)

    @property
    def takes_index(self) -> bool:
        """Whether there is a table of features by position."""
        return self.table is not None

    @torch.no_grad()
    def summary(self) -> dict[str, float]:
        """Return the scores of some losses, quantiles of those `shown`, or of the weights."""
        if self.sees == "loss":
            losses = next(self.parameters()).new_tensor(_TOLD)
            scores = self.scores(losses).tolist()
            return {f"at_loss_{x:g}": s for x, s in zip(_TOLD, scores, strict=True)}
        if self.shown is not None:
            return quantiles(self.scores(self.shown))
        weights = flatten(self._learned())
        return {f"network_{name}": value for name, value in quantiles(weights).items()}

    def views(self) -> list[View]:
        """Return how the scores of the examples `shown` are distributed."""
        if self.shown is None:
            return []
        return [Histogram("scores of examples", {"all": sample(self.scores(self.shown))}, "score")]

    @classmethod
    def example(cls, model: nn.Module, inputs: Tensor) -> HyperKind:
        """Return an MLP with two hidden units."""
        return cls(inputs[0].numel(), hidden=2, shown=inputs, like=next(model.parameters()))


def _mlp(size: int, hidden: int) -> nn.Module:
    """Return a smooth MLP on flattened values that starts at 0 for all of them."""
    hidden = whole_number("hidden", hidden)
    last = nn.Linear(hidden, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Flatten(), nn.Linear(size, hidden), nn.Tanh(), last)


def _require_features(features: object) -> None:
    """Raise a `UsageError` unless features are a table, a function, or None."""
    if not (features is None or isinstance(features, Tensor) or callable(features)):
        raise UsageError(
            "features must be a tensor with a row for each training example, such as "
            f"torch.as_tensor(array), or a function of the inputs, got {shown(features)}"
        )


def _require_scorer(network: nn.Module) -> None:
    """Raise a `UsageError` unless a network can be trained, and scores each example by itself."""
    if not any(weight.requires_grad for weight in network.parameters()):
        raise UsageError("a scorer's network must have weights to train, got none")
    coupling = [name for name, m in network.named_modules() if isinstance(m, _BatchNorm)]
    if coupling:
        raise UsageError(
            "a scorer must score each example by itself: use LayerNorm or GroupNorm in its "
            f"network, got batch normalisation in {coupling[0]!r}"
        )
