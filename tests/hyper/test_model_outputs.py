"""Models as people have them: batches by name, outputs of any form, a loss inside the model."""

from __future__ import annotations

import logging
import math
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ift_tune
from ift_tune import (
    AugmentationNetwork,
    ClassificationProblem,
    ClassWeights,
    Compose,
    DistilledData,
    ExampleWeights,
    HyperKind,
    JointOptimizer,
    LabelSmoothing,
    MetaConfig,
    RegressionProblem,
    Splits,
    UsageError,
    WeightDecay,
)
from ift_tune.testing import check_hypergradient

CLASSES, EXAMPLES, LENGTH = 3, 12, 5


class ModelOutput(OrderedDict[str, Any]):
    """As Hugging Face's: a mapping, with its entries as attributes."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


Pair = namedtuple("Pair", ["logits", "hidden"])


@dataclass
class Output:
    hidden: Tensor
    logits: Tensor
    attentions: Any = None


@attrs.frozen
class Frozen:
    prediction: Tensor
    hidden: Tensor


FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tensor": lambda logits, _: logits,
    "tuple with features": lambda logits, hidden: (logits, hidden),
    "tuple with None and states": lambda logits, hidden: (None, logits, [hidden, hidden]),
    "list of one": lambda logits, _: [logits],
    "dict": lambda logits, hidden: {"hidden": hidden, "logits": logits},
    "dict of another name": lambda logits, _: {"scores": logits, "ids": torch.arange(4)},
    "segmentation's": lambda logits, hidden: OrderedDict(aux=hidden, out=logits),
    "model output": lambda logits, hidden: ModelOutput(loss=None, hidden=hidden, logits=logits),
    "named tuple": lambda logits, hidden: Pair(hidden=hidden, logits=logits),
    "data class": lambda logits, hidden: Output(hidden, logits),
    "attrs": lambda logits, hidden: Frozen(logits, hidden),
    "namespace": lambda logits, hidden: SimpleNamespace(h=hidden, logits=logits),
}


class Net(nn.Module):
    """Returns its logits in one of the forms."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.first, self.last = nn.Linear(2, 4), nn.Linear(4, CLASSES)

    def forward(self, inputs: Tensor) -> Any:
        hidden = self.first(inputs).tanh()
        return FORMS[self.form](self.last(hidden), hidden)


