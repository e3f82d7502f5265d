"""Every task, kind and inverse on a device that is not the CPU: its numbers, and hardly a wait.

See `second_device`, the program that these tests run.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from second_device import PACKED, is_large
from torch.utils import backend_registration

from ift_tune import tasks
from ift_tune.hyper import KINDS
from ift_tune.implicit.inverse import INVERSES, ConjugateGradient, Inverse, Neumann, Nystrom

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch has no devices written in Python",
)

# Kernels of PyTorch that are for devices known by name.
LACKING = {
    "text-dropout": "lstm_cell",
    "text-dropout-many": "lstm_cell",
    "digits-augment-affine": "INTERNAL ASSERT",  # of affine_grid
    "mnist-augment-affine": "INTERNAL ASSERT",
    "affine_color": "INTERNAL ASSERT",
}
INSTANCES = {repr(i): i for kind in INVERSES.values() for i in kind.examples()}
# What a device is asked for once more than the CPU needs: products after the last one that counts.
COSTS = ("hvps", "gradient_equivalents")
SMALL = [name for name in tasks.TASKS if not is_large(name)]
LARGE = [name for name in tasks.TASKS if is_large(name)]


def run(family: str) -> dict[str, Any]:
    program = Path(__file__).with_name("second_device.py")
    done = subprocess.run(
        [sys.executable, str(program), family], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def small() -> dict[str, Any]:
    return run("small")


@pytest.fixture(scope="module")
def large() -> dict[str, Any]:
    return run("large")


def check_numbers(found: dict[str, Any], rel: float = 1e-3) -> None:
    """Check that both devices have gone the same way."""
    for mine, theirs in zip(found["cpu"], found["second"], strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            if name in COSTS:
                assert theirs[name] >= value
            elif isinstance(value, str):
                assert theirs[name] == value
            else:
                # The CPU adds products with one rounding less, of which a small residual is made.
                rounding = 1e-5 if name == "relative_residual" else 1e-6
                assert theirs[name] == pytest.approx(value, rel=rel, abs=rounding), name


def check_task(found: dict[str, Any], name: str, rel: float = 1e-3) -> None:
    if name in LACKING:
        assert LACKING[name] in found[name]["error"]
        return
    assert "error" not in found[name]
    check_numbers(found[name], rel)
    for asked in found[name]["asked"][1:]:  # the first step looks at the data
        assert asked["waits"] <= 2
        assert asked["carried"] <= 1


@pytest.mark.parametrize("name", SMALL)
def test_an_outer_step_of_a_task_waits_twice_at_most(small: dict[str, Any], name: str) -> None:
    check_task(small, name)


@pytest.mark.nightly
@pytest.mark.parametrize("name", LARGE)
def test_so_does_one_of_a_large_task(large: dict[str, Any], name: str) -> None:
    check_task(large, name, rel=0.05)  # twenty layers make much of the order of a sum


def test_inner_steps_ask_for_operations_alone(small: dict[str, Any]) -> None:
    few, many = small["digits-weight-decay"]["asked"], small["all inner steps"]["asked"]
    for one, other in zip(few, many, strict=True):
        assert (one["waits"], one["carried"]) == (other["waits"], other["carried"])
    assert many[-1]["operations"] <= 1342  # two thirds of what they were with a wait for each


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_asks_for_no_more(small: dict[str, Any], name: str) -> None:
    check_task(small, name)


def test_a_signal_is_not_waited_for(small: dict[str, Any]) -> None:
    check_numbers(small["signal 1"], rel=1e-2)
    for one, other in zip(*(small[f"signal {n}"]["asked"][1:] for n in (0, 1)), strict=True):
        assert other["waits"] == one["waits"]
        assert other["carried"] <= one["carried"] + 1  # the order of the examples
        assert other["operations"] > one["operations"]


@pytest.mark.parametrize("name", INSTANCES)
def test_an_inverse_waits_after_many_products_alone(small: dict[str, Any], name: str) -> None:
    found, inverse = small[name], INSTANCES[name]
    assert "error" not in found
    check_numbers(found)
    for asked in found["asked"][1:]:
        assert asked["waits"] <= looks(inverse)
        # What is random is drawn on the host, and carried in one piece.
        assert asked["carried"] <= 1 + draws(inverse)


@pytest.mark.parametrize("name", PACKED)
def test_a_pack_asks_for_less_than_its_trials_alone(small: dict[str, Any], name: str) -> None:
    found = small[f"packed {name}"]
    check_numbers(found)
    for asked in found["asked"][1:]:  # the first of each is held against its own
        assert asked["packed"]["kernels"] < 2 * asked["alone"]["kernels"]
        assert asked["packed"]["waits"] <= 10


@pytest.mark.nightly
def test_a_trial_of_sixteen_launches_a_tenth_of_the_kernels() -> None:
    found = run("trials")
    assert found["alone"] >= 10 * found["packed"]


def looks(inverse: Inverse) -> int:
    """Return how often a solve may wait: a long one, whether to go on; and where it converges."""
    if isinstance(inverse, ConjugateGradient):
        return max(inverse.max_steps.bit_length() - 3, 0)
    return 1 if isinstance(inverse, Neumann) and inverse.terms > 100 else 0


def draws(inverse: Inverse) -> int:
    preconditioner = getattr(inverse, "preconditioner", None)
    return int(isinstance(inverse, Nystrom) or getattr(preconditioner, "name", "none") != "none")


def test_the_counts_see_what_they_are_there_for() -> None:
    """A test of the books themselves: a wait, a copy, and a tensor on the wrong device."""
    code = """
import second_device as s, torch
library = s.open_device()
x = torch.arange(4.0).to(s.NAME)
with s.counted() as found:
    float(x.sum()), bool(x[0] > 1.0), x.cpu(), torch.ones(4).to(s.NAME)
print(found.waits, found.carried)
try:
    x + torch.ones(4)
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
    )
    assert done.stdout.splitlines() == ["2 2", "aten::add got tensors of two devices"]
