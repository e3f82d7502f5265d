"""Dashboards get what docs/dashboards.md says, from its own code, with the real libraries."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from command_line import Call

import ift_tune
from ift_tune import Callback, MetaConfig, UsageError
from ift_tune.base.status import Outcome, StopReason
from ift_tune.report import upload_artifacts

PAGE = Path(__file__).parent.parent / "docs/dashboards.md"
SETUP, OPTUNA, TENSORBOARD, MLFLOW, WANDB = re.findall(
    r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL
)
SHORTER = {"outer_steps=20": "outer_steps=3", "n_trials=4": "n_trials=2"}


def executed(block: str) -> dict[str, Any]:
    """Run a block of the page after its first one, with short trials, and return its names."""
    whole = f"{SETUP}\n{block}"
    for text, short in SHORTER.items():
        assert text in whole
        whole = whole.replace(text, short)
    scope: dict[str, Any] = {}
    exec(whole, scope)
    return scope


def only_the_class(block: str) -> dict[str, Any]:
    """Run a block up to the search."""
    scope: dict[str, Any] = {}
    exec(SETUP + re.split(r"\n(?=\w+ = |ift_tune\.run)", block)[0], scope)
    return scope


def one_trial(callback: Callback) -> None:
    callback.on_trial_begin(3, MetaConfig(meta_lr=0.5), 0)
    callback.on_trial_step(3, {"step": 7, "search_error": 0.25, "solve_status": "truncated"})
    callback.on_trial_end(3, Outcome(StopReason.DONE, 0.25, "search_error", {}))


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Return the numbers in TensorBoard's event files, by name and step."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, dict[int, float]] = defaultdict(dict)
    for file in folder.glob("events.out.tfevents.*"):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += length + 16  # the length, the record, and a checksum after each
            for value in event.summary.value:
                tensor = value.tensor.float_val
                found[value.tag][event.step] = tensor[0] if tensor else value.simple_value
    return found


def test_tensorboard_has_every_number_of_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    writers = pytest.importorskip("tensorboardX", reason="tensorboardX comes with Ray")
    if importlib.util.find_spec("tensorboard") is None:  # else PyTorch's own, as on the page
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", writers)
    executed(TENSORBOARD)
    steps = ift_tune.load_results("runs/tensorboard").steps
    assert len(steps) == 6
    for row in steps.to_dict("records"):
        logged = scalars(Path(f"runs/tensorboard/logs/trial-{row['trial']}"))
        for name in ("search_error", "val_loss", "gradient_equivalents", "hypergradient_norm"):
            assert logged[name][row["step"]] == pytest.approx(row[name], rel=1e-6)


class Recorder:
    """Stands in for MLflow's client and for a run of W&B: notes what it is called with."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.calls: list[tuple[Any, ...]] = [("init", *arguments, *options.items())]
        self.summary: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self.calls.append((name, *arguments, *options.values()))
            return SimpleNamespace(info=SimpleNamespace(run_id="a-run"))

        return call


def test_mlflow_is_told_settings_numbers_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=Recorder))
    logger = only_the_class(MLFLOW)["MLflow"]("of-mine")
    one_trial(logger)
    calls = logger.client.calls
    assert ("create_run", "of-mine") in calls
    assert ("log_param", "a-run", "meta_lr", 0.5) in calls
    assert ("log_metric", "a-run", "search_error", 0.25, 7) in calls
    assert calls[-1] == ("set_terminated", "a-run", "FINISHED")


@pytest.mark.filterwarnings("ignore")
def test_mlflow_itself_keeps_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    executed(MLFLOW)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("digits").experiment_id
    trials, steps = ift_tune.load_results("runs/mlflow")
    runs = {float(run.data.params["meta_lr"]): run for run in client.search_runs([experiment])}
    assert sorted(runs) == sorted(trials["meta_lr"])
    for row in trials.to_dict("records"):
        run = runs[row["meta_lr"]]
        history = client.get_metric_history(run.info.run_id, "search_error")
        mine = steps[steps["trial"] == row["trial"]]
        assert [metric.value for metric in history] == list(mine["search_error"])
        assert run.info.status == "FINISHED"


def test_wandb_has_a_run_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Recorder] = []

    def init(**options: Any) -> Recorder:
        runs.append(Recorder(**options))
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    executed(WANDB)
    trials, steps = ift_tune.load_results("runs/wandb")
    assert len(runs) == 2
    for row, run in zip(trials.to_dict("records"), runs, strict=True):
        begun = dict(run.calls[0][1:])
        assert begun["project"] == "digits"
        assert (begun["name"], begun["group"]) == (f"trial-{row['trial']}", "wandb")
        assert begun["config"]["meta_lr"] == row["meta_lr"]
        logged = [call for call in run.calls if call[0] == "log"]
        mine = steps[steps["trial"] == row["trial"]]
        assert [call[2] for call in logged] == list(mine["step"])
        assert [call[1]["search_error"] for call in logged] == list(mine["search_error"])
        assert run.summary == {"stop_reason": "done"}
        assert run.calls[-1] == ("finish",)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def get(url: str) -> bytes:
    """Return what a server on this machine answers; it may just be starting."""
    deadline = time.monotonic() + 60.0
    while True:
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return bytes(answer.read())
        except OSError:  # URLError is one
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


