"""The audit ranks planted wrong labels first, says how sure it is, and what it cannot say."""

from __future__ import annotations

import base64
import io
import json
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import image
from sklearn.metrics import f1_score, roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

import ift_tune
from ift_tune import (
    Batches,
    BilevelProblem,
    Budget,
    ClassificationProblem,
    Compose,
    ExampleWeights,
    MetaConfig,
    RegressionProblem,
    Splits,
    UsageError,
    WeightDecay,
    audit,
    run_single,
    run_study,
)
from ift_tune.base.errors import Interrupted
from ift_tune.problem.factory import build_problem
from ift_tune.report.audit import load_audit, page, write_page
from ift_tune.studies.audit_findings import Ranking, auc, compared, f1, overlap, sentences
from ift_tune.studies.audited_problems import LeftOut, OnValidation, Reseeded
from ift_tune.studies.shown import shown

CLASSES, EXAMPLES, WRONG = 3, 60, 15
CONFIG = MetaConfig(
    meta_lr=0.5, inner_steps=10, inner_lr=0.2, inner_optimizer="momentum", start_check=False
)
BUDGET = Budget(outer_steps=12, retrain=False)
Factory = Callable[[MetaConfig, torch.device, int], BilevelProblem]


def clouds(seed: int, examples: int = EXAMPLES) -> tuple[Tensor, Tensor]:
    """Return inputs around three corners, in small pictures, with their classes."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(examples) % CLASSES
    inputs = 2.0 * F.one_hot(targets, 4) + 0.7 * torch.randn(examples, 4, generator=generator)
    return inputs.view(-1, 1, 2, 2), targets


class Spoiled(ClassificationProblem):
    """Knows which labels it has spoiled: the first ones."""

    clean: Tensor


def spoiled(config: MetaConfig, device: torch.device, seed: int) -> ClassificationProblem:
    """Wrong labels for a quarter of the training examples; the seed draws the data too."""
    inputs, targets = clouds(1000 * seed)
    wrong = targets.clone()
    wrong[:WRONG] = (wrong[:WRONG] + 1) % CLASSES
    val, search, test = (Batches(*clouds(1000 * seed + number)) for number in (1, 2, 3))
    train = Batches(inputs, wrong, torch.arange(EXAMPLES), batch_size=20, seed=seed)
    whole = Batches(inputs, wrong, torch.arange(EXAMPLES))
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, CLASSES))
    decay = WeightDecay(model, "model", init=1e-3, transform="exp")
    hyper = Compose({"weights": ExampleWeights(EXAMPLES), "decay": decay})
    problem = Spoiled(model, hyper, Splits(train, val, search, test, whole))
    problem.clean = wrong == targets
    return problem


def run(directory: Path, factory: Factory = spoiled, seed: int = 0) -> Path:
    run_single(factory, BUDGET, out=directory, config=CONFIG, seed=seed, device="cpu")
    return directory


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    """A run of one seed and its audit with two more."""
    directory = run(tmp_path_factory.mktemp("audited") / "run", seed=4)
    return directory, audit(directory, spoiled, seeds=3, top=15, folds=0, device="cpu")


def test_wrong_labels_come_first(audited: tuple[Path, pd.DataFrame]) -> None:
    _, table = audited
    assert table["rank"].tolist() == list(range(1, EXAMPLES + 1))
    assert sorted(table["index"]) == list(range(EXAMPLES))
    wrong = table["wrong"].to_numpy()
    assert (wrong == (table["index"] < WRONG)).all()
    assert wrong[:WRONG].mean() > 0.8
    assert roc_auc_score(wrong, -table["rank"]) > 0.97
    assert table["mean_loss"].is_monotonic_decreasing
    # The models name the class that each label was before, of those that it takes back.
    taken_back = table[table["wrong"] & table["flagged"]]
    assert len(taken_back) > 0.7 * WRONG
    assert (taken_back["suggested_label"] == taken_back["index"] % CLASSES).mean() > 0.9
    assert (taken_back["given_label"] == (taken_back["index"] + 1) % CLASSES).all()
    assert table.loc[table["wrong"], "weight"].mean() < 0.5 * table["weight"].mean()


def test_what_it_says_of_the_rankings_is_so(audited: tuple[Path, pd.DataFrame]) -> None:
    _, table = audited
    facts = table.attrs["audit"]
    rows = {row["ranking"]: row for row in facts["rankings"]}
    assert list(rows) == ["audit", "refit", "weights", "loss", "val", "loss+val"]
    wrong = table["wrong"]
    for name, scores in (
        ("audit", table["mean_loss"]),
        ("refit", table["refitted_loss"]),
        ("weights", -table["weight"]),
        ("loss", table["plain_loss"]),
        ("val", table["validation_model_loss"]),
        ("loss+val", table["plain_loss"] + table["validation_model_loss"]),
    ):
        assert rows[name]["auc"] == pytest.approx(roc_auc_score(wrong, scores))
    assert rows["audit"]["f1"] == pytest.approx(f1_score(wrong, table["flagged"]))
    assert rows["audit"]["precision_at_top"] == table["wrong"].head(15).mean()
    each = table[["refitted_loss", "plain_loss", "validation_model_loss"]]
    np.testing.assert_allclose(table["mean_loss"], each.mean(axis="columns"), rtol=1e-12)
    cost = {name: row["gradient_equivalents"] for name, row in rows.items()}
    assert min(cost.values()) > 0.0
    # The runs are paid for wherever the weights are looked at.
    assert cost["refit"] > cost["weights"]
    assert cost["loss+val"] == pytest.approx(cost["loss"] + cost["val"])
    assert cost["audit"] == pytest.approx(cost["refit"] + cost["loss+val"])
    assert facts["seeds"] == [4, 5, 6]
    assert 0.5 < facts["overlap"] <= 1.0
    assert any("3 seeds have" in sentence for sentence in facts["sentences"])


def test_standard_errors_are_over_runs_of_the_same_examples(
    audited: tuple[Path, pd.DataFrame],
) -> None:
    directory, table = audited
    found = []
    for name in ("best", "audit/trainings/seed-5", "audit/trainings/seed-6"):
        factory = Reseeded(spoiled, 4)
        problem = ift_tune.load_best(directory / name, factory, device="cpu")
        assert torch.equal(next(iter(problem.splits.curvature))[1][:3], torch.tensor([1, 2, 0]))  # type: ignore[arg-type]
        (kind,) = (m for m in problem.hyper.modules() if isinstance(m, ExampleWeights))
        found.append(kind().detach().numpy())
    by_index = table.sort_values("index")
    weights = np.stack(found)
    np.testing.assert_allclose(by_index["weight"], weights.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(
        by_index["weight_se"], weights.std(axis=0, ddof=1) / np.sqrt(3.0), rtol=1e-4
    )
    assert (by_index["weight_se"] > 0.0).all()


def test_another_seed_has_the_data_of_the_first_and_weights_of_its_own() -> None:
    device = torch.device("cpu")
    first, other, own = (
        build_problem(factory, CONFIG, device, seed)
        for factory, seed in ((spoiled, 4), (Reseeded(spoiled, 4), 9), (spoiled, 9))
    )
    for split in ("train", "val", "search", "test"):
        same, data = getattr(other.splits, split), getattr(first.splits, split)
        assert torch.equal(same.tensors[0], data.tensors[0])
        assert not torch.equal(same.tensors[0], getattr(own.splits, split).tensors[0])
    assert all(map(torch.equal, other.weights(), own.weights()))
    assert not any(map(torch.equal, other.weights(), first.weights()))
    orders = [next(iter(problem.splits.train))[2].tolist() for problem in (first, other)]
    assert orders[0] != orders[1]


def test_a_second_audit_repeats_nothing_and_writes_the_same(
    audited: tuple[Path, pd.DataFrame], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    directory, table = audited
    files = {p.name: p.read_bytes() for p in (directory / "audit").glob("audit.*")}
    assert set(files) == {"audit.parquet", "audit.csv", "audit.html"}
    said: list[str] = []
    monkeypatch.setattr("ift_tune.studies.audited.run_trial", None)
    again = audit(directory, spoiled, seeds=3, top=15, folds=0, device="cpu", say=said.append)
    pd.testing.assert_frame_equal(again, table)
    assert {p.name: p.read_bytes() for p in (directory / "audit").glob("audit.*")} == files
    assert not said
    # The table tells all of it, the page too.
    kept = load_audit(directory)
    assert kept is not None
    assert page(kept).encode() == files["audit.html"]
    (directory / "audit" / "audit.html").unlink()
    assert write_page(directory).read_bytes() == files["audit.html"]
    csv = pd.read_csv(directory / "audit" / "audit.csv")
    np.testing.assert_allclose(csv["weight"], table["weight"])
    assert load_audit(tmp_path) is None


def test_one_seed_has_no_standard_error_and_says_so(tmp_path: Path) -> None:
    directory = run(tmp_path / "run")
    out = tmp_path / "elsewhere" / "found"
    wrong = np.zeros(EXAMPLES, dtype=bool)
    wrong[:30] = True
    table = audit(directory, spoiled, wrong=wrong, folds=0, out=out, device="cpu")
    assert table["weight_se"].isna().all()
    assert np.isnan(table.attrs["audit"]["overlap"])
    assert any("one seed" in sentence for sentence in table.attrs["audit"]["sentences"])
    assert table["wrong"].sum() == 30  # what is given goes before what the problem knows
    assert {"audit.parquet", "audit.csv", "audit.html"} <= {p.name for p in out.iterdir()}
    assert not (directory / "audit").exists()


def test_of_a_search_the_best_trial_is_audited(tmp_path: Path) -> None:
    space = ift_tune.MetaSpace({"meta_lr": ift_tune.Float(0.05, 0.6)})
    found = run_study(
        spoiled, space, BUDGET, n_trials=3, config=CONFIG, out=tmp_path / "s", device="cpu"
    )
    table = audit(tmp_path / "s", spoiled, folds=0, device="cpu")
    assert found.best is not None
    weights = {m for m in found.best.hyper.modules() if isinstance(m, ExampleWeights)}
    np.testing.assert_allclose(
        table.sort_values("index")["weight"], weights.pop()().detach(), rtol=1e-6
    )
    # Of one seed, the spread is that of the better half of the trials, and is said to be.
    trials = ift_tune.load_results(tmp_path / "s").trials
    better = trials.sort_values(["best_value", "trial"], kind="stable")["trial"].head(2)
    states = [torch.load(tmp_path / f"s/trial-{n:05}/hyperparameters.pt")["state"] for n in better]
    spread = np.stack([state["kinds.weights.raw"].sigmoid().numpy() for state in states])
    # The weight is one trial's, and not a mean: so its error is what trials differ by.
    np.testing.assert_allclose(
        table.sort_values("index")["weight_se"], spread.std(axis=0, ddof=1), atol=1e-7
    )
    facts = table.attrs["audit"]
    assert (facts["over"], facts["runs"]) == ("trials", 2)
    assert any("over the better half of the search's trials" in s for s in facts["sentences"])
    rows = facts["rankings"]
    costs = {row["ranking"]: row["gradient_equivalents"] for row in rows}
    assert costs["weights"] == pytest.approx(trials["gradient_equivalents"].sum())
    refitted = json.loads((tmp_path / "s/refit-train+val/trial.json").read_text())
    assert costs["refit"] == pytest.approx(
        costs["weights"] + float(refitted["gradient_equivalents"])
    )


def test_pictures_are_shown_as_they_are(audited: tuple[Path, pd.DataFrame]) -> None:
    directory, table = audited
    looks = table.attrs["audit"]["looks"]
    assert list(map(int, looks)) == table["index"].head(15).tolist()
    problem = spoiled(CONFIG, torch.device("cpu"), 4)
    inputs = next(iter(problem.splits.curvature))[0]  # type: ignore[arg-type]
    shades = inputs[[int(i) for i in looks], 0]
    for look, pixels in zip(looks.values(), shades, strict=True):
        drawn = image.imread(io.BytesIO(base64.b64decode(look["image"])), format="png")
        assert drawn.shape == (2, 2, 3)
        share = (pixels - shades.min()) / (shades.max() - shades.min())
        np.testing.assert_allclose(drawn[..., 0], share, atol=1 / 255)
    text = (directory / "audit" / "audit.html").read_text()
    assert text.count("data:image/png;base64,") == 15


class Words(nn.Module):
    """Takes the features of a text, and leaves the text itself to whoever reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, CLASSES)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.linear(features)
        return logits


