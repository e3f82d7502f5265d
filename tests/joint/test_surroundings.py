"""What lies around a step, or happens to the model between steps, changes no number in silence."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ift_tune import (
    Batches,
    Callback,
    ClassificationProblem,
    Compose,
    DropoutRates,
    DropoutSite,
    HyperKind,
    JointOptimizer,
    MetaConfig,
    Splits,
    UsageError,
    WeightDecay,
    hypergradient,
)
from ift_tune.problem.modes import TrainingModes


class Net(nn.Module):
    """A hidden layer of many parts, run again on the way back or not."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(5, 6), nn.BatchNorm1d(6)
        self.drop, self.last, self.how = nn.Dropout(0.3), nn.Linear(6, 3), how

    def hidden(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.drop(torch.tanh(self.norm(self.first(inputs))))
        return found

    def forward(self, inputs: Tensor) -> Tensor:
        hidden: Tensor | None
        if not self.how:
            hidden = self.hidden(inputs)
        # Without a gradient to the inputs, a reentrant one trains nothing in plain PyTorch.
        elif self.how == "reentrant":
            hidden = checkpoint(self.hidden, inputs, use_reentrant=True)
        elif self.how == "selective":
            kept = partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
            hidden = checkpoint(self.hidden, inputs, use_reentrant=False, context_fn=kept)
        else:
            hidden = checkpoint(self.hidden, inputs, use_reentrant=False)
        outputs: Tensor = self.last(hidden)
        return outputs


def decay(model: nn.Module) -> HyperKind:
    return WeightDecay(model, "tensor", init=0.01)


def decay_and_rates(model: nn.Module) -> HyperKind:
    sites = {"first": DropoutSite("unit"), "last.weight": DropoutSite("weight")}
    sites["first.weight"] = DropoutSite("row")
    return Compose({"decay": decay(model), "rates": DropoutRates(model, sites, init=0.3)})


def joint(
    model: nn.Module,
    kind: Callable[[nn.Module], HyperKind] = decay,
    callbacks: tuple[Callback, ...] = (),
) -> JointOptimizer:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(80, 5, generator=generator), torch.arange(80) % 3
    parts = [Batches(inputs[i : i + 20], targets[i : i + 20]) for i in (0, 20, 40, 60)]
    problem = ClassificationProblem(model, kind(model), Splits(*parts))
    return JointOptimizer(
        problem, MetaConfig(inner_steps=3, meta_lr=0.3, start_check=False), callbacks=callbacks
    )


def trace(run: JointOptimizer, steps: int = 3) -> list[float]:
    """Return all numbers of a few steps, then weights, buffers and λ."""
    numbers = [value for _ in range(steps) for value in run.step().values()]
    numbers += run.evaluate("test").values()
    tensors = [*run.problem.model.state_dict().values(), *run.problem.hypers()]
    return numbers + [float(x) for t in tensors for x in t.detach().reshape(-1)]


@pytest.mark.filterwarnings("ignore:None of the inputs")  # PyTorch's, in evaluation
@pytest.mark.parametrize("kind", [decay, decay_and_rates])
@pytest.mark.parametrize("how", ["plain", "reentrant", "selective"])
def test_checkpoints_change_no_number(how: str, kind: Callable[[nn.Module], HyperKind]) -> None:
    assert trace(joint(Net(how), kind)) == trace(joint(Net(), kind))


def test_a_swapped_parameter_is_there_when_a_checkpoint_is_run_again() -> None:
    """A loss that calls its model under `functional_call`, in the inner steps too."""

    class Noisy(ClassificationProblem):
        def train_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            values = {n: p * 1.5 for n, p in self.model.named_parameters()}
            outputs = torch.func.functional_call(self.model, values, (batch[0],))
            return self.prediction_loss(outputs, batch[1], "mean")

    def run(how: str) -> list[float]:
        made = joint(Net(how))
        problem = Noisy(made.problem.model, decay(made.problem.model), made.problem.splits)
        return trace(JointOptimizer(problem, MetaConfig(inner_steps=3)))

    assert run("plain") == run("")


# --- contexts of PyTorch around the calls ------------------------------------------------------


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "autocast off": lambda: torch.autocast("cpu", enabled=False),
}


