"""Arms whose first trial finds what the others train with: λ to freeze, examples to drop."""

from __future__ import annotations

import functools
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_comparisons import (
    CONFIG,
    SIZES,
    Killed,
    Killer,
    comparison,
    make_clouds,
    make_erring,
    of_cell,
    run,
)
from torch.nn.functional import cross_entropy

from ift_tune import (
    Batches,
    Budget,
    MetaConfig,
    UsageError,
    load_results,
    run_comparison,
    write_report,
)
from ift_tune.base.checkpoints import load_checkpoint
from ift_tune.base.status import StopReason
from ift_tune.compare.arms import ARMS, DEFAULT_ARMS
from ift_tune.compare.arms.staged import KeptHyper, WithoutHighest
from ift_tune.compare.comparison import SearchState, baseline_trial
from ift_tune.hyper import ExampleWeights, kinds_in, loss_weights
from ift_tune.hyper.loss_weights import example_losses
from ift_tune.problem.problem import BilevelProblem
from ift_tune.trial.training import BaselineTraining
from ift_tune.trial.trial import Trial

CPU = torch.device("cpu")
STAGED = ("ift+val", "loss-ranking")
WHOLE = comparison(110.0, weighted=True)
FRESH = SearchState(spent=0.0, best=math.inf, trials=0, exhausted=False)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("staged") / "run"
    run(WHOLE, out, *STAGED)
    return out


def kept(out: Path, arm: str) -> Path:
    return out / "cells" / f"{arm}-0000" / "best" / "model.pt"


def to_the_end(trial: Trial) -> Trial:
    trial.setup()
    while trial.stop_reason is None:
        trial.step()
    return trial


def test_the_ift_trial_is_no_candidate_and_spends_half(undisturbed: Path) -> None:
    results = load_results(undisturbed)
    trials = of_cell(results.trials, "ift+val")
    first, *others = trials.to_dict("records")
    assert math.isnan(first["best_value"])
    assert first["status"] == "complete"
    assert 0.0 < first["gradient_equivalents"] <= 55.0
    assert math.isnan(first["knob.val_weight"])
    assert others[0]["knob.val_weight"] == 1.0
    assert [other["knob.penalty_weight"] for other in others[:3]] == [1.0, 4.0, 16.0]
    assert {other["inner_lr"] for other in others[:3]} == {CONFIG.inner_lr}
    values = [t["best_value"] for t in others if not math.isnan(t["best_value"])]
    assert len(values) >= 2
    steps = of_cell(results.steps, "ift+val")
    assert steps[steps["trial"] == 0]["best_value"].isna().all()


def test_what_follows_is_plain_training_on_both_splits_with_its_hyperparameters(
    undisturbed: Path,
) -> None:
    trials = of_cell(load_results(undisturbed).trials, "ift+val").set_index("trial")
    state = load_checkpoint(kept(undisturbed, "ift+val"))["hyper"]

    def found(config: MetaConfig, device: torch.device, seed: int) -> BilevelProblem:
        problem = make_clouds(config, device, seed, weighted=True)
        problem.hyper.load_state_dict(state)
        return problem

    for number in (1, 2, 3):
        weight, lr = trials["knob.val_weight"][number], trials["inner_lr"][number]
        penalty = trials["knob.penalty_weight"][number]
        training = BaselineTraining(6, True, val_weight=weight, penalty_weight=penalty)
        trial = to_the_end(
            baseline_trial(
                found,
                CONFIG.updated({"inner_lr": lr}),
                training,
                device="cpu",
                metric="search_loss",
            )
        )
        assert trials["best_value"][number] == trial.value
        assert trials["retrained_test_loss"][number] == trial.metrics["retrained_test_loss"]