def texts(config: MetaConfig, device: torch.device, seed: int) -> ClassificationProblem:
    problem = spoiled(config, device, seed)
    words = [f"<script>alert({i})</script> & so on" for i in range(EXAMPLES)]

    def batch(loader: Any) -> list[dict[str, Any]]:
        inputs, targets, *rest = next(iter(loader))
        found = {"features": inputs.flatten(1), "labels": targets, "text": words}
        return [found | ({"index": rest[0]} if rest else {})]

    parts = [batch(getattr(problem.splits, n)) for n in ("curvature", "val", "search", "test")]
    made = ClassificationProblem(Words(), ExampleWeights(EXAMPLES), Splits(*parts))
    made.class_names = [f"<kind {k}>" for k in range(CLASSES)]  # type: ignore[attr-defined]
    return made


def test_texts_are_shown_and_cannot_become_elements(tmp_path: Path) -> None:
    directory = run(tmp_path / "run", texts)
    table = audit(directory, texts, top=5, folds=0, device="cpu")
    shown = (directory / "audit" / "audit.html").read_text()
    first = table["index"].iloc[0]
    assert f"&lt;script&gt;alert({first})&lt;/script&gt; &amp; so on" in shown
    assert "<script" not in shown
    label = table["given_label"].iloc[0]
    assert f"given <strong>&lt;kind {label}&gt;</strong>" in shown
    assert "wrong" not in table
    assert "auc" not in table.attrs["audit"]["rankings"][0]


