"""Backends: refused when they are built, and who gets which GPU and how many threads."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from ift_tune import UsageError
from ift_tune.search.backends import (
    Allocation,
    Processes,
    RayTune,
    allocate,
    cores,
    describe,
    processes_of,
    visible_gpus,
)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards, whatever the test does
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("workers", "cores", "threads"), [(1, 8, 8), (2, 8, 4), (3, 8, 2), (8, 8, 1), (9, 8, 1)]
)
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_without_gpus_the_cores_are_divided(
    device: str, workers: int, cores: int, threads: int
) -> None:
    assert allocate(workers, device, None, [], cores) == [Allocation(threads)] * workers


@pytest.mark.parametrize("gpus", [[], ["0", "1"]])
def test_a_number_of_threads_that_the_user_chose_is_kept(
    gpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert [allocation.threads for allocation in allocate(2, "auto", None, gpus, 16)] == [3, 3]


@pytest.mark.parametrize("text", ["", "many", "-1", "4,2"])
def test_a_variable_that_is_no_number_of_threads_is_passed_over(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert [allocation.threads for allocation in allocate(2, "cpu", None, [], 16)] == [8, 8]


@pytest.mark.parametrize(
    ("workers", "gpus", "expected"),
    [
        (1, ["0"], [("0", 1.0)]),
        (2, ["0", "1"], [("0", 1.0), ("1", 1.0)]),
        (2, ["0", "1", "2"], [("0", 1.0), ("1", 1.0)]),
        (2, ["0"], [("0", 0.5), ("0", 0.5)]),
        (4, ["5", "7"], [("5", 0.5), ("7", 0.5), ("5", 0.5), ("7", 0.5)]),
        (3, ["0", "1"], [("0", 0.5), ("1", 0.5), ("0", 0.5)]),
        (3, ["0"], [("0", 1 / 3)] * 3),
        (7, ["0"], [("0", 1 / 7)] * 7),
    ],
)
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_the_gpus_are_divided_in_turn(
    device: str, workers: int, gpus: list[str], expected: list[tuple[str, float]]
) -> None:
    allocations = allocate(workers, device, None, gpus, 16)
    assert [(allocation.gpu, allocation.memory) for allocation in allocations] == expected
    assert {allocation.threads for allocation in allocations} == {16 // workers}


@pytest.mark.parametrize(
    ("workers", "part", "expected"),
    [
        (2, 0.5, [("0", 0.5), ("1", 0.5)]),
        (4, 0.5, [("0", 0.5), ("1", 0.5), ("0", 0.5), ("1", 0.5)]),
        (2, 1, [("0", 1.0), ("1", 1.0)]),
        (6, 1 / 3, [("0", 1 / 3), ("1", 1 / 3)] * 3),
        (20, 0.1, [("0", 0.1), ("1", 0.1)] * 10),
        (2, 0.6, [("0", 0.6), ("1", 0.6)]),
    ],
)
def test_a_part_of_a_gpu_can_be_asked_for(
    workers: int, part: float, expected: list[tuple[str, float]]
) -> None:
    allocations = allocate(workers, "auto", part, ["0", "1"], 16)
    assert [(allocation.gpu, allocation.memory) for allocation in allocations] == expected


def test_gpus_can_be_left_alone() -> None:
    expected = [Allocation(8)] * 2
    assert allocate(2, "cpu", None, ["0", "1"], 16) == expected
    assert allocate(2, "cpu", 0, ["0", "1"], 16) == expected
    assert allocate(2, "auto", 0.0, ["0", "1"], 16) == expected


@pytest.mark.parametrize(
    ("workers", "device", "part", "gpus", "message"),
    [
        (5, "auto", 0.5, 2, "5 workers at 0.5 GPUs each do not fit: 2 GPUs.*hold 4"),
        (3, "auto", 1, 2, "3 workers at 1 GPUs each do not fit"),
        (3, "cuda", 0.6, 2, "do not fit"),
        (2, "cuda", None, 0, "0 GPUs are visible"),
        (2, "cuda", 0.5, 0, "0 GPUs are visible"),
        (2, "auto", 0.5, 0, "0 GPUs are visible"),
        (2, "cpu", 0.5, 2, "--device cpu with GPUs per trial"),
        (2, "auto", 2, 2, "1 processes take gpus_per_trial=1, or 0 for the CPU, got 2"),
        (2, "auto", -0.5, 2, "a number of at least 0, got -0.5"),
        (2, "auto", float("nan"), 2, "a number of at least 0, got nan"),
        (2, "cuda:1", None, 2, "cuda:1 cannot be kept.*CUDA_VISIBLE_DEVICES"),
        (2, "mps", None, 0, "mps cannot be kept"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    workers: int, device: str, part: float | None, gpus: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        allocate(workers, device, part, [str(index) for index in range(gpus)], 16)


def test_each_process_of_a_trial_has_a_gpu_of_its_own() -> None:
    gpus = ["3", "5", "7", "9"]
    found = allocate(2, "auto", None, gpus, 16, processes=2)
    assert found == [Allocation(4, "3,5"), Allocation(4, "7,9")]
    assert found == allocate(2, "cuda", 2, gpus, 16, processes=2)
    assert "several GPUs: 3,5 and 7,9" in describe(found)
    assert allocate(2, "cpu", None, gpus, 16, processes=4) == [Allocation(2)] * 2
    assert allocate(1, "auto", None, [], 16, processes=2) == [Allocation(8)]
    with pytest.raises(UsageError, match="3 workers at 2 GPUs each do not fit: 4 GPUs"):
        allocate(3, "auto", None, gpus, 16, processes=2)
    with pytest.raises(UsageError, match=r"2 processes take gpus_per_trial=2, or 0.*got 0\.5"):
        allocate(2, "auto", 0.5, gpus, 16, processes=2)


def test_gpus_say_how_many_processes_share_a_trial() -> None:
    given = [(None, None), (None, 0.5), (None, 3), (2, None), (2, 0), (2, 2)]
    assert [processes_of(*pair) for pair in given] == [1, 1, 3, 2, 2, 2]
    with pytest.raises(UsageError, match="processes_per_trial=2 and gpus_per_trial=3"):
        processes_of(2, 3)
    with pytest.raises(UsageError, match="processes_per_trial must be an integer of at least 1"):
        processes_of(0, None)


@pytest.mark.parametrize(
    ("named", "count", "expected"),
    [
        (None, 0, []),
        (None, 2, ["0", "1"]),
        ("3,5", 2, ["3", "5"]),
        (" 3 , 5 ", 2, ["3", "5"]),
        ("GPU-1a2b,MIG-3c4d", 2, ["GPU-1a2b", "MIG-3c4d"]),
        ("1,9,0", 1, ["1"]),  # CUDA stops at the first that does not exist
        ("", 0, []),
        ("-1", 0, []),
        ("7", 0, []),
    ],
)
def test_visible_gpus_are_named_as_the_variable_names_them(
    named: str | None, count: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert visible_gpus() == expected


def test_a_share_is_told_to_its_process_by_variables() -> None:
    assert Allocation(2).environment() == {"OMP_NUM_THREADS": "2"}
    told = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "GPU-1a2b"}
    assert Allocation(1, "GPU-1a2b", 0.5).environment() == told


@pytest.mark.parametrize(
    ("allocation", "device", "limits"),
    [
        (Allocation(3), "cpu", []),
        (Allocation(3, "5", 1.0), "cuda:0", []),
        (Allocation(3, "5", 0.5), "cuda:0", [(0.5, 0)]),
    ],
)
def test_a_share_limits_the_process_that_applies_it(
    allocation: Allocation,
    device: str,
    limits: list[tuple[float, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads: list[int] = []
    memory: list[tuple[float, int]] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda *limit: memory.append(limit)
    )
    assert allocation.apply() == device  # the only GPU it sees is its first
    assert (threads, memory) == ([3], limits)
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == allocation.gpu


def test_the_cores_are_those_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {2, 5, 7}, raising=False)
    assert cores() == 3
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    assert cores() == 6


@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (Processes, {"workers": 0}, "workers must be an integer of at least 1, got 0"),
        (Processes, {"workers": 1.5}, "workers must be an integer"),
        (Processes, {"gpus_per_trial": 1.5}, "a GPU, or whole ones, got 1.5 GPUs per trial"),
        (Processes, {"gpus_per_trial": -0.5}, "a number of at least 0, got -0.5"),
        (RayTune, {"gpus_per_trial": 1.5}, "at most one GPU, got 1.5 GPUs per trial"),
        (RayTune, {"gpus_per_trial": 2}, "Ray runs each trial in one process.*got 2"),
        (RayTune, {"cpus_per_trial": 0.0}, "needs a CPU or a GPU"),
        (RayTune, {"cpus_per_trial": -1.0}, "needs a CPU or a GPU"),
        (RayTune, {"scheduler": "ashes"}, "unknown scheduler 'ashes'; did you mean 'asha'"),
    ],
)
def test_a_backend_is_refused_when_it_is_built(
    make: type[Any], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        make(**fields)


def test_one_process_without_a_part_of_a_gpu_is_this_one() -> None:
    assert Processes().allocations("cpu") == []
    assert len(Processes(gpus_per_trial=0.0).allocations("cpu")) == 1
    assert len(Processes(2).allocations("cpu")) == 2


@pytest.mark.parametrize(
    ("device", "gpus", "message"),
    [("cpu", 0.5, "drop one of them"), ("cuda:0", 0.0, "needs a GPU for each trial")],
)
def test_a_device_that_ray_cannot_give_is_refused(device: str, gpus: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RayTune(gpus_per_trial=gpus).check(device)