@pytest.mark.nightly
def test_optuna_dashboard_shows_the_study_and_its_artifacts(tmp_path: Path) -> None:
    pytest.importorskip("optuna_dashboard", reason="optuna-dashboard is not installed")
    result = executed(OPTUNA)["result"]
    command = re.search(r"^optuna-dashboard runs.*$", PAGE.read_text(), flags=re.MULTILINE)
    assert command is not None
    port, (program, *arguments) = free_port(), shlex.split(command[0])
    server = subprocess.Popen(
        [Path(sys.executable).parent / program, *arguments, "--port", str(port), "--quiet"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        home = f"http://127.0.0.1:{port}"
        (summary,) = json.loads(get(f"{home}/api/studies"))["study_summaries"]
        assert summary["study_name"] == result.study.study_name
        study = json.loads(get(f"{home}/api/studies/{summary['study_id']}"))
        assert study["objective_names"] == ["search_error"]
        values = {trial["number"]: float(trial["values"][0]) for trial in study["trials"]}
        assert values == {trial.number: trial.value for trial in result.study.trials}
        artifacts = {each["filename"]: each["artifact_id"] for each in study["artifacts"]}
        pictures = [name for name in artifacts if "decays-by-layer" in name]
        assert {"model.pt", "curves.png"} <= set(artifacts)
        assert pictures
        for name in ("curves.png", pictures[0]):
            served = get(f"{home}/artifacts/{summary['study_id']}/{artifacts[name]}")
            (file,) = (tmp_path / "runs/dashboard").rglob(name)
            assert served == file.read_bytes()
    finally:
        server.terminate()
        server.wait(timeout=30)


def uploaded(study: Any) -> list[str]:
    """Return the names of a study's artifacts."""
    from optuna.artifacts import get_all_artifact_meta

    return sorted(meta.filename for meta in get_all_artifact_meta(study))


@pytest.mark.nightly
def test_artifacts_are_uploaded_once_and_those_of_the_front_alone(call: Call) -> None:
    task = ift_tune.tasks.get("digits-weight-decay")
    result = ift_tune.run_study(
        task.make_problem,
        ift_tune.MetaSpace({"inner_steps": ift_tune.Int(1, 12)}),
        ift_tune.Budget(outer_steps=2, retrain=False),
        config=task.default_config,
        n_trials=2,
        metric=["search_error", "hvps"],  # of which both trials have as many
        enqueue=[{"inner_steps": 1}, {"inner_steps": 12}],
        out="runs/front",
    )
    names = [path.name for path in upload_artifacts("runs/front")]
    assert {"curves.png", "front.png"} <= set(names)
    assert sorted([*names, "model.pt"]) == uploaded(result.study)
    assert {name[:11] for name in names if name.startswith("trial-")} == {"trial-00001"}
    audit = Path("runs/front/audit/audit.html")
    audit.parent.mkdir()
    audit.write_text("<p>what an audit says</p>")
    text = call("report", "runs/front", "--artifacts").out
    assert "uploaded to the study: 1 files" in text
    assert "audit.html" in uploaded(result.study)


def test_what_has_no_study_of_its_own_is_refused(call: Call, tmp_path: Path) -> None:
    task = ift_tune.tasks.get("digits-weight-decay")
    ift_tune.run_single(
        task.make_problem,
        ift_tune.Budget(outer_steps=1, retrain=False),
        out="runs/single",
        config=task.default_config,
    )
    with pytest.raises(UsageError, match=r"a search keeps its study in study\.journal.*got runs"):
        upload_artifacts("runs/single")
    row = {"arm": "ift", "seed": 0, "trial": 0, "step": 1, "status": "complete"}
    for name in ("trials", "steps"):
        table = pd.DataFrame([row])
        table.attrs["run"] = {"task": "toy", "backend": "compare"}
        table.to_parquet(tmp_path / f"{name}.parquet")
    done = call("report", str(tmp_path), "--artifacts")
    assert done.status == 2
    assert "a comparison has a study for each of its searches" in done.err


def test_a_ray_that_is_started_here_has_no_dashboard(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    from ift_tune.search.ray.cluster import connected

    asked: list[dict[str, Any]] = []

    def init(**options: Any) -> None:
        asked.append(options)
        raise ConnectionError("not started here")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # whatever other tests have left
    monkeypatch.setattr(ray, "init", init)
    for address in (None, "127.0.0.1:1"):
        with pytest.raises(UsageError, match="no Ray cluster"), connected(address):
            pass
    assert asked[0]["include_dashboard"] is False
    assert "include_dashboard" not in asked[1]  # that of others is theirs