def rows(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(EXAMPLES)
    return torch.randn(EXAMPLES, 2, generator=generator), index % CLASSES, index


def problem_of(model: nn.Module, hyper: HyperKind, *batches: Any) -> ClassificationProblem:
    train, val = batches[0], batches[-1]
    return ClassificationProblem(model, hyper, Splits([train], [val], [val], [val]))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_outputs_trains_alike(form: str) -> None:
    def losses(form: str) -> list[float]:
        torch.manual_seed(1)
        model = Net(form)
        kinds = {"decay": WeightDecay(model, "tensor"), "rows": ExampleWeights(EXAMPLES)}
        problem = problem_of(model, Compose(kinds), rows(), rows(1)[:2])
        joint = JointOptimizer(problem, MetaConfig(inner_steps=3, meta_lr=0.1))
        found = [joint.step()["train_loss"] for _ in range(2)]
        return found + list(joint.evaluate("search").values())

    assert losses(form) == losses("tensor")


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda x: {"start": x, "end": x}, "by a name such as 'logits'.*start: Tensor, end"),
        (lambda x: [x, x], "got a list"),
        (lambda x: None, "got a NoneType of nothing"),
        (lambda x: "logits", "got a str"),
        (lambda x: ({"a": x}, x), "first in a tuple"),
        (lambda x: x.detach().numpy(), "got a ndarray"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_mend(
    returned: Callable[[Tensor], Any], message: str
) -> None:
    class Odd(Net):
        def forward(self, inputs: Tensor) -> Any:
            return returned(super().forward(inputs))

    model = Odd("tensor")
    problem = problem_of(model, WeightDecay(model), rows())
    with pytest.raises(UsageError, match=message):
        problem.train_loss(rows())


class Transformer(nn.Module):
    """One layer of attention; the loss inside, if it is given the labels."""

    def __init__(self, *, smoothing: float = 0.0, shift: float = 0.0, classes_last: bool = False):
        super().__init__()
        self.smoothing, self.shift, self.classes_last = smoothing, shift, classes_last
        self.embedding = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> ModelOutput:
        hidden = self.embedding(input_ids)
        away = None if attention_mask is None else attention_mask == 0
        hidden = hidden + self.attention(hidden, hidden, hidden, key_padding_mask=away)[0]
        logits = self.head(hidden if self.classes_last else hidden.mean(dim=1))
        loss = None
        if labels is not None:
            flat, targets = logits.reshape(-1, CLASSES), labels.reshape(-1)
            loss = F.cross_entropy(flat, targets, label_smoothing=self.smoothing) + self.shift
        return ModelOutput(loss=loss, logits=logits)


def tokens(*, name: str = "labels", each: bool = False, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(7, (EXAMPLES, LENGTH), generator=generator)
    labels = ids % CLASSES if each else ids[:, 0] % CLASSES
    mask = torch.ones(EXAMPLES, LENGTH, dtype=torch.long)
    mask[:, -1] = torch.arange(EXAMPLES) % 2
    return {"input_ids": ids, "attention_mask": mask, name: labels, "index": torch.arange(EXAMPLES)}


@dataclass
class Tokens:
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    index: Tensor
    texts: tuple[str, ...] = ("not", "a", "tensor")


BATCHES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "dict": dict,
    "encoding": UserDict,
    "data class": lambda batch: Tokens(**batch),
    "named tuple": lambda batch: namedtuple("Named", batch)(**batch),
    "namespace": lambda batch: SimpleNamespace(**batch),
    "with texts": lambda batch: {**batch, "text": ["a"] * EXAMPLES},
    "in a pair": lambda batch: (
        {k: v for k, v in batch.items() if k not in ("labels", "index")},
        batch["labels"],
        batch["index"],
    ),
}


@pytest.mark.parametrize("form", BATCHES)
@pytest.mark.parametrize("kind", ["decay", "class weights", "example weights"])
def test_batches_by_name_and_a_loss_inside_the_model(form: str, kind: str) -> None:
    """Whatever computes the loss, the numbers are those of the plain cross-entropy."""
    torch.manual_seed(0)
    model = Transformer().double()
    kinds: dict[str, Callable[[], HyperKind]] = {
        "decay": lambda: WeightDecay(model, "tensor", init=0.1),
        "class weights": lambda: ClassWeights(CLASSES, init=0.5, like=model.head.weight),
        "example weights": lambda: ExampleWeights(EXAMPLES, init=0.5, like=model.head.weight),
    }
    batch = BATCHES[form](tokens())
    problem = problem_of(model, kinds[kind](), batch)
    logits = model(tokens()["input_ids"], tokens()["attention_mask"]).logits
    plain = F.cross_entropy(logits, tokens()["labels"])
    torch.testing.assert_close(problem.val_loss(batch), plain)
    factor = 1.0 if kind == "decay" else 0.5
    torch.testing.assert_close(problem.train_loss(batch), factor * plain)
    wrong = (logits.argmax(1) != tokens()["labels"]).double().mean()
    assert float(problem.metrics(batch)["error"]) == pytest.approx(float(wrong))
    assert problem.batch_size(batch) == EXAMPLES
    joint = JointOptimizer(problem, MetaConfig(inner_steps=2, meta_lr=0.1, precision="bfloat16"))
    assert math.isfinite(joint.step()["val_loss"])
    assert set(joint.evaluate("test")) == {"test_loss", "test_error"}


def test_the_hypergradient_through_the_model_s_own_loss_is_right() -> None:
    torch.manual_seed(0)
    model = Transformer()
    problem = problem_of(model, WeightDecay(model, "tensor", init=0.1), tokens(), tokens(seed=1))
    check_hypergradient(problem, directions=1, unrolled_steps=3)


def test_a_loss_of_the_model_s_own_is_the_loss() -> None:
    """With what it holds beside the cross-entropy, in training and in validation."""
    torch.manual_seed(0)
    model = Transformer(smoothing=0.1, shift=0.25)
    problem = problem_of(model, WeightDecay(model), tokens())
    own = model(**tokens()).loss
    torch.testing.assert_close(problem.train_loss(tokens()), own)
    found = problem.metrics(tokens())
    torch.testing.assert_close(found["loss"], own)
    assert "error" in found


@pytest.mark.parametrize(
    "make", [lambda: ClassWeights(CLASSES), lambda: LabelSmoothing(CLASSES, init=0.1)]
)
def test_a_kind_that_acts_on_losses_needs_those_of_the_predictions(
    make: Callable[[], HyperKind],
) -> None:
    model = Transformer(smoothing=0.1)
    with pytest.raises(UsageError, match=r"give the batch as \(inputs, targets\).*no such mean"):
        problem_of(model, make(), tokens()).train_loss(tokens())

    class Silent(Transformer):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs).loss

    silent = Silent()
    with pytest.raises(UsageError, match=r"return .logits. too.*the loss alone"):
        problem_of(silent, make(), tokens()).train_loss(tokens())
    problem = problem_of(silent, WeightDecay(silent), tokens())
    assert JointOptimizer(problem, MetaConfig(inner_steps=2)).step()["train_loss"] > 0
    assert problem.metrics(tokens()).keys() == {"loss"}


