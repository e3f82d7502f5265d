"""Who takes part in `peers.py`: this package, plain training, plain autograd code and libraries.

All take the same inner steps on the same batches, and sum the same Neumann series over the whole
training data, α Σ (I − αH)^j v for j = 0..K, so that their hypergradients are equal.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from peer_models import Setting
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ift_tune import JointOptimizer, MetaConfig, Neumann
from ift_tune.problem.problem import BilevelProblem


class Contestant:
    """One way to train, or to tune; what it works on is its own.

    Attributes:
        name: In tables and figures.
        module: What has to be imported; None for nothing.
    """

    name: ClassVar[str]
    module: ClassVar[str | None] = None

    def __init__(self, setting: Setting, problem: BilevelProblem, library: Any) -> None:
        """Take a problem of its own, and the library if it is one's."""

    def leave_out_checks(self) -> None:
        """Do without what is done in a first outer step alone."""

    def hypergradient(self) -> list[Tensor] | None:
        """Return the hypergradient at the present weights; None for plain training."""
        return None

    def outer_step(self) -> None:
        """Take T inner steps, and one step of λ."""
        raise NotImplementedError


class IftTune(Contestant):
    """This package, with the same α as all others."""

    name = "ift_tune"

    def __init__(self, setting: Setting, problem: BilevelProblem, library: Any) -> None:
        self.joint = JointOptimizer(
            problem,
            MetaConfig(
                inverse=self.inverse(setting),
                inner_steps=setting.inner_steps,
                inner_lr=setting.inner_lr,
                meta_lr=setting.meta_lr,
                meta_optimizer="rmsprop",
            ),
        )

    def inverse(self, setting: Setting) -> Neumann:
        """Return the series."""
        return Neumann(terms=setting.terms, alpha=setting.alpha)

    def leave_out_checks(self) -> None:
        """Leave out the start check."""
        self.joint.config = replace(self.joint.config, start_check=False)

    def hypergradient(self) -> list[Tensor]:
        """Return what an outer step takes."""
        return self.joint.hypergradient().grads

    def outer_step(self) -> None:
        """Take one."""
        self.joint.step()


class IftTuneAutomatic(IftTune):
    """This package by its defaults: α = 1/λ_max, measured in each outer step."""

    name = "ift_tune, automatic α"

    def inverse(self, setting: Setting) -> Neumann:
        """Return the series."""
        return Neumann(terms=setting.terms)

    def hypergradient(self) -> None:  # type: ignore[override]
        """Return nothing: it has another α than the others', and so another hypergradient."""


class Peer(Contestant):
    """What the libraries share: losses, optimisers, and inner steps by PyTorch."""

    fused: ClassVar[bool] = True

    def __init__(self, setting: Setting, problem: BilevelProblem, library: Any) -> None:
        self.setting, self.library = setting, library
        self.model = problem.model
        self.weights, self.raws = problem.weights(), problem.hypers()
        self.names = [name for name, _ in self.model.named_parameters()]
        self.inner = torch.optim.Adam(self.weights, lr=setting.inner_lr, fused=self.fused)
        self.outer = torch.optim.RMSprop(self.raws, lr=setting.meta_lr, foreach=True)
        self.batches = self._endless(problem)
        self.whole = next(iter(problem.splits.curvature or problem.splits.train))[:2]
        self.val = next(iter(problem.splits.val))[:2]

    @staticmethod
    def _endless(problem: BilevelProblem) -> Iterator[Any]:
        while True:
            for batch in problem.splits.train:
                yield batch[:2]

    def data_loss(self, weights: Sequence[Tensor], batch: Any) -> Tensor:
        """Return the loss without the penalty, as a function of the weights."""
        named = dict(zip(self.names, weights, strict=True))
        return F.cross_entropy(functional_call(self.model, named, (batch[0],)), batch[1])

    def train_loss(self, weights: Sequence[Tensor], raws: Sequence[Tensor], batch: Any) -> Tensor:
        """Return the training loss as a function of weights and λ."""
        return self.data_loss(weights, batch) + decay(weights, raws)

    def inner_steps(self) -> None:
        """Take T steps of Adam; the gradient by λ is not asked for."""
        for _ in range(self.setting.inner_steps):
            inputs, targets = next(self.batches)
            loss = F.cross_entropy(self.model(inputs), targets) + decay(self.weights, self.raws)
            slopes = torch.autograd.grad(loss, self.weights)
            for weight, slope in zip(self.weights, slopes, strict=True):
                weight.grad = slope
            self.inner.step()

    def hypergradient(self) -> list[Tensor]:
        """Return it in the library's own way."""
        raise NotImplementedError

    def outer_step(self) -> None:
        """Take the inner steps, the hypergradient and a step of RMSprop."""
        self.inner_steps()
        for raw, slope in zip(self.raws, self.hypergradient(), strict=True):
            raw.grad = slope
        self.outer.step()


