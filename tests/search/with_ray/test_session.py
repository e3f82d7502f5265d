"""What a trial may use of what Ray has allotted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ift_tune import UsageError
from ift_tune.search.ray import session
from ift_tune.search.ray.cluster import concurrency
from ift_tune.search.ray.session import allotted_device


class FakeRay:
    """Ray inside a trial with so many GPUs, or not in Ray at all."""

    def __init__(self, gpus: float | None) -> None:
        self._gpus = gpus

    def is_initialized(self) -> bool:
        return self._gpus is not None

    def get_runtime_context(self) -> FakeRay:
        return self

    def get_accelerator_ids(self) -> dict[str, list[str]]:
        return {"GPU": ["1"] if self._gpus else [], "TPU": []}

    def get_assigned_resources(self) -> dict[str, float]:
        return {"CPU": 1.0} | ({"GPU": self._gpus} if self._gpus else {})


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that pretends; it returns the list of memory limits that were set."""

    def pretend(gpus: float | None, *, cuda: bool, plugged_in: bool) -> list[tuple[float, int]]:
        limits: list[tuple[float, int]] = []
        monkeypatch.setattr(session, "ray", FakeRay(gpus))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(session, "gpu_is_plugged_in", lambda: plugged_in)
        monkeypatch.setattr(
            torch.cuda,
            "set_per_process_memory_fraction",
            lambda part, device: limits.append((part, device)),
        )
        return limits

    return pretend


@pytest.mark.parametrize("wanted", ["auto", "cpu", "cuda:1"])
def test_outside_ray_the_device_is_what_was_asked_for(wanted: str, machine: Any) -> None:
    machine(None, cuda=True, plugged_in=True)
    assert allotted_device(wanted) == wanted


def test_a_trial_without_a_gpu_runs_on_the_cpu_though_it_sees_gpus(machine: Any) -> None:
    machine(0.0, cuda=True, plugged_in=True)
    assert allotted_device("auto") == allotted_device("cpu") == "cpu"


@pytest.mark.parametrize("wanted", ["cuda", "cuda:0"])
def test_a_gpu_that_was_not_allotted_is_not_taken(wanted: str, machine: Any) -> None:
    machine(0.0, cuda=True, plugged_in=True)
    with pytest.raises(UsageError, match=r"was allotted no GPU.*--gpus-per-trial 1"):
        allotted_device(wanted)


@pytest.mark.parametrize("wanted", ["auto", "cuda", "cuda:0"])
def test_an_allotted_gpu_is_the_first_the_process_sees(wanted: str, machine: Any) -> None:
    limits = machine(1.0, cuda=True, plugged_in=True)
    assert allotted_device(wanted) == "cuda:0"
    assert limits == []


def test_a_part_of_a_gpu_is_a_part_of_its_memory(machine: Any) -> None:
    limits = machine(0.25, cuda=True, plugged_in=True)
    assert allotted_device("auto") == "cuda:0"
    assert limits == [(0.25, 0)]


def test_the_cpu_is_used_where_it_is_asked_for(machine: Any) -> None:
    limits = machine(0.5, cuda=True, plugged_in=True)
    assert allotted_device("cpu") == "cpu"
    assert limits == []


def test_a_gpu_that_pytorch_cannot_use_is_no_reason_for_the_cpu(machine: Any) -> None:
    machine(1.0, cuda=False, plugged_in=True)
    with pytest.raises(UsageError, match="PyTorch here cannot use it"):
        allotted_device("auto")


def test_gpus_on_paper_are_the_cpu_with_a_warning(machine: Any) -> None:
    machine(1.0, cuda=False, plugged_in=False)
    with pytest.warns(UserWarning, match="Ray counts GPUs here, but there is none"):
        assert allotted_device("auto") == "cpu"
    with pytest.raises(UsageError, match="PyTorch here cannot use it"):
        allotted_device("cuda")


# How many trials a cluster runs at a time

NODES = st.lists(
    st.fixed_dictionaries({"CPU": st.integers(0, 64), "GPU": st.integers(0, 8)}),
    min_size=1,
    max_size=4,
)
CPUS = st.one_of(st.integers(0, 8).map(float), st.sampled_from([0.1, 0.25, 0.5, 1 / 3, 1.5]))
GPUS = st.one_of(st.sampled_from([0.0, 0.1, 0.2, 0.25, 1 / 3, 0.5, 0.7, 1.0]), st.floats(0.01, 1.0))


def said(nodes: list[dict[str, float]], cpus: float, gpus: float) -> int:
    return int(concurrency(nodes, cpus, gpus).rpartition(": ")[2].removesuffix(" at a time"))


def most(node: dict[str, float], cpus: float, gpus: float) -> int:
    """Put trials on a node one by one, each wholly on one of its GPUs."""
    free, parts = float(node["CPU"]), [1.0] * int(node["GPU"])
    count = 0
    while free >= cpus - 1e-6:
        if gpus:
            roomy = [i for i, part in enumerate(parts) if part >= gpus - 1e-6]
            if not roomy:
                break
            parts[roomy[0]] -= gpus
        free -= cpus
        count += 1
    return count


@given(NODES, CPUS, GPUS)
def test_what_runs_at_a_time_is_what_fits_on_the_nodes(
    nodes: list[dict[str, float]], cpus: float, gpus: float
) -> None:
    if cpus + gpus == 0:
        return
    expected = sum(most(node, cpus, gpus) for node in nodes)
    if not expected:
        with pytest.raises(UsageError, match="no node has them"):
            concurrency(nodes, cpus, gpus)
        return
    assert said(nodes, cpus, gpus) == expected
    assert all(most(n, cpus, gpus) * cpus <= n["CPU"] + 1e-6 for n in nodes)
    assert all(most(n, cpus, gpus) * gpus <= n["GPU"] + 1e-6 for n in nodes)


def test_the_sentence() -> None:
    nodes = [{"CPU": 8.0, "GPU": 2.0, "memory": 1e9}, {"CPU": 4.0}]
    assert concurrency(nodes, 1, 0.5) == (
        "2 nodes with 12 CPUs and 2 GPUs; a trial takes 1 CPUs and 0.5 GPUs: 4 at a time"
    )
    assert concurrency(nodes[1:], 2, 0).startswith("1 node with 4 CPUs")


@pytest.mark.parametrize(
    ("cpus", "gpus", "message"),
    [
        (1.0, 1.5, "at most one GPU, got 1.5 GPUs per trial"),
        (0.0, 0.0, "needs a CPU or a GPU"),
        (-1.0, 0.0, "needs a CPU or a GPU"),
        (1.0, -0.5, "at most one GPU, got -0.5"),
        (9.0, 0.0, "no node has them .8 CPUs and 0 GPUs; 8 CPUs and 1 GPUs.: lower"),
        (8.0, 1.0, None),
    ],
)
def test_a_need_that_cannot_be_met_is_refused(cpus: float, gpus: float, message: str) -> None:
    nodes = [{"CPU": 8.0}, {"CPU": 8.0, "GPU": 1.0}]
    if message is None:
        assert said(nodes, cpus, gpus) == 1
        return
    with pytest.raises(UsageError, match=message):
        concurrency(nodes, cpus, gpus)


def test_trials_do_not_spread_over_nodes() -> None:
    with pytest.raises(UsageError, match="no node has them"):
        concurrency([{"CPU": 3.0}, {"CPU": 3.0}], 4, 0)
    with pytest.raises(UsageError, match="no node has them"):
        concurrency([{"CPU": 8.0}, {"CPU": 0.0, "GPU": 2.0}], 1, 1)