@pytest.mark.parametrize("length", [LENGTH, CLASSES])
def test_classes_in_the_last_dimension_are_told_by_the_loss(length: int) -> None:
    """Also where as many tokens as classes make the shapes ambiguous."""
    torch.manual_seed(0)
    model = Transformer(classes_last=True)
    batch = {k: v[:, :length] if v.ndim > 1 else v for k, v in tokens(each=True).items()}
    hyper = ClassWeights(CLASSES, init=lambda raw: raw.copy_(torch.tensor([0.0, 1.0, -1.0])))
    problem = problem_of(model, hyper, batch)
    logits = model(**batch).logits
    each = F.cross_entropy(logits.movedim(-1, 1), batch["labels"], reduction="none")
    torch.testing.assert_close(problem.train_loss(batch), (each * hyper()[batch["labels"]]).mean())
    wrong = (logits.argmax(-1) != batch["labels"]).float().mean()
    torch.testing.assert_close(problem.metrics(batch)["error"], wrong)


def test_a_column_of_numbers_is_told_by_the_loss() -> None:
    class Regressor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, inputs_embeds: Tensor, labels: Tensor | None = None) -> ModelOutput:
            logits = self.layer(inputs_embeds)
            loss = None if labels is None else F.mse_loss(logits.squeeze(-1), labels)
            return ModelOutput(loss=loss, logits=logits)

    inputs, targets, index = rows()
    batch = {"inputs_embeds": inputs, "labels": targets.float(), "index": index}
    hyper = ExampleWeights(EXAMPLES, init=lambda raw: raw.copy_(torch.linspace(-1, 1, EXAMPLES)))
    problem = RegressionProblem(Regressor(), hyper, Splits(*[[batch]] * 4))
    each = (problem.model(inputs).logits.squeeze(-1) - targets).square()
    torch.testing.assert_close(problem.train_loss(batch), (each * hyper()).mean())


def test_a_loss_without_targets_in_the_batch() -> None:
    """As language models have it: the inputs are the targets."""

    class Reconstructing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.code, self.back = nn.Linear(4, 2), nn.Linear(2, 4)

        def forward(self, pixels: Tensor) -> Mapping[str, Tensor]:
            return {"loss": (self.back(self.code(pixels)) - pixels).square().mean()}

    model = Reconstructing()
    batch = {"pixels": torch.randn(6, 4), "index": torch.arange(6)}
    problem = RegressionProblem(model, WeightDecay(model), Splits(*[[batch]] * 4))
    joint = JointOptimizer(problem, MetaConfig(inner_steps=2))
    joint.step()
    assert joint.evaluate("search")["search_loss"] > 0
    assert problem.batch_size(batch) == 6