def decay(weights: Sequence[Tensor], raws: Sequence[Tensor]) -> Tensor:
    """Return Σ softplus(λ)·w²."""
    pairs = zip(raws, weights, strict=True)
    return torch.stack([(F.softplus(r) * w**2).sum() for r, w in pairs]).sum()


class Plain(Peer):
    """Plain training: T steps of fused Adam without any penalty."""

    name = "plain training"

    def hypergradient(self) -> None:  # type: ignore[override]
        """Return nothing."""

    def outer_step(self) -> None:
        """Take the inner steps alone."""
        for _ in range(self.setting.inner_steps):
            inputs, targets = next(self.batches)
            self.inner.zero_grad()
            F.cross_entropy(self.model(inputs), targets).backward()  # type: ignore[no-untyped-call]
            self.inner.step()


class Floor(Peer):
    """The products of matrices that plain training of two dense layers needs, and fused Adam."""

    name = "floor: matrix products, Adam"

    def __init__(self, setting: Setting, problem: BilevelProblem, library: Any) -> None:
        super().__init__(setting, problem, library)
        layers = [m for m in self.model.modules() if isinstance(m, nn.Linear)]
        self.first, self.second = (layer.weight for layer in layers)
        for weight in self.weights:
            weight.grad = torch.zeros_like(weight)

    def hypergradient(self) -> None:  # type: ignore[override]
        """Return nothing."""

    @torch.no_grad()
    def outer_step(self) -> None:
        """Take them T times."""
        into = [self.first.grad, self.second.grad]
        for _ in range(self.setting.inner_steps):
            inputs = next(self.batches)[0]
            hidden = inputs @ self.first.t()
            outputs = hidden @ self.second.t()
            torch.mm(outputs.t(), hidden, out=into[1])
            torch.mm((outputs @ self.second).t(), inputs, out=into[0])
            self.inner.step()


class Autograd(Peer):
    """The straightforward code: the published 100 lines, written anew, with PyTorch's own Adam.

    Differing from them in two ways that let it be compared: the validation loss is without the
    penalty, and the sum is multiplied by α.
    """

    name = "autograd code"
    fused = False

    def inner_steps(self) -> None:
        """Take T steps; ``backward`` computes the gradient by λ too, as theirs does."""
        for _ in range(self.setting.inner_steps):
            inputs, targets = next(self.batches)
            loss = F.cross_entropy(self.model(inputs), targets) + decay(self.weights, self.raws)
            self.inner.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.inner.step()

    def hypergradient(self) -> list[Tensor]:
        """Differentiate a graph of the gradient, again and again."""
        alpha = self.setting.alpha
        val = F.cross_entropy(self.model(self.val[0]), self.val[1])
        train = F.cross_entropy(self.model(self.whole[0]), self.whole[1])
        train = train + decay(self.weights, self.raws)
        v = torch.autograd.grad(val, self.weights)
        slope = torch.autograd.grad(train, self.weights, create_graph=True)
        total = v
        for _ in range(self.setting.terms):
            product = torch.autograd.grad(slope, self.weights, v, retain_graph=True)
            v = tuple(a - alpha * b for a, b in zip(v, product, strict=True))
            total = tuple(a + b for a, b in zip(total, v, strict=True))
        mixed = torch.autograd.grad(slope, self.raws, total)
        return [-alpha * part for part in mixed]