@dataclass(frozen=True)
class Line:
    """A regression, some of whose targets are far off."""

    off: float = 6.0

    def __call__(self, config: MetaConfig, device: torch.device, seed: int) -> RegressionProblem:
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(4, 40, 2, generator=generator)
        targets = inputs.sum(dim=2, keepdim=True)
        train = targets[0].clone()
        train[:8] += self.off
        rest = [Batches(inputs[i], targets[i]) for i in (1, 2, 3)]
        model, first = nn.Linear(2, 1), Batches(inputs[0], train, torch.arange(40))
        return RegressionProblem(model, ExampleWeights(40), Splits(first, *rest))


def test_of_a_regression_targets_are_held_against_predictions(tmp_path: Path) -> None:
    directory = run(tmp_path / "run", Line())
    table = audit(directory, Line(), wrong=np.arange(40) < 8, device="cpu")
    assert set(table["index"].head(8)) == set(range(8))
    row = table.iloc[0]
    assert row["given_label"] - row["suggested_label"] == pytest.approx(6.0, abs=0.5)
    names = [row["ranking"] for row in table.attrs["audit"]["rankings"]]
    assert names == ["audit", "refit", "weights", "loss", "val", "loss+val"]
    assert np.isnan(table.attrs["audit"]["rankings"][0]["f1"])
    # Rows of features, as numbers.
    assert table.attrs["audit"]["looks"][str(row["index"])]["text"].count(" ") == 1