def test_the_frozen_hyperparameters_are_those_of_the_best_evaluation(undisturbed: Path) -> None:
    state = load_checkpoint(kept(undisturbed, "ift+val"))
    rows = of_cell(load_results(undisturbed).steps, "ift+val").query("trial == 0")
    best = rows.sort_values(["search_loss", "step"]).iloc[0]
    assert state["best_step"] == best["step"]
    trial = Trial(
        functools.partial(make_clouds, weighted=True),
        CONFIG,
        Budget(outer_steps=int(best["step"])),
        device="cpu",
        metric="search_loss",
    )
    to_the_end(trial)
    for name, value in trial.joint.problem.hyper.state_dict().items():
        torch.testing.assert_close(state["hyper"][name], value, rtol=0.0, atol=0.0)
    problem = KeptHyper(WHOLE.problem_factory, kept(undisturbed, "ift+val"))(CONFIG, CPU, 0)
    for name, value in problem.hyper.state_dict().items():
        torch.testing.assert_close(state["hyper"][name], value, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("batches", ["full", "mini"])
def test_the_losses_of_the_examples_are_what_they_are_by_hand(batches: str) -> None:
    problem = make_clouds(CONFIG, CPU, 4, batches=batches, weighted=True)
    weights = kinds_in(problem.hyper, ExampleWeights)[0]
    with torch.no_grad():  # whatever the weights are
        weights.raw.copy_(torch.linspace(-2.0, 3.0, SIZES["train"]))
    expected = torch.zeros(SIZES["train"])
    for inputs, targets, index in problem.splits.train:
        losses = cross_entropy(problem.model(inputs), targets, reduction="none")
        expected[index] = losses.detach()
    torch.testing.assert_close(example_losses(problem, weights) / expected, torch.ones(12))


@pytest.mark.parametrize("transform", ["sigmoid", "softplus"])
def test_an_example_that_is_left_out_has_no_part_in_the_loss(transform: Any) -> None:
    kind = ExampleWeights(5, transform=transform)
    before = kind().detach().clone()
    kind.leave_out(torch.tensor([1, 3]))
    assert kind().tolist() == [before[0], 0.0, before[2], 0.0, before[4]]
    assert all(math.isfinite(value) for value in kind.summary().values())
    losses = torch.ones(5, requires_grad=True)
    kind.weigh(losses, torch.arange(5)).sum().backward()  # type: ignore[no-untyped-call]
    assert losses.grad is not None
    assert losses.grad.tolist() == kind().tolist()


def test_the_examples_of_highest_loss_are_dropped_and_the_model_begins_anew(
    undisturbed: Path,
) -> None:
    file = kept(undisturbed, "loss-ranking")
    ranking = make_clouds(CONFIG, CPU, 0, weighted=True)
    ranking.model.load_state_dict(load_checkpoint(file)["model"])
    losses = torch.zeros(SIZES["train"])
    for inputs, targets, index in ranking.splits.train:
        losses[index] = cross_entropy(ranking.model(inputs), targets, reduction="none").detach()
    for share, count in ((0.02, 0), (0.25, 3), (0.8, 10)):
        problem = WithoutHighest(WHOLE.problem_factory, file, share)(CONFIG, CPU, 0)
        weights = kinds_in(problem.hyper, ExampleWeights)[0]
        dropped = (weights() == 0.0).nonzero().flatten().tolist()
        assert sorted(losses.argsort(descending=True)[:count].tolist()) == dropped
        fresh = make_clouds(CONFIG, CPU, 0, weighted=True)
        torch.testing.assert_close(problem.weights(), fresh.weights(), rtol=0.0, atol=0.0)


def test_the_ranking_is_of_the_best_evaluation_and_a_candidate_itself(undisturbed: Path) -> None:
    results = load_results(undisturbed)
    trials = of_cell(results.trials, "loss-ranking")
    assert trials["knob.dropped"].iloc[0] == 0.0
    assert (trials["knob.dropped"].iloc[1:] > 0.0).all()
    rows = of_cell(results.steps, "loss-ranking").query("trial == 0")
    best = rows.sort_values(["search_loss", "step"]).iloc[0]
    assert trials["best_value"].iloc[0] == best["search_loss"]
    assert load_checkpoint(kept(undisturbed, "loss-ranking"))["best_step"] == best["step"]


def test_the_time_of_the_ranking_is_on_the_clock_of_the_training(
    undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(problem: BilevelProblem, weights: ExampleWeights) -> torch.Tensor:
        time.sleep(0.4)
        return example_losses(problem, weights)

    monkeypatch.setattr(loss_weights, "example_losses", slow)
    ranked = WithoutHighest(WHOLE.problem_factory, kept(undisturbed, "loss-ranking"), 0.25)
    trial = baseline_trial(
        ranked,
        CONFIG,
        BaselineTraining(40),
        budget=Budget(seconds=0.3),
        device="cpu",
        metric="search_loss",
    )
    trial.setup()
    row = trial.step()
    assert row is not None
    assert row["wall_seconds"] >= 0.4
    assert trial.stop_reason is StopReason.DONE  # of 20 evaluations


def test_ranking_the_examples_is_paid_for_by_each_training_that_does(undisturbed: Path) -> None:
    steps = of_cell(load_results(undisturbed).steps, "loss-ranking")
    firsts = steps[steps["step"] == 1].set_index("trial")["gradient_equivalents"]
    pass_over_train = SIZES["train"] / 3.0 / 5.0
    assert firsts[1] - firsts[0] == pytest.approx(pass_over_train)
    assert firsts[2] == pytest.approx(firsts[1])


@pytest.mark.parametrize("arm", STAGED)
@pytest.mark.parametrize(
    ("event", "number"),
    [
        pytest.param("started", 1, marks=pytest.mark.nightly),
        ("step", 2),
        ("ended", 1),  # when the ground is laid
        pytest.param("started", 2, marks=pytest.mark.nightly),
        pytest.param("ended", 3, marks=pytest.mark.nightly),
    ],
)
def test_killed_anywhere_and_resumed_it_comes_to_the_same(
    undisturbed: Path, arm: str, event: str, number: int, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        run(WHOLE, tmp_path / "run", arm, callbacks=[Killer(event, number)])
    resumed = run(WHOLE, tmp_path / "run", arm, resume=True)
    whole = load_results(undisturbed)
    for mine, theirs in zip(resumed, whole, strict=True):
        own = of_cell(theirs, arm).dropna(axis="columns", how="all").reset_index(drop=True)
        columns = [c for c in own if c not in ("run_id", "wall_seconds", "peak_memory_bytes")]
        assert mine[columns].equals(own[columns].astype(mine[columns].dtypes.to_dict()))


def test_the_page_shows_them_and_is_about_the_refitted_model(undisturbed: Path) -> None:
    write_report(undisturbed)
    page = (undisturbed / "report.html").read_text()
    text = (undisturbed / "report.md").read_text()
    for arm in STAGED:
        assert ARMS[arm].label in page
        assert f"| {ARMS[arm].label} | 1 |" in text
        assert ARMS[arm].summary in page
    assert "IFT refitted on training and validation examples" in text.splitlines()[2]
    assert "--arms val,random+val adds what is missing" in text


@pytest.mark.parametrize(
    ("arm", "after", "found"),
    [(arm, 0, False) for arm in STAGED] + [("ift+val", 12, True), ("loss-ranking", 5, True)],
)
def test_ground_that_breaks_is_built_on_as_far_as_it_goes(
    arm: str, after: int, found: bool, tmp_path: Path
) -> None:
    factory = Breaking(after)
    whole = comparison(200.0, problem_factory=factory, trial_budget=Budget(outer_steps=50))
    trials = run(whole, tmp_path / "run", arm).trials
    assert trials["stop_reason"].iloc[0] == "nonfinite"
    if found:
        assert trials["best_value"].notna().any()
        assert len(trials) >= 2
    else:
        assert len(trials) == 1
        assert "best_value" not in trials or trials["best_value"].isna().all()


@dataclass(frozen=True)
class Breaking:
    """Makes the tiny problem, whose training loss is NaN after so many calls."""

    after: int

    def __call__(self, config: MetaConfig, device: torch.device, seed: int) -> BilevelProblem:
        return make_erring(config, device, seed, after=self.after, weighted=True)


def test_what_a_sampler_draws_twice_has_no_loss_twice_as_high() -> None:
    problem = make_clouds(CONFIG, CPU, 0, weighted=True)
    kind = kinds_in(problem.hyper, ExampleWeights)[0]
    once = example_losses(problem, kind)
    train: Any = problem.splits.train
    rows = torch.tensor([0, 0, 0, 1, 2, 2, 3, 5])
    drawn = Batches(
        *(tensor[rows] for tensor in train.dataset.tensors), batch_size=4, shuffle=False
    )
    problem.splits = replace(problem.splits, train=drawn)
    found = example_losses(problem, kind)
    torch.testing.assert_close(found[rows], once[rows])
    assert found[[4, *range(6, len(found))]].isnan().all()


def test_a_task_without_weights_of_examples_is_none_for_loss_ranking(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"leave out the arm 'loss-ranking': .*ExampleWeights"):
        run(comparison(), tmp_path / "run", "random", "loss-ranking")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("weighted", [False, True])
def test_the_usual_arms_are_those_that_the_task_is_one_for(weighted: bool, tmp_path: Path) -> None:
    whole = comparison(1.0, weighted=weighted)
    found = run_comparison(whole, out=tmp_path / "run", seeds=1).trials["arm"]
    others = {"proportional", "uniform"} | (set() if weighted else {"loss-ranking"})
    assert sorted(found) == sorted(set(DEFAULT_ARMS) - others)


@pytest.mark.parametrize(
    ("arm", "split", "matters"),
    [
        ("val", "train", False),
        ("val", "val", True),
        ("random+val", "train", True),
        ("random+val", "val", True),
        ("random", "val", False),
    ],
)
def test_each_rival_trains_on_what_it_says(arm: str, split: str, matters: bool) -> None:
    one, other = (
        ARMS[arm].trials.trial(
            comparison(problem_factory=Changed(changed)), {}, FRESH, seed=2, device="cpu"
        )
        for changed in (None, split)
    )
    for trial in (one, other):
        trial.setup()
        trial.step()
    weights = one.joint.problem.weights(), other.joint.problem.weights()
    same = all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert same is not matters


@dataclass(frozen=True)
class Changed:
    """Makes the tiny problem, one split of which is another."""

    split: str | None

    def __call__(self, config: MetaConfig, device: torch.device, seed: int) -> BilevelProblem:
        problem, other = (make_clouds(config, device, s) for s in (seed, seed + 1))
        if self.split is not None:
            changed = {self.split: getattr(other.splits, self.split)}
            problem.splits = replace(problem.splits, **changed)
        return problem