class Autocast(Net):
    """Asks for low precision in its own forward pass, where it belongs."""

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(inputs).float()


@pytest.mark.parametrize("name", SURROUNDINGS)
@pytest.mark.parametrize("net", [Net, Autocast])
def test_surroundings_change_no_number(name: str, net: type[Net]) -> None:
    expected = trace(joint(net()))
    run = joint(net())
    with SURROUNDINGS[name]():
        assert trace(run) == expected


@contextlib.contextmanager
def switched_on() -> Iterator[None]:
    torch.set_autocast_enabled("cpu", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cpu", False)


@pytest.mark.parametrize(
    "context", [lambda: torch.autocast("cpu", dtype=torch.bfloat16), switched_on]
)
def test_autocast_around_a_call_is_refused(
    context: Callable[[], contextlib.AbstractContextManager[object]],
) -> None:
    run = joint(Net())
    calls: dict[str, Callable[[], object]] = {
        "step": run.step,
        "baseline_step": run.baseline_step,
        "train_weights": lambda: run.train_weights(1),
        "evaluate": lambda: run.evaluate("test"),
    }
    w, h = torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)
    loss = (h * w.square()).sum()
    with context():
        joint(Net())  # nothing is computed yet
        for name, call in calls.items():
            with pytest.raises(UsageError, match=rf"{name}\(\) must be called outside autocast"):
                call()
        with pytest.raises(UsageError, match=r"hypergradient\(\) must be called outside autocast"):
            hypergradient(loss, loss, [w], [h])
    run.step()


# --- modes and frozen tensors ------------------------------------------------------------------


class Watched(Net):
    """Notes the mode of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[bool, bool]] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen.append((self.training, self.norm.training))
        return super().forward(inputs)


# Inner steps and the training loss of the outer step; then the validation loss and the metrics.
TRAINED, EVALUATED = 4, 3


def test_a_model_in_evaluation_mode_is_trained_in_training_mode(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Watched().eval()
    with caplog.at_level(logging.WARNING, logger="ift_tune"):
        joint(model).step()
    assert model.seen == [(True, True)] * TRAINED + [(False, False)] * EVALUATED
    assert "call model.train() first and then .eval() of those" in caplog.text


class _Forgetful(Callback):
    """Evaluates the model after each step, and leaves it so."""

    def on_outer_step_end(self, joint: JointOptimizer, metrics: dict[str, float]) -> None:
        joint.problem.model.eval()


def test_what_is_frozen_on_purpose_stays_so_and_what_is_forgotten_does_not() -> None:
    model = Watched()
    model.norm.eval()
    run = joint(model, callbacks=(_Forgetful(),))
    run.step()
    run.step()
    assert model.seen == 2 * ([(True, False)] * TRAINED + [(False, False)] * EVALUATED)
    model.train()  # thawed in mid-run: followed
    run.train_weights(1)
    assert model.seen[-1] == (True, True)


def test_a_train_method_of_the_users_own_is_respected() -> None:
    class Frozen(Watched):
        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self.norm.eval()
            return self

    model = Frozen().eval()
    TrainingModes(model)
    assert (model.training, model.norm.training, model.drop.training) == (True, False, True)


def _freeze(run: JointOptimizer) -> None:
    run.problem.model.get_parameter("first.weight").requires_grad_(False)


def _replace(run: JointOptimizer) -> None:
    run.problem.model.get_submodule("first").weight = nn.Parameter(torch.zeros(6, 5))


def _add(run: JointOptimizer) -> None:
    run.problem.model.head = nn.Linear(2, 2)


def _freeze_hyper(run: JointOptimizer) -> None:
    run.problem.hypers()[0].requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (_freeze, "model.first.weight"),
        (_replace, "model.first.weight"),
        (_add, "model.head.weight, model.head.bias"),
        (_freeze_hyper, "hyper"),
    ],
)
def test_tensors_that_come_or_go_in_mid_run_are_named(
    change: Callable[[JointOptimizer], None], name: str
) -> None:
    run = joint(Net())
    run.step()
    change(run)
    for call in (run.step, run.baseline_step, lambda: run.train_weights(1)):
        with pytest.raises(UsageError, match=f"got others for {name}"):
            call()