class Own(BilevelProblem):
    """Losses of its own, of which nobody can tell the single examples' but itself."""

    def __init__(self, seed: int) -> None:
        problem = spoiled(CONFIG, torch.device("cpu"), seed)
        self.model, self.splits = problem.model, problem.splits
        self.hyper = ExampleWeights(EXAMPLES)

    def train_loss(self, batch: Any) -> Tensor:
        losses = F.cross_entropy(self.model(batch[0]), batch[1], reduction="none")
        found: Tensor = (self.hyper(batch[2]) * losses).mean()
        return found

    def val_loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])


def own(config: MetaConfig, device: torch.device, seed: int) -> Own:
    return Own(seed)


def test_a_problem_of_ones_own_is_ranked_by_its_weights(tmp_path: Path) -> None:
    table = audit(run(tmp_path / "run", own), own, wrong=np.arange(EXAMPLES) < WRONG, device="cpu")
    assert table["weight"].is_monotonic_increasing
    assert roc_auc_score(table["wrong"], -table["weight"]) > 0.9
    assert "suggested_label" not in table
    assert table["search_loss_change"].notna().all()


class Named(Own):
    """The same with batches by name."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        given: Any = self.splits.train
        inputs, targets, index = given.tensors
        train = Batches({"inputs": inputs, "targets": targets, "index": index})
        self.splits = replace(self.splits, train=train, curvature=None)

    def train_loss(self, batch: Any) -> Tensor:
        return super().train_loss(tuple(batch.values()))


def named(config: MetaConfig, device: torch.device, seed: int) -> Named:
    return Named(seed)


def test_batches_by_name_are_shown_too(tmp_path: Path) -> None:
    table = audit(run(tmp_path / "run", named), named, products=0, device="cpu")
    assert len(table.attrs["audit"]["looks"]) == 50


def test_an_audit_leaves_the_users_refit_alone(tmp_path: Path) -> None:
    directory = run(tmp_path / "run")
    mine = ift_tune.refit(
        directory, spoiled, "train+val", val_weight=2.0, penalty_weight=16.0, device="cpu"
    )
    audit(directory, spoiled, folds=0, products=0, device="cpu")
    folder = directory / "refit-train+val-val_weight-2-penalty_weight-16"
    again = ift_tune.load_best(folder, spoiled, device="cpu")
    for one, other in zip(mine.weights(), again.weights(), strict=True):
        assert torch.equal(one, other)


def test_a_run_without_weights_says_what_an_audit_needs(tmp_path: Path) -> None:
    def decays(config: MetaConfig, device: torch.device, seed: int) -> ClassificationProblem:
        problem = spoiled(config, device, seed)
        return ClassificationProblem(
            problem.model, WeightDecay(problem.model, "tensor"), problem.splits
        )

    directory = run(tmp_path / "run", decays)
    before = sorted(p.name for p in directory.iterdir())
    with pytest.raises(UsageError, match=r"put ift_tune.ExampleWeights.*got WeightDecay"):
        audit(directory, decays, device="cpu")
    assert sorted(p.name for p in directory.iterdir()) == before
    # A function inside another cannot be imported.
    with pytest.raises(UsageError, match=r"give make_problem.*got no module and name"):
        audit(directory, device="cpu")


def test_the_factory_is_the_one_that_the_run_has_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "audited_module.py").write_text("from test_audit import spoiled as make\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setitem(sys.modules, "test_audit", sys.modules[__name__])
    monkeypatch.setattr(spoiled, "__module__", "audited_module")
    monkeypatch.setattr(spoiled, "__qualname__", "make")
    directory = run(tmp_path / "run")
    assert len(audit(directory, folds=0, device="cpu")) == EXAMPLES
    (tmp_path / "audited_module.py").unlink()
    monkeypatch.delitem(sys.modules, "audited_module")
    with pytest.raises(UsageError, match=r"audited_module:make.*got ModuleNotFoundError"):
        audit(directory, device="cpu")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"seeds": 0}, "seeds must be an integer of at least 1, got 0"),
        ({"top": 0}, "top must be an integer of at least 1"),
        ({"folds": 1}, "folds must be 0, which leaves cleanlab out, or at least 2, got 1"),
        ({"wrong": [True]}, r"wrong must be a truth value for each of the 60 .* shape \(1,\)"),
        ({"wrong": [0] * 60}, "wrong must be a truth value .* got int64"),
    ],
)
def test_nonsense_is_refused_before_anything_is_trained(
    audited: tuple[Path, pd.DataFrame], arguments: dict[str, Any], text: str, tmp_path: Path
) -> None:
    directory, _ = audited
    with pytest.raises(UsageError, match=text):
        audit(directory, spoiled, out=tmp_path / "out", device="cpu", **arguments)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="another folder than the run's"):
        audit(directory, spoiled, out=directory)
    with pytest.raises(UsageError, match="there is no"):
        audit(tmp_path / "nowhere")


def test_what_is_left_out_has_no_part_in_a_training() -> None:
    def trained(targets: Callable[[Tensor], Tensor]) -> list[Tensor]:
        def factory(config: MetaConfig, device: torch.device, seed: int) -> BilevelProblem:
            problem = spoiled(config, device, seed)
            for loader in (problem.splits.train, problem.splits.curvature):
                labels = loader.tensors[1]  # type: ignore[union-attr]
                labels.copy_(targets(labels))
            return problem

        problem = LeftOut(factory, 1, 3)(CONFIG, torch.device("cpu"), 0)
        ift_tune.JointOptimizer(problem, CONFIG).train_weights(20)
        return [w.detach() for w in problem.weights()]

    members = LeftOut.members(EXAMPLES, 1, 3)
    assert len(members) == EXAMPLES // 3
    every = [i for part in range(3) for i in LeftOut.members(EXAMPLES, part, 3).tolist()]
    assert sorted(every) == list(range(EXAMPLES))

    def other(labels: Tensor, chosen: Tensor) -> Tensor:
        changed = labels.clone()
        changed[chosen] = (changed[chosen] + 1) % CLASSES
        return changed

    base = trained(lambda labels: labels)
    assert all(map(torch.equal, trained(lambda t: other(t, members)), base))
    rest = LeftOut.members(EXAMPLES, 2, 3)
    assert not any(map(torch.equal, trained(lambda t: other(t, rest)), base))


def test_cleanlab_ranks_beside_it(audited: tuple[Path, pd.DataFrame], tmp_path: Path) -> None:
    pytest.importorskip("cleanlab")
    directory, _ = audited
    table = audit(directory, spoiled, folds=3, out=tmp_path, device="cpu")
    row = table.attrs["audit"]["rankings"][-1]
    assert row["ranking"] == "cleanlab"
    assert row["auc"] == pytest.approx(roc_auc_score(table["wrong"], table["cleanlab_score"]))
    assert row["auc"] > 0.9
    # Its scores are of quality, here turned round: the highest is the most suspect.
    assert table["cleanlab_score"].between(-1.0, 0.0).all()
    costs = {r["ranking"]: r["gradient_equivalents"] for r in table.attrs["audit"]["rankings"]}
    assert costs["cleanlab"] == pytest.approx(3.0 * costs["loss"])


def test_without_cleanlab_the_audit_says_what_is_missing(
    audited: tuple[Path, pd.DataFrame], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("cleanlab", "cleanlab.rank", "cleanlab.filter"):
        monkeypatch.setitem(sys.modules, name, None)
    directory, _ = audited
    table = audit(directory, spoiled, folds=3, out=tmp_path, device="cpu")
    assert "pip install 'ift_tune[audit]'" in table.attrs["audit"]["sentences"][-1]
    assert "cleanlab_score" not in table
    assert not list((tmp_path / "trainings").glob("without-*"))


def test_it_is_said_where_a_rival_ranks_better() -> None:
    wrong = np.array([True, True, False, False])
    scores = {"audit": [4.0, 1.0, 3.0, 2.0], "loss": [4.0, 3.0, 2.0, 1.0], "val": [1.0, 2, 3, 4]}
    rankings = [Ranking(name, "", np.array(s), None, 1.0) for name, s in scores.items()]
    facts = {"examples": 4, "top": 2, "runs": 1, "over": "seeds", "wrong": 2, "unknown": 0}
    said = sentences(facts, compared(rankings, wrong, 2))
    assert "Here loss ranks better than audit." in said
    assert not any("Here" in s for s in sentences(facts, compared(rankings[1:], wrong, 2)))
    more = sentences(facts | {"unknown": 3}, compared(rankings, None, 2))
    assert more[0].startswith("3 examples come in no batch")


def test_numbers_of_the_findings() -> None:
    scores = np.array([0.1, 0.4, np.nan, 0.4, 0.9])
    wrong = np.array([False, True, True, False, True])
    known = ~np.isnan(scores)
    assert auc(scores, wrong) == pytest.approx(roc_auc_score(wrong[known], scores[known]))
    assert np.isnan(auc(scores, np.ones(5, dtype=bool)))
    assert f1(wrong, wrong) == 1.0
    assert np.isnan(f1(~wrong & wrong, ~wrong & wrong))
    ranking = Ranking("a", "", scores, None, 0.0)
    assert ranking.top(5).tolist() == [4, 1, 3, 0, 2]
    other = Ranking("b", "", -scores, None, 0.0)
    assert overlap([ranking, other], 2) == 0.5
    assert np.isnan(overlap([ranking], 2))


def test_tokens_are_shown_in_the_words_of_the_problem() -> None:
    problem = spoiled(CONFIG, torch.device("cpu"), 0)
    tokens = torch.tensor([[7, 4, 11, 11, 14], [1, 2, 3, 4, 5]])
    train = [(tokens, torch.zeros(2), torch.arange(2))]
    other = Batches(torch.zeros(2, 3, 5), torch.zeros(2), torch.arange(2))
    texts_of = ClassificationProblem(
        problem.model, problem.hyper, Splits(train, other, other, other)
    )
    assert shown(texts_of, [1, 0]) == {0: {"text": "7 4 11 11 14"}, 1: {"text": "1 2 3 4 5"}}
    texts_of.decode = lambda row: "".join(chr(97 + int(i)) for i in row)  # type: ignore[attr-defined]
    assert shown(texts_of, [0]) == {0: {"text": "hello"}}
    rows = Splits(other, other, other, other)
    table = ClassificationProblem(problem.model, problem.hyper, rows)
    assert shown(table, [1])[1]["text"] == " ".join(["0"] * 15)
    table.image_shape = (1, 3, 5)  # type: ignore[attr-defined]
    flat = Batches(torch.zeros(2, 15), torch.zeros(2), torch.arange(2))
    table.splits = Splits(flat, flat, flat, flat)
    assert "image" in shown(table, [1])[1]


def test_the_rival_on_validation_examples_sees_no_others() -> None:
    def trained(change: Callable[[BilevelProblem], object]) -> list[Tensor]:
        def factory(config: MetaConfig, device: torch.device, seed: int) -> BilevelProblem:
            problem = spoiled(config, device, seed)
            change(problem)
            return problem

        problem = build_problem(OnValidation(factory), CONFIG, torch.device("cpu"), 2)
        ift_tune.JointOptimizer(problem, CONFIG).train_weights(10)
        return [w.detach() for w in problem.weights()]

    def spoil(split: str) -> Callable[[BilevelProblem], object]:
        return lambda problem: getattr(problem.splits, split).tensors[0].mul_(-1.0)

    base = trained(lambda _: None)
    assert all(map(torch.equal, trained(spoil("train")), base))
    assert not any(map(torch.equal, trained(spoil("val")), base))
    # By hand: plain gradient descent with momentum on the mean loss, and the decay.
    problem = build_problem(spoiled, CONFIG, torch.device("cpu"), 2)
    inputs, targets = problem.splits.val.tensors  # type: ignore[attr-defined]
    optimizer = torch.optim.SGD(problem.weights(), lr=0.2, momentum=0.9)
    for _ in range(10):
        optimizer.zero_grad()
        penalty = problem.penalty()
        assert penalty is not None
        loss: Any = F.cross_entropy(problem.model(inputs), targets)
        (loss + penalty.value(problem.weights())).backward()
        optimizer.step()
    for own, by_hand in zip(base, problem.weights(), strict=True):
        torch.testing.assert_close(own, by_hand.detach())


def test_an_interrupted_audit_goes_on(audited: tuple[Path, pd.DataFrame], tmp_path: Path) -> None:
    directory, table = audited
    said: list[str] = []

    def interrupt(line: str) -> None:
        said.append(line)
        if line == "training a run of seed 5":
            signal.raise_signal(signal.SIGINT)

    for _ in range(2):  # in the second run, which is a step further each time
        with pytest.raises(Interrupted, match="audit again to go on"):
            audit(directory, spoiled, seeds=2, folds=0, out=tmp_path, device="cpu", say=interrupt)
    assert not list(tmp_path.glob("audit.*"))
    again = audit(directory, spoiled, seeds=2, folds=0, out=tmp_path, device="cpu", say=said.append)
    assert said.count("training a run of seed 5") == 3
    assert said.count("training plainly") == 1  # what had ended is not repeated
    weights = ift_tune.load_best(tmp_path / "trainings/seed-5", Reseeded(spoiled, 4), device="cpu")
    undisturbed = ift_tune.load_best(
        directory / "audit/trainings/seed-5", Reseeded(spoiled, 4), device="cpu"
    )
    assert all(map(torch.equal, weights.hypers(), undisturbed.hypers()))
    assert len(again) == len(table)


def test_a_comparison_is_not_audited(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"task": "mine", "backend": "compare"}')
    with pytest.raises(UsageError, match="audit a run or a search"):
        audit(tmp_path, spoiled)