class TorchOpt(Peer):
    """TorchOpt: implicit differentiation by a decorator, with its Neumann solver."""

    name = "TorchOpt"
    module = "torchopt"

    def hypergradient(self) -> list[Tensor]:
        """Differentiate through a solver that returns the weights as they are."""
        linear = self.library.linear_solve.solve_inv(
            ns=True, maxiter=self.setting.terms, alpha=self.setting.alpha
        )

        def loss(weights: Any, raws: Any) -> Tensor:
            return self.train_loss(weights, raws, self.whole)

        root = self.library.diff.implicit.custom_root(
            torch.func.grad(loss, argnums=0), argnums=1, solve=linear
        )
        trained = root(lambda weights, raws: tuple(w.detach().clone() for w in weights))
        solution = trained(tuple(self.weights), tuple(self.raws))
        return list(torch.autograd.grad(self.data_loss(solution, self.val), self.raws))


class Hypertorch(Peer):
    """hypertorch: its `neumann`, with the fixed point map w − α·∂L/∂w."""

    name = "hypertorch"
    module = "hypergrad.hypergradients"

    def hypergradient(self) -> list[Tensor]:
        """Call it."""

        def step(weights: Any, raws: Any) -> list[Tensor]:
            loss = self.train_loss(weights, raws, self.whole)
            slopes = torch.autograd.grad(loss, weights, create_graph=True)
            return [w - self.setting.alpha * s for w, s in zip(weights, slopes, strict=True)]

        def outer(weights: Any, raws: Any) -> Tensor:
            return self.data_loss(weights, self.val)

        return list(
            self.library.neumann(
                self.weights, self.raws, self.setting.terms, step, outer, set_grad=False
            )
        )


class Hypergrad(Peer):
    """moskomule's hypergrad: its `neumann`, products forward over reverse."""

    name = "hypergrad"
    module = "hypergrad.approx_hypergrad"

    def hypergradient(self) -> list[Tensor]:
        """Call it."""
        # Constants: what it differentiates, it lifts itself.
        weights = tuple(w.detach() for w in self.weights)
        raws = tuple(r.detach() for r in self.raws)
        found = self.library.neumann(
            lambda w, r: self.train_loss(w, r, self.whole),
            # Of λ too, or its gradient would not be there.
            lambda w, r: self.data_loss(w, self.val) + 0.0 * sum(part.sum() for part in r),
            weights,
            raws,
            self.setting.terms,
            self.setting.alpha,
        )
        return list(found)


class Boat(Peer):
    """BOAT: its operation NS, whose step is the learning rate of the optimiser that it is given."""

    name = "BOAT"
    module = "boat_torch.na_ol.ns"

    def __init__(self, setting: Setting, problem: BilevelProblem, library: Any) -> None:
        super().__init__(setting, problem, library)
        self.operation = library.NS(
            lambda feed, upper, lower, params: (
                F.cross_entropy(lower(feed[0]), feed[1]) + decay(self.weights, self.raws)
            ),
            lambda feed, upper, lower, params: F.cross_entropy(lower(feed[0]), feed[1]),
            self.model,
            self.model,
            self.weights,
            self.raws,
            {
                "gm_op": ["NGD"],
                "lower_level_opt": torch.optim.SGD(self.weights, lr=setting.alpha),
                "CG": {"tolerance": 1e-10, "k": setting.terms},
                "GDA": {"alpha_init": 0.0, "alpha_decay": 0.0},
            },
        )

    def hypergradient(self) -> list[Tensor]:
        """Let it add to the gradients of λ."""
        for raw in self.raws:
            raw.grad = None
        self.operation.compute_gradients(
            self.whole, self.val, self.model, lower_model_params=self.weights
        )
        return [raw.grad for raw in self.raws if raw.grad is not None]


