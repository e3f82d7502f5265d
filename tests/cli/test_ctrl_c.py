"""Ctrl-C while the command line is imported: one line, whatever the libraries make of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise")

WAITING = "import sys, time\nprint('importing', flush=True)\n"
TURNED_INTO = {
    "nothing else": "time.sleep(60)\n",
    "another error": "try:\n time.sleep(60)\nexcept KeyboardInterrupt:\n raise ImportError('x')\n",
    "nothing": "try:\n time.sleep(60)\nexcept BaseException:\n pass\ntime.sleep(60)\n",
    "a printed error": (
        "class Late:\n def __del__(self):\n  time.sleep(60)\nlate = Late()\ndel late\n"
        "time.sleep(60)\n"
    ),
}
DAILY = ("nothing else", "another error")


def started(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [sys.executable, "-m", "ift_tune", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As from a terminal, also where the tests run in the background, where it is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param(rest, id=name, marks=() if name in DAILY else pytest.mark.nightly)
        for name, rest in TURNED_INTO.items()
    ],
)
def test_an_import_that_is_interrupted_is_one_line(rest: str, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(WAITING + rest)
    process = started(tmp_path, "run", "slow:problem", "--out", "o")
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=30)
    assert (process.returncode, printed) == (130, "ift-tune: interrupted\n")
    assert not (tmp_path / "o").exists()


@pytest.mark.nightly
@pytest.mark.parametrize("seconds", [0.3, 0.5, 0.8, 1.2, 1.7, 2.3, 3.0])
def test_at_any_moment_of_the_real_imports(seconds: float, tmp_path: Path) -> None:
    process = started(tmp_path, "run", "digits-weight-decay", "--outer-steps", "400", "--out", "o")
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in printed
    assert printed.splitlines()[-1].startswith("ift-tune: interrupted")
