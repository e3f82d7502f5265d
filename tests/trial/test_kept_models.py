"""What a run keeps: the best evaluation's model and λ, found again, refitted, beside a baseline."""

from __future__ import annotations

import functools
import json
import math
import signal
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta
from small_problems import (
    BUDGET,
    CONFIG,
    SPACE,
    assert_same_tables,
    assert_same_tensors,
    make_quadratic,
    make_tiny,
)
from torch import nn

import ift_tune
from ift_tune import (
    Budget,
    Callback,
    IFTObjective,
    MetaConfig,
    UsageError,
    load_best,
    load_results,
    refit,
    run_study,
    testing,
)
from ift_tune.base.checkpoints import load_checkpoint
from ift_tune.base.errors import Interrupted
from ift_tune.base.status import Outcome, StopReason
from ift_tune.hyper.supervised import ClassificationProblem
from ift_tune.joint.joint import JointOptimizer
from ift_tune.trial.best import find_best
from ift_tune.trial.record import TrialRecord
from ift_tune.trial.refit import frozen_trial
from ift_tune.trial.session import run_single
from ift_tune.trial.tables import RunDirectory
from ift_tune.trial.trial import Trial

# λ moves so fast that the best moment is not the last.
WILD = CONFIG.updated({"meta_lr": 2.0, "inner_lr": 0.2, "inner_steps": 3})
LONG = Budget(outer_steps=12, retrain=False)


def single(out: Path, factory: Any = make_tiny, **changes: Any) -> Outcome:
    settings: dict[str, Any] = {"config": WILD, "device": "cpu", "metric": "search_loss"}
    budget = changes.pop("budget", LONG)
    return run_single(factory, budget, out=out, **(settings | changes))


def assert_same_course(one: Path, other: Path) -> None:
    """Compare both tables of two runs, one of which has been there before."""
    different = ["run_id", "wall_seconds", "peak_memory_bytes"]
    for mine, others in zip(load_results(one), load_results(other), strict=True):
        assert mine.drop(columns=different).equals(others.drop(columns=different))


