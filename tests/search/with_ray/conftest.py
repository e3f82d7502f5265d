"""One Ray for all tests here: two cores and two GPUs on paper, on the loopback interface."""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ift_tune.search.backends import prepare_ray

# Before Ray is imported, which the test modules do.
prepare_ray(local=True)
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

HERE = Path(__file__).parents[1:3]  # what test modules can import, Ray's processes can import too


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let Ray's loggers forget to close their files when a Tuner is interrupted."""
    leak = pytest.mark.filterwarnings("ignore:unclosed file .*driver_artifacts:ResourceWarning")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(leak)


def _begin() -> None:
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=100 * 2**20,
    )


@pytest.fixture(scope="package", autouse=True)
def ray_here() -> Iterator[None]:
    """Start Ray for all tests here, and end it after them: it takes time for itself."""
    import ray

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    with pytest.MonkeyPatch.context() as patch:
        paths = [*map(str, HERE), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        _begin()
        yield
        ray.shutdown()


@pytest.fixture(scope="module", autouse=True)
def cores_come_back() -> Iterator[None]:
    """Start Ray again where a module leaves some of its cores taken.

    Tune asks for cores for a trial that waits and withdraws, all the time. Ray 2.60 keeps them for
    good if that meets with their being given, and whoever needs all cores would wait for ever.
    """
    import ray

    yield
    ended = time.monotonic()
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        if time.monotonic() > ended + 10.0:
            ray.shutdown()
            _begin()
        time.sleep(0.1)


@pytest.fixture(scope="module", autouse=True)
def forgotten_files() -> Iterator[None]:
    """Collect what Ray's loggers forgot here, where it is let pass, and not in another test."""
    yield
    gc.collect()
