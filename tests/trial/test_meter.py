"""The clock of a trial: it runs while the trial computes, and takes what others computed for it."""

from __future__ import annotations

import time

import pytest
import torch

from ift_tune.trial.meter import Meter

CPU = torch.device("cpu")


def test_the_clock_runs_inside_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    meter = Meter(CPU)
    with meter.running():
        now[0] += 2.0
        assert meter.seconds == 2.0
    now[0] += 5.0
    assert meter.seconds == 2.0
    meter.charge(0.5)

    def broken() -> None:
        now[0] += 1.0
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"), meter.running():
        broken()
    assert meter.seconds == 3.5
    meter.resume(100.0)
    with meter.running():
        now[0] += 1.0
    assert meter.seconds == 101.0


def test_the_cpu_tells_no_peak() -> None:
    assert Meter(CPU).peak(None) is None
    assert Meter(CPU).peak(7) is None