class Legacy(nn.Module):
    """Returns tuples, as nanoGPT does, and Hugging Face without return_dict."""

    def __init__(self, loss_first: bool) -> None:
        super().__init__()
        self.loss_first, self.layer = loss_first, nn.Linear(2, CLASSES)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Any:
        logits = self.layer(x)
        if targets is None:
            return (logits,)
        loss = F.cross_entropy(logits, targets) + 1.0
        return (loss, logits) if self.loss_first else (logits, loss)


@pytest.mark.parametrize("loss_first", [True, False])
def test_a_tuple_s_number_is_the_loss_of_a_model_that_is_given_the_targets(
    loss_first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    inputs, targets, _ = rows()
    model = Legacy(loss_first)
    batch = {"x": inputs, "targets": targets}
    problem = problem_of(model, WeightDecay(model), batch)
    plain = F.cross_entropy(model.layer(inputs), targets)
    torch.testing.assert_close(problem.train_loss(batch), plain + 1.0)
    torch.testing.assert_close(problem.train_loss((inputs, targets)), plain)
    assert not caplog.records


def test_a_further_loss_that_is_left_out_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    class Balanced(Net):
        def forward(self, inputs: Tensor) -> Any:
            logits = super().forward(inputs)
            return {"logits": logits, "balance": logits.square().mean()}

    model = Balanced("tensor")
    problem = problem_of(model, WeightDecay(model), rows())
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            problem.train_loss(rows())
    (record,) = caplog.records
    assert "balance beside its predictions" in record.getMessage()


def test_a_loss_that_a_subclass_writes_is_meant() -> None:
    class Margin(ClassificationProblem):
        def prediction_loss(self, outputs: Tensor, targets: Tensor, reduction: Any) -> Tensor:
            return F.multi_margin_loss(outputs, targets, reduction=reduction)

    model = Transformer()
    problem = Margin(model, WeightDecay(model), Splits(*[[tokens()]] * 4))
    wanted = F.multi_margin_loss(model(**tokens()).logits, tokens()["labels"])
    torch.testing.assert_close(problem.train_loss(tokens()), wanted)
    torch.testing.assert_close(problem.val_loss(tokens()), wanted)


def test_a_model_may_take_the_mapping_whole() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, CLASSES)

        def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
            logits: Tensor = self.layer(batch["x"])
            return logits

    inputs, targets, _ = rows()
    model = Whole()
    problem = problem_of(model, WeightDecay(model), {"x": inputs, "y": targets})
    wanted = F.cross_entropy(model({"x": inputs}), targets)
    torch.testing.assert_close(problem.val_loss({"x": inputs, "y": targets}), wanted)
    torch.testing.assert_close(problem.val_loss(({"x": inputs}, targets)), wanted)


def test_entries_that_no_argument_takes_are_refused_by_name() -> None:
    model = nn.Bilinear(2, 2, CLASSES)
    batch = {"left": torch.ones(3, 2), "right": torch.ones(3, 2), "labels": torch.arange(3)}
    with pytest.raises(UsageError, match=r"arguments left, right.*forward\(input1"):
        problem_of(model, WeightDecay(model), batch).val_loss(batch)


