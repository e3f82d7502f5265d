"""The examples run as they are, at a small size, and print what they promise."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from ift_tune import load_results

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_example(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str
) -> str:
    monkeypatch.setattr(sys, "argv", [name, *options])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_bare_hypergradient(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "validation loss" in run_example("bare_hypergradient.py", monkeypatch, capsys)


def test_own_model_under_optuna(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--n-trials", "2", "--outer-steps", "2")
    text = run_example("own_model_optuna.py", monkeypatch, capsys, *options)
    assert "best: trial" in text


@pytest.mark.nightly
def test_own_model_under_ray(tmp_path: Path) -> None:
    """In a process of its own, for Ray is started once a process."""
    options = ("--n-trials", "1", "--outer-steps", "2", "--out", str(tmp_path))
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "own_model_ray.py"), *options],
        env=os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "best: {" in done.stdout


@pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed"
)
def test_resnet_under_optuna(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--embedded", "--device", "cpu", "--n-trials", "1", "--outer-steps", "1")
    text = run_example("cifar10_weight_decay_optuna.py", monkeypatch, capsys, *options)
    assert "best: trial 0" in text


@pytest.mark.nightly
def test_seed_experiment(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    data_root: Path,
) -> None:
    options = ("--outer-steps", "2", "--out", str(tmp_path), "--data-root", os.fspath(data_root))
    text = run_example("seed_experiment.py", monkeypatch, capsys, *options)
    assert "test error" in text
    assert (tmp_path / "error.png").stat().st_size > 10_000


def test_callback_logger_without_tensorboard(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    out = tmp_path / "run"
    options = ("--n-trials", "2", "--outer-steps", "2", "--out", str(out))
    text = run_example("callback_logger.py", monkeypatch, capsys, *options)
    assert "logged: 4 outer steps of 2 trials" in text
    steps = load_results(out).steps
    for row in steps.to_dict("records"):
        log = out / f"logs/trial-{row['trial']:05}/scalars.csv"
        logged = pd.read_csv(log, names=["step", "name", "value"])
        values = logged[logged["step"] == row["step"]].set_index("name")["value"]
        for name in ("search_error", "gradient_equivalents", "median_decay"):
            assert values[name] == row[name]


def test_callback_logger_with_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    example = runpy.run_path(str(EXAMPLES / "callback_logger.py"))
    writer = example["open_writer"](str(tmp_path))
    writer.add_scalar("search_error", 0.5, 1)
    writer.close()
    (log,) = tmp_path.glob("events.out.tfevents.*")
    assert b"search_error" in log.read_bytes()


def test_auc_of_breast_cancer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ("--trials", "2", "--outer-steps", "3", "--out", str(tmp_path))
    text = run_example("breast_cancer_auc.py", monkeypatch, capsys, *options)
    assert "'auc'" in text
    assert len(re.findall(r"^[a-z ]+ \d\.\d+e-\d\d$", text, flags=re.MULTILINE)) == 30
    assert load_results(tmp_path).trials["user.width"].notna().all()
    assert (tmp_path / "refit-train+val" / "model.pt").exists()


def test_class_weights_of_a_transformer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ("--outer-steps", "4", "--out", str(tmp_path))
    text = run_example("transformer_class_weights.py", monkeypatch, capsys, *options)
    assert "class weights: class_0" in text
    assert set(load_results(tmp_path).trials["precision"]) == {"bfloat16"}


@pytest.mark.nightly
def test_noisy_labels_by_a_loader_with_workers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ("--outer-steps", "2", "--out", str(tmp_path))
    text = run_example("noisy_labels_loader.py", monkeypatch, capsys, *options)
    at_60 = re.search(r"precision at 60: ([\d.]+)", text)
    assert at_60 is not None
    assert float(at_60[1]) > 0.6  # of labels taken at random, .3


def test_error_against_cost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ("--trials", "3", "--outer-steps", "2", "--out", str(tmp_path))
    text = run_example("pareto_cost.py", monkeypatch, capsys, *options)
    assert "search_error" in text
    assert load_results(tmp_path).trials["pareto"].any()


@pytest.mark.nightly
def test_one_objective_under_optuna_and_ray(tmp_path: Path) -> None:
    """In a process of its own, for Ray is started once a process."""
    options = ("--trials", "1", "--outer-steps", "1", "--out", str(tmp_path))
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "optuna_and_ray.py"), *options],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name in ("GridSampler 1 {", "NSGAIISampler 1 {", "ASHA {"):
        assert name in done.stdout


def test_a_plain_training_takes_what_an_audit_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = run_example("clean_and_train.py", monkeypatch, capsys, "--out", str(tmp_path / "run"))
    found = re.search(r"of the 100 most suspect labels (\d+) are wrong", text)
    assert found is not None
    assert int(found[1]) >= 95
    plain, cleaned = (float(number) for number in re.findall(r": (0\.\d+)$", text, re.MULTILINE))
    assert cleaned < plain - 0.02


def test_lora_with_learned_scales(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """With one block and a few windows."""
    main = runpy.run_path(str(EXAMPLES / "lora_adapter_scale.py"))["main"]
    main.__globals__["SIZES"].update(train=60, val=60, search=60, test=60)
    main.__globals__["LAYERS"] = 1
    options = ("--embedded", "--pretraining", "3", "--outer-steps", "1", "--threshold", "0.1")
    monkeypatch.setattr(sys, "argv", ["name", *options, "--out", str(tmp_path / "run")])
    main()
    text = capsys.readouterr().out
    assert re.search(r"test loss \d\.\d+ before tuning, \d\.\d+ after", text)
    assert text.count(": scale ") == 4
    assert "'blocks.0.down': " in text
