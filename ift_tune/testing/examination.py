"""The quick part of a checkup: a first outer step with everything that may be wrong, then symptoms.

What is wrong is told and raised. What is dear is left out, with its price, unless it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ift_tune.base.errors import (
    CheckFailedError,
    DoubleBackwardError,
    IFTTuneError,
    NonFiniteError,
    StartCheckError,
    UnreachableHyperparameterError,
)
from ift_tune.joint.config import MetaConfig
from ift_tune.joint.joint import JointOptimizer
from ift_tune.joint.start_check import StartCheck
from ift_tune.testing import symptoms
from ift_tune.testing.logits import softmax_before_the_loss
from ift_tune.testing.operations import Operations, listed, observe_operations
from ift_tune.testing.overlap import shared_examples
from ift_tune.testing.plan import duration
from ift_tune.testing.price import Price, measure_price, measured_peak
from ift_tune.testing.symptoms import Finding, Level

TRAINING_PATIENCE = 2.0
"""Seconds of inner steps before the inner problem is judged."""

_TOPICS: dict[type[IFTTuneError], str] = {
    StartCheckError: "derivatives",
    DoubleBackwardError: "derivatives",
    UnreachableHyperparameterError: "effect",
    NonFiniteError: "losses",
}
_FAULTS = tuple(_TOPICS)
_POWER_PRODUCTS = 12 + 2  # of the eigenvalue, and of what is around it


class Examination:
    """Looks at a problem step by step; each finding is told as soon as it is there.

    Attributes:
        operations: What was seen of the training loss; None before `start`.
    """

    def __init__(
        self,
        joint: JointOptimizer,
        config: MetaConfig,
        tell: Callable[[Finding], None],
        *,
        patience: float,
    ) -> None:
        """Take the problem.

        Args:
            joint: With one inner step an outer step; it is taken further.
            config: Of the run.
            tell: Is given each finding.
            patience: Seconds that a single measurement may take.
        """
        self._joint, self._config, self._tell = joint, config, tell
        self._patience = patience
        self.operations: Operations | None = None
        self._first_norm = self._first_loss = float("nan")

    def start(self) -> StartCheck | None:
        """Look at the operations, and take the first outer step.

        Raises:
            CheckFailedError: If something is wrong; it has been told.
        """
        joint = self._joint
        try:
            self._look_at_operations()
            self._first_norm, _ = symptoms.gradient_and_loss(joint.problem)
            self._first_loss = joint.step()["train_loss"]
        except _FAULTS as error:
            topic = next(name for kind, name in _TOPICS.items() if isinstance(error, kind))
            finding = Finding(topic, Level.WRONG, f"{error}{self._where(str(error))}")
            self._tell(finding)
            raise CheckFailedError(finding.sentence) from error
        start = joint.start_check
        self._tell(Finding("derivatives", _level(start), _words(start)))
        return start

    def price(self) -> tuple[Price, int]:
        """Return what inner and outer steps take, in seconds and in bytes."""
        with measured_peak(self._joint.device) as peak:
            self._joint.step()
        return measure_price(self._joint, self._config), peak.bytes

    def symptoms(self, price: Price) -> None:
        """Train for as long as one outer step does, and measure what shows there."""
        joint = self._joint
        wanted = max(self._config.inner_steps - joint.inner_steps, 0)
        patience = max(TRAINING_PATIENCE, self._patience if self._patience > 1e9 else 0.0)
        joint.train_weights(int(min(wanted, patience / max(price.inner_step, 1e-9))))
        if joint.inner_steps < self._config.inner_steps:
            self._tell(
                Finding(
                    "convergence",
                    Level.NOTE,
                    f"trained for {joint.inner_steps} of {self._config.inner_steps} inner steps "
                    "only; --thorough takes all of them",
                )
            )
        problem = joint.problem
        train = symptoms.batches_of(problem, symptoms.curvature_split(problem), 1)[0]
        val = symptoms.batches_of(problem, "val", 1)[0]
        largest = 0.0
        products = price.product * _POWER_PRODUCTS
        if self._affords("α against λ_max", products):
            finding, largest = symptoms.scale_of_alpha(joint, train, val)
            self._tell(finding)
            self._tell(
                symptoms.distance_from_minimum(joint, largest, self._first_loss, self._first_norm)
            )
        draws = symptoms.DRAWS
        if draws * price.outer_step > self._patience:
            draws = symptoms.FEWEST_DRAWS
        if self._affords("noise", draws * price.outer_step):
            drawn = symptoms.hypergradients(joint, draws)
            for finding in symptoms.without_effect(joint, drawn):
                self._tell(finding)
            self._tell(symptoms.noise(drawn))
        if largest and self._affords("precision", 3.0 * price.outer_step):
            self._tell(symptoms.effect_of_precision(joint, train, val, largest))
        if self.operations is not None:
            for finding in symptoms.effect_of_kernels(problem, train, self.operations):
                self._tell(finding)
        for finding in (
            *softmax_before_the_loss(problem, train),
            *symptoms.many_hypers(problem),
            *shared_examples(problem),
        ):
            self._tell(finding)

    def _look_at_operations(self) -> None:
        problem = self._joint.problem
        batch = symptoms.batches_of(problem, symptoms.curvature_split(problem), 1)[0]
        # A refusal comes from the same call in the first step, which says it better.
        self.operations = seen = observe_operations(problem, batch)
        for replaced in seen.replaced:
            self._tell(Finding("operations", Level.NOTE, f"replaced: {replaced}"))
        if not seen.replaced:
            text = "all operations of the training loss are differentiated as they are"
            self._tell(Finding("operations", Level.OK, text))
        for line in _on_a_gpu(problem.model, seen):
            self._tell(Finding("operations", Level.NOTE, line))
        for name, where in seen.functions.items():
            text = f"the custom function {name} in {listed(where)}: differentiated by its backward"
            self._tell(Finding("operations", Level.NOTE, text))
        if seen.precisions:
            text = f"values in {' and '.join(seen.precisions)} in the training loss"
            self._tell(Finding("precision", Level.NOTE, text))
        if seen.spread > 0.0:
            text = (
                f"the training loss draws random numbers: others change it by "
                f"{100.0 * seen.spread:.2g} %"
            )
            self._tell(Finding("randomness", Level.NOTE, text, {"spread": seen.spread}))

    def _where(self, text: str) -> str:
        """Return in which modules a custom function is that an error names."""
        functions = {} if self.operations is None else self.operations.functions
        return "".join(
            f" (in {listed(where)})" for name, where in functions.items() if f"uses {name}" in text
        )

    def _affords(self, what: str, seconds: float) -> bool:
        if seconds <= self._patience:
            return True
        text = f"{what}: left out, for about {duration(seconds)}; --thorough measures it"
        self._tell(Finding("left_out", Level.NOTE, text, {"seconds": seconds}))
        return False


def _on_a_gpu(model: nn.Module, seen: Operations) -> list[str]:
    """Return what the same model would have replaced on a GPU, where it runs on a CPU."""
    if next(model.parameters()).is_cuda or any("cuDNN" in r.operation for r in seen.replaced):
        return []
    recurrent = [name for name, m in model.named_modules() if isinstance(m, nn.RNNBase)]
    if not recurrent:
        return []
    return [f"recurrent layers in {listed(recurrent)}: as they are here; on a GPU without cuDNN"]


def _level(start: StartCheck | None) -> Level:
    return Level.NOTE if start is None else Level.OK


def _words(start: StartCheck | None) -> str:
    """Return what the check at the start says."""
    if start is None:
        return "start_check is off: second derivatives were not looked at"
    if start.products == "difference":
        return (
            "losses repeat, and the gradient is that of the loss; products by differences over one "
            f"step and over two differ by {100 * start.error:.2g} % (at the price of "
            f"{start.gradients:.1f} gradients)"
        )
    rough = "; roughly, for low precision inside the loss" if start.status == "coarse" else ""
    return (
        "losses repeat, and second derivatives are those of the gradient: largest difference "
        f"{100 * start.error:.1f} %{rough} (at the price of {start.gradients:.1f} gradients)"
    )