def test_kinds_that_change_the_inputs_take_the_one_of_a_batch_by_name() -> None:
    class Pixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, CLASSES)

        def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ModelOutput:
            logits = self.layer(pixel_values.flatten(1))
            loss = None if labels is None else F.cross_entropy(logits, labels)
            return ModelOutput(loss=loss, logits=logits)

    model = Pixels()
    batch = {
        "pixel_values": torch.rand(6, 1, 4, 4),
        "labels": torch.arange(6) % CLASSES,
        "index": torch.arange(6),
    }
    problem = problem_of(model, DistilledData(6, (1, 4, 4), init=0.5), batch)
    wanted = model(problem.hyper()).logits
    torch.testing.assert_close(problem.train_loss(batch), F.cross_entropy(wanted, batch["labels"]))
    several = {**batch, "mask": torch.ones(6)}
    for kind in (DistilledData(6, (1, 4, 4)), AugmentationNetwork(1)):
        with pytest.raises(UsageError, match=r"one tensor.*pixel_values, mask"):
            problem_of(model, kind, several).train_loss(several)


def test_a_batch_without_targets_names_the_mend() -> None:
    model = Net("tensor")
    batch = {"inputs": rows()[0], "answer": rows()[1]}
    problem = problem_of(model, WeightDecay(model), batch)
    with pytest.raises(UsageError, match="the batch hold 'labels'"):
        problem.train_loss(batch)


def test_batches_of_another_form_by_override() -> None:
    class Triples(ClassificationProblem):
        def batch_parts(self, batch: Any) -> Any:
            return super().batch_parts((batch["inputs"], batch["answer"]))

    model = Net("tensor")
    batch = {"inputs": rows()[0], "answer": rows()[1]}
    problem = Triples(model, WeightDecay(model), Splits(*[[batch]] * 4))
    wanted = F.cross_entropy(model(batch["inputs"]), batch["answer"])
    torch.testing.assert_close(problem.train_loss(batch), wanted)
    joint = ift_tune.JointOptimizer(problem, MetaConfig(inner_steps=1))
    assert "search_error" in joint.evaluate("search")


class Causal(nn.Module):
    """A language model as transformers have them: each token answers the next one's label."""

    def __init__(self, *, smoothing: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.smoothing = nn.Embedding(7, 7), smoothing

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        logits = self.table(ids)
        if labels is None:
            return {"logits": logits}
        rows, wanted = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return {
            "loss": F.cross_entropy(rows, wanted, label_smoothing=self.smoothing),
            "logits": logits,
        }


def texts() -> dict[str, Tensor]:
    ids = torch.randint(7, (6, 9), generator=torch.Generator().manual_seed(1))
    padding = torch.arange(9) > torch.arange(4, 10).unsqueeze(1)
    return {"ids": ids, "labels": ids.masked_fill(padding, -100), "index": torch.arange(6)}


def test_examples_of_a_language_model_are_weighed_by_their_tokens() -> None:
    batch, model = texts(), Causal()
    hyper = ExampleWeights(6, init=0.5)
    problem = ClassificationProblem(model, hyper, Splits(*[[batch]] * 4))
    own = problem.val_loss(batch)
    assert torch.allclose(problem.train_loss(batch), 0.5 * own)
    assert set(problem.metrics(batch)) == {"loss"}
    _, losses = problem.example_losses(batch)
    counted = batch["labels"][:, 1:] != -100
    assert torch.allclose((losses * counted.sum(1)).sum() / counted.sum(), own)
    # The derivative by the weight of an example is the sum over its tokens, of all that count.
    each = F.cross_entropy(
        model(batch["ids"])["logits"][:, :-1].movedim(-1, 1),
        batch["labels"][:, 1:],
        reduction="none",
    ).sum(1)
    wanted = each / counted.sum()
    slopes = torch.autograd.grad(problem.train_loss(batch), list(hyper.parameters()))[0]
    ratio = slopes / wanted
    assert torch.allclose(ratio, ratio[0].expand(6), rtol=1e-4)


def test_what_a_language_model_adds_to_its_loss_is_still_refused() -> None:
    batch = texts()
    problem = ClassificationProblem(
        Causal(smoothing=0.3), ExampleWeights(6), Splits(*[[batch]] * 4)
    )
    with pytest.raises(UsageError, match="must be the mean of its predictions' losses"):
        problem.train_loss(batch)