def same_states(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


class Recorder(Callback):
    """Keeps the state after each outer step."""

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []

    def on_outer_step_end(self, joint: JointOptimizer, metrics: dict[str, float]) -> None:
        state = joint.state_dict()
        self.states.append({"model": state["model"], "hyper": state["hyper"]})


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_best_evaluation_counts_and_its_model_is_loaded(mode: str, tmp_path: Path) -> None:
    recorder = Recorder()
    outcome = single(tmp_path / "run", mode=mode, callbacks=[recorder])
    steps = load_results(tmp_path / "run").steps
    values = steps["search_loss"].tolist()
    best = min(values) if mode == "min" else max(values)
    step = values.index(best)
    assert outcome.value == best
    row = load_results(tmp_path / "run").trials.iloc[0]
    assert (row["best_value"], row["best_step"]) == (best, step + 1)
    assert row["step"] == len(values)
    for column in ("search_loss", "search_error", "test_error", "test_loss", "val_test_gap"):
        assert row[column] == steps[column][step]  # of the same evaluation
        assert outcome.metrics[column] == steps[column][step]
    problem = load_best(tmp_path / "run", make_tiny, device="cpu")
    assert not problem.model.training
    for name in ("model", "hyper"):
        then = recorder.states[step][name]
        now = getattr(problem, name).state_dict()
        assert all(torch.equal(now[key], then[key]) for key in then)
    assert problem.evaluate(problem.splits.search)["loss"] == pytest.approx(best, rel=1e-6)


def test_the_best_moment_of_this_problem_is_not_the_last(tmp_path: Path) -> None:
    single(tmp_path / "run")
    row = load_results(tmp_path / "run").trials.iloc[0]
    assert 1 < row["best_step"] < row["step"]


@pytest.mark.parametrize("patience", [1, 3])
@pytest.mark.parametrize("eval_every", [1, 2])
def test_patience_ends_a_trial_and_only_after_an_evaluation(
    patience: int, eval_every: int, tmp_path: Path
) -> None:
    length = Budget(outer_steps=30, eval_every=eval_every, patience=patience, retrain=False)
    outcome = single(tmp_path / "run", budget=length)
    assert outcome.stop_reason is StopReason.DONE
    steps = load_results(tmp_path / "run").steps
    last, best = int(steps["step"].iloc[-1]), int(steps["best_step"].dropna().iloc[-1])
    assert last < 30
    assert last % eval_every == 0
    assert last == best + eval_every * math.ceil(patience / eval_every)
    whole = load_results(tmp_path / "run").trials.iloc[0]
    assert whole["best_value"] == steps["search_loss"].min()


def test_patience_is_a_whole_number_of_steps() -> None:
    for wrong in (0, -1, 1.5, "two"):
        with pytest.raises(UsageError, match="patience must be"):
            Budget(outer_steps=3, patience=wrong)  # type: ignore[arg-type]


def test_a_retraining_stops_early_too_and_its_best_counts() -> None:
    """The retrained score is that of the search split's best moment, as a loop by hand has it."""
    length = Budget(outer_steps=6, patience=2)
    trial = Trial(make_tiny, WILD, length, device="cpu", metric="search_loss")
    trial.setup()
    while trial.stop_reason is None:
        trial.step()
    found = trial.finish()
    problem = trial.rebuild(WILD, torch.device("cpu"), 0)
    plain = JointOptimizer(problem, WILD)
    best, waited, score = math.inf, 0, math.nan
    for _ in range(trial.joint.inner_steps):  # 18 at most: fewer than 20 evaluations, one for each
        plain.train_weights(1)
        measured = plain.evaluate("search") | plain.evaluate("test")
        waited += 1
        if measured["search_loss"] < best:
            best, score, waited = measured["search_loss"], measured["test_loss"], 0
        if waited >= 2 * WILD.inner_steps:
            break
    assert found["retrained_search_loss"] == best
    assert found["retrained_test_loss"] == score


@pytest.mark.parametrize("stopped_at", [2, 5, 9])
def test_a_resumed_run_keeps_the_best_of_before_it_was_stopped(
    stopped_at: int, tmp_path: Path
) -> None:
    class Stop(Callback):
        def on_trial_step(self, number: int, row: dict[str, Any]) -> None:
            if row["step"] == stopped_at:
                signal.raise_signal(signal.SIGINT)

    single(tmp_path / "whole")
    with pytest.raises(Interrupted):
        single(tmp_path / "cut", callbacks=[Stop()])
    assert not (tmp_path / "cut" / "best").exists()
    single(tmp_path / "cut", resume=True)
    assert_same_tables(tmp_path / "cut", tmp_path / "whole")
    one, other = (load_best(tmp_path / name, make_tiny, device="cpu") for name in ("cut", "whole"))
    assert same_states(one.model, other.model)
    assert same_states(one.hyper, other.hyper)


def test_a_finished_run_goes_on_with_a_larger_budget_as_if_it_had_been_so(tmp_path: Path) -> None:
    single(tmp_path / "run", budget=Budget(outer_steps=5))
    first = find_best(tmp_path / "run")["best_step"]
    recorder = Recorder()
    single(tmp_path / "run", budget=Budget(outer_steps=9), resume=True, callbacks=[recorder])
    assert len(recorder.states) == 4  # steps 6 to 9, none again
    single(tmp_path / "whole", budget=Budget(outer_steps=9))
    assert_same_course(tmp_path / "run", tmp_path / "whole")
    assert find_best(tmp_path / "run")["best_step"] >= first
    # Asked for the same again, nothing is built or written.
    assert single(tmp_path / "run", _unbuildable, budget=Budget(outer_steps=9), resume=True)


def _unbuildable(config: MetaConfig, device: torch.device, seed: int) -> ClassificationProblem:
    raise AssertionError("nothing is to be done")


def test_a_trial_that_stopped_early_goes_on_with_more_patience(tmp_path: Path) -> None:
    short, long = (Budget(outer_steps=30, patience=n, retrain=False) for n in (1, 6))
    single(tmp_path / "run", budget=short)
    before = len(load_results(tmp_path / "run").steps)
    single(tmp_path / "run", budget=long, resume=True)
    single(tmp_path / "whole", budget=long)
    ours, theirs = (load_results(tmp_path / n).steps for n in ("run", "whole"))
    assert before < len(ours) == len(theirs)
    assert ours["search_loss"].equals(theirs["search_loss"])


def test_what_cannot_go_on_says_why(tmp_path: Path) -> None:
    single(tmp_path / "run")
    (tmp_path / "run" / "trial-00000" / "checkpoint.pt").unlink()
    longer = Budget(outer_steps=20, retrain=False)
    with pytest.raises(UsageError, match=r"no checkpoint.pt of its last step"):
        single(tmp_path / "run", budget=longer, resume=True)
    cosine = WILD.updated({"inner_schedule": "cosine"})
    single(tmp_path / "cosine", config=cosine)
    with pytest.raises(UsageError, match="whose learning rates would have been others"):
        single(tmp_path / "cosine", config=cosine, budget=longer, resume=True)


def test_a_study_keeps_the_model_of_its_best_trial_alone(tmp_path: Path) -> None:
    result = run_study(make_tiny, SPACE, BUDGET, n_trials=4, out=tmp_path, config=CONFIG)
    kept = list(tmp_path.rglob("model.pt"))
    assert kept == [tmp_path / "best" / "model.pt"]
    state = load_checkpoint(kept[0])
    assert state["trial"] == result.study.best_trial.number
    assert state["best_value"] == result.study.best_value
    best = result.best
    assert best is not None
    json.dumps(best)  # plain values, as ever
    again = load_best(tmp_path, make_tiny, device="cpu")
    assert same_states(best.model, again.model)
    assert same_states(best.hyper, again.hyper)
    measured = again.evaluate(again.splits.search)["error"]
    assert measured == pytest.approx(result.study.best_value, abs=1e-6)


def test_an_objective_of_ones_own_study_keeps_it_too(tmp_path: Path) -> None:
    import optuna

    run = RunDirectory(tmp_path / "run")
    objective = IFTObjective(make_tiny, SPACE, BUDGET, config=CONFIG, device="cpu", run=run)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    study.optimize(objective, n_trials=3)
    assert find_best(tmp_path / "run")["trial"] == study.best_trial.number


def test_refitting_trains_afresh_with_lambda_frozen_and_is_kept(tmp_path: Path) -> None:
    single(tmp_path / "run")
    found = find_best(tmp_path / "run")
    final = refit(tmp_path / "run", make_tiny, device="cpu")
    now = final.hyper.state_dict()
    assert all(torch.equal(now[k], v) for k, v in found["hyper"].items())
    # By hand: 36 inner steps in 18 blocks of two; the best of them for the search split counts.
    problem = make_tiny(WILD, torch.device("cpu"), 0)
    problem.hyper.load_state_dict(found["hyper"])
    plain = JointOptimizer(problem, WILD)
    best, weights = math.inf, {}
    for _ in range(18):
        plain.train_weights(2)
        if (loss := plain.evaluate("search")["search_loss"]) < best:
            best, weights = loss, {k: v.clone() for k, v in problem.model.state_dict().items()}
    assert all(torch.equal(v, weights[k]) for k, v in final.model.state_dict().items())
    again = load_best(tmp_path / "run" / "refit-train", make_tiny, device="cpu")
    assert same_states(again.model, final.model)
    # A second time, what is there is loaded: no step is taken.
    recorder = Recorder()
    repeated = refit(tmp_path / "run", make_tiny, device="cpu", callbacks=[recorder])
    assert same_states(repeated.model, final.model)


def test_refitting_on_validation_examples_uses_them(tmp_path: Path) -> None:
    single(tmp_path / "run")
    both = refit(tmp_path / "run", make_tiny, "train+val", device="cpu")
    alone = refit(tmp_path / "run", make_tiny, "train", device="cpu")
    assert same_states(both.hyper, alone.hyper)
    assert not same_states(both.model, alone.model)
    kept = find_best(tmp_path / "run")
    trial = frozen_trial(kept, make_tiny, hyper=kept["hyper"], train_on_val=True, device="cpu")
    trial.setup()
    while trial.stop_reason is None:
        trial.step()
    with trial.as_found() as problem:
        assert same_states(problem.model, both.model)


@pytest.mark.parametrize(
    "weights",
    [{"val_weight": 3.0}, {"penalty_weight": 5.0}, {"val_weight": 0.5, "penalty_weight": 2.0}],
)
def test_a_refit_with_other_weights_is_another_training(
    weights: dict[str, Any], tmp_path: Path
) -> None:
    single(tmp_path / "run")
    usual = refit(tmp_path / "run", make_tiny, "train+val", device="cpu")
    other = refit(tmp_path / "run", make_tiny, "train+val", device="cpu", **weights)
    assert not same_states(usual.model, other.model)
    first = load_best(tmp_path / "run" / "refit-train+val", make_tiny, device="cpu")
    assert same_states(usual.model, first.model)  # the other lies beside it
    kept = find_best(tmp_path / "run")
    how: Any = {"hyper": kept["hyper"], "train_on_val": True, "device": "cpu", **weights}
    trial = frozen_trial(kept, make_tiny, **how)
    trial.setup()
    while trial.stop_reason is None:
        trial.step()
    with trial.as_found() as problem:
        assert same_states(problem.model, other.model)
    with pytest.raises(UsageError, match=f"{next(iter(weights))} goes with data='train.val'"):
        refit(tmp_path / "run", make_tiny, device="cpu", **weights)


def test_a_refit_of_before_whose_decays_were_not_rescaled_is_trained_anew(tmp_path: Path) -> None:
    single(tmp_path / "run")
    usual = refit(tmp_path / "run", make_tiny, "train+val", device="cpu")
    record = TrialRecord(tmp_path / "run" / "refit-train+val")
    facts = record.facts()
    record.describe({k: v for k, v in facts.items() if not k.endswith("_weight")}, over=True)
    seen: list[int] = []

    class Look(Callback):
        def on_trial_step(self, number: int, row: dict[str, Any]) -> None:
            seen.append(row["step"])

    again = refit(tmp_path / "run", make_tiny, "train+val", device="cpu", callbacks=[Look()])
    assert seen[0] == 1
    assert same_states(usual.model, again.model)


def test_an_interrupted_refit_goes_on(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_trial_step(self, number: int, row: dict[str, Any]) -> None:
            if row["step"] == 7:
                signal.raise_signal(signal.SIGINT)

    for name in ("whole", "cut"):
        single(tmp_path / name)
    whole = refit(tmp_path / "whole", make_tiny, device="cpu")
    with pytest.raises(Interrupted, match="refit again"):
        refit(tmp_path / "cut", make_tiny, device="cpu", callbacks=[Stop()])
    seen: list[int] = []

    class Look(Callback):
        def on_trial_step(self, number: int, row: dict[str, Any]) -> None:
            seen.append(row["step"])

    again = refit(tmp_path / "cut", make_tiny, device="cpu", callbacks=[Look()])
    assert seen[0] == 8
    assert same_states(again.model, whole.model)


class _Spoiled(testing.Quadratic):
    """Runs out of memory in training, or measures no numbers, where it is told to."""

    trouble: ClassVar[str] = ""

    def train_loss(self, batch: Any) -> torch.Tensor:
        if _Spoiled.trouble == "oom":
            raise MemoryError("no room")
        return super().train_loss(batch)

    def evaluate(self, batches: Any) -> dict[str, float]:
        found = dict(super().evaluate(batches))
        return dict.fromkeys(found, math.nan) if _Spoiled.trouble == "nonfinite" else found


def _spoiled(config: MetaConfig, device: torch.device, seed: int) -> _Spoiled:
    return _Spoiled(seed=seed)


def test_a_refit_that_fails_gives_no_model_of_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_single(_spoiled, Budget(outer_steps=3), out=tmp_path, device="cpu")
    refit(tmp_path, _spoiled, device="cpu")
    run_single(_spoiled, Budget(outer_steps=12), out=tmp_path, device="cpu", resume=True)
    monkeypatch.setattr(_Spoiled, "trouble", "nonfinite")
    for _ in range(2):
        with pytest.raises(ift_tune.IFTTuneError, match=r"ended nonfinite: see .*; delete"):
            refit(tmp_path, _spoiled, device="cpu")
        monkeypatch.setattr(_Spoiled, "trouble", "")  # asking again trains nothing
    assert not (tmp_path / "refit-train" / "model.pt").exists()


def test_where_memory_ran_out_one_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    single(whole, _spoiled, budget=Budget(outer_steps=6))
    single(out, _spoiled, budget=Budget(outer_steps=3))
    monkeypatch.setattr(_Spoiled, "trouble", "oom")
    ended = single(out, _spoiled, budget=Budget(outer_steps=6), resume=True)
    assert ended.stop_reason is StopReason.OOM
    with pytest.raises(ift_tune.IFTTuneError, match=r"ended oom: see .*; make room and refit"):
        refit(whole, _spoiled, device="cpu")
    monkeypatch.setattr(_Spoiled, "trouble", "")
    single(out, _spoiled, budget=Budget(outer_steps=6), resume=True)
    assert_same_course(whole, out)
    refit(whole, _spoiled, device="cpu")


def test_a_plain_training_stands_beside_a_run(tmp_path: Path) -> None:
    outcome = single(tmp_path / "run", baseline=True)
    trials = load_results(tmp_path / "run").trials
    kept = find_best(tmp_path / "run")
    plain = frozen_trial(kept, make_tiny, hyper=None, train_on_val=False, device="cpu")
    plain.setup()
    while plain.stop_reason is None:
        plain.step()
    for column in ("search_loss", "test_error"):
        assert trials[f"baseline_{column}"].iloc[0] == plain.totals()[column]
        assert outcome.metrics[f"baseline_{column}"] == plain.totals()[column]
    problem = make_tiny(WILD, torch.device("cpu"), 0)
    beside = load_best(tmp_path / "run" / "baseline", make_tiny, device="cpu")
    assert_same_tensors(list(beside.hyper.parameters()), list(problem.hyper.parameters()))
    single(tmp_path / "without")
    assert "baseline_test_error" not in load_results(tmp_path / "without").trials


def test_a_study_has_a_plain_training_beside_it(tmp_path: Path) -> None:
    study = functools.partial(run_study, make_tiny, SPACE, BUDGET, out=tmp_path, config=CONFIG)
    result = study(n_trials=2, baseline=True)
    assert result.trials["baseline_search_error"].nunique() == 1
    before = (tmp_path / "baseline" / "steps.csv").read_bytes()
    longer = study(n_trials=3, baseline=True, resume=True)
    assert len(longer.trials) == 3
    same_best = result.study.best_trial.number == 2
    assert same_best or (tmp_path / "baseline" / "steps.csv").read_bytes() == before


def test_what_is_missing_or_does_not_fit_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="keeps no trained model"):
        load_best(tmp_path, make_tiny)
    with pytest.raises(UsageError, match="keeps no trained model"):
        refit(tmp_path, make_tiny)
    single(tmp_path / "run")
    with pytest.raises(UsageError, match="does not fit the one that the factory makes"):
        load_best(tmp_path / "run", make_quadratic, device="cpu")
    with pytest.raises(UsageError, match=r"data must be 'train' or 'train\+val'"):
        refit(tmp_path / "run", make_tiny, "val")
    assert not (tmp_path / "run" / "refit-val").exists()
    assert ift_tune.load_best is load_best


def test_the_best_model_is_an_artifact_of_the_study(tmp_path: Path) -> None:
    study = functools.partial(run_study, make_tiny, SPACE, BUDGET, out=tmp_path, config=CONFIG)
    result = study(n_trials=2)
    noted = result.study.user_attrs["best_model"]
    assert noted["trial"] == result.study.best_trial.number
    artifacts = get_all_artifact_meta(study_or_trial=result.study)
    assert [each.artifact_id for each in artifacts] == [noted["artifact"]]
    store = FileSystemArtifactStore(tmp_path / "artifacts")
    with store.open_reader(noted["artifact"]) as file:
        assert file.read() == (tmp_path / "best" / "model.pt").read_bytes()
    again = study(n_trials=2, resume=True)  # nothing new: uploaded once
    assert len(get_all_artifact_meta(study_or_trial=again.study)) == 1


def test_the_last_step_is_loaded_where_it_is_asked_for(tmp_path: Path) -> None:
    recorder = Recorder()
    single(tmp_path / "run", callbacks=[recorder])
    last = load_best(tmp_path / "run", make_tiny, device="cpu", at="last")
    for name in ("model", "hyper"):
        then, now = recorder.states[-1][name], getattr(last, name).state_dict()
        assert all(torch.equal(now[key], then[key]) for key in then)
    best = load_best(tmp_path / "run", make_tiny, device="cpu")
    assert not same_states(best.hyper, last.hyper)
    run_study(make_tiny, SPACE, BUDGET, n_trials=1, out=tmp_path / "study", config=CONFIG)
    with pytest.raises(UsageError, match="a search keeps the best of its trials alone"):
        load_best(tmp_path / "study", make_tiny, device="cpu", at="last")
    with pytest.raises(UsageError, match="at must be 'best' or 'last'"):
        load_best(tmp_path / "run", make_tiny, at="first")  # type: ignore[arg-type]