class Betty(Peer):
    """Betty: its engine drives both levels."""

    name = "Betty"
    module = "betty"

    def __init__(self, setting: Setting, problem: BilevelProblem, library: Any) -> None:
        super().__init__(setting, problem, library)
        config = importlib.import_module("betty.configs")
        levels = importlib.import_module("betty.problems")
        contestant = self

        class Upper(levels.ImplicitProblem):  # type: ignore[misc,name-defined]
            def training_step(self, batch: Any) -> Tensor:
                self.lower.cur_batch = contestant.whole  # not the last of the inner steps
                return F.cross_entropy(contestant.model(batch[0]), batch[1])

            def get_batch(self) -> Any:
                return contestant.val

        class Lower(levels.ImplicitProblem):  # type: ignore[misc,name-defined]
            def training_step(self, batch: Any) -> Tensor:
                loss = F.cross_entropy(self.module(batch[0]), batch[1])
                return loss + decay(contestant.weights, contestant.raws)

            def get_batch(self) -> Any:
                return next(contestant.batches)

        # It writes to the standard output, and makes the logger's level its own at the first use.
        importlib.import_module("betty.logging.logger_base").get_logger().setLevel("WARNING")
        device = self.weights[0].device
        series = {
            "neumann_iterations": setting.terms,
            "neumann_alpha": setting.alpha,
        }
        self.upper = Upper(
            "upper",
            config.Config(),
            module=nn.ParameterList(self.raws),
            optimizer=self.outer,
            device=device,
        )
        lower = Lower(
            "lower",
            config.Config(type="neumann", unroll_steps=setting.inner_steps, **series),
            module=self.model,
            optimizer=self.inner,
            device=device,
        )
        self.engine = importlib.import_module("betty.engine").Engine(
            [self.upper, lower],
            config.EngineConfig(),
            {"u2l": {self.upper: [lower]}, "l2u": {lower: [self.upper]}},
        )
        self.engine.train()

    def hypergradient(self) -> list[Tensor]:
        """Let the upper level compute its gradient, and take it away."""
        loss, _ = self.upper.get_loss(self.upper.get_batch())
        self.upper.backward(loss, self.raws, self.upper.paths, allow_unused=True)
        found = [raw.grad for raw in self.raws if raw.grad is not None]
        self.upper.zero_grad()
        return found

    def outer_step(self) -> None:
        """Let the lower level take its steps; the last of them calls the upper level."""
        for _ in range(self.setting.inner_steps):
            self.engine.global_step += 1
            self.engine.train_step()


OURS = (IftTune, IftTuneAutomatic)
BARE = (Floor, Plain)
PEERS = (Autograd, TorchOpt, Betty, Hypertorch, Boat, Hypergrad)
FROM_CHECKOUTS: dict[str, type[Contestant]] = {
    "hypertorch": Hypertorch,
    "boat": Boat,
    "hypergrad": Hypergrad,
}
"""The peers that are on no package index, by the option that names their checkout."""


def load(contestant: type[Contestant], checkout: Path | None) -> ModuleType | None:
    """Return a contestant's library.

    Two of them are called `hypergrad`: what was imported by that name is forgotten first.

    Args:
        contestant: Whose module is imported.
        checkout: The folder it is in; None for what is installed.

    Raises:
        ImportError: If it is not there, or lacks something itself.
    """
    if contestant.module is None:
        return None
    top = contestant.module.partition(".")[0]
    for name in [n for n in sys.modules if n == top or n.startswith(f"{top}.")]:
        del sys.modules[name]
    if checkout is None:
        return importlib.import_module(contestant.module)
    sys.path.insert(0, str(checkout))
    try:
        return importlib.import_module(contestant.module)
    finally:
        sys.path.remove(str(checkout))
