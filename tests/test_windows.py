"""What Windows lacks is neither imported nor used when the package starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("nothing has to be hidden", allow_module_level=True)

HIDE = """
import importlib, multiprocessing.context, os, signal, sys

# Libraries bring what they need for the system that they are on.
import alembic, concurrent.futures, filelock, jinja2, matplotlib.figure, multiprocessing.connection
import numpy, optuna, pandas, pyarrow, rich.progress, scipy.stats, sklearn.datasets, sqlalchemy
import torch, torch._dynamo, typer, uuid
import matplotlib.backends.backend_agg, matplotlib.backends.backend_svg, scipy.optimize
import optuna.samplers, optuna.storages.journal, subprocess, tempfile
for name in sys.argv[1:]:
    importlib.import_module(name)

hidden = {
    signal: ["SIGKILL", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGALRM", "SIGCHLD", "SIGCONT", "SIGQUIT",
             "SIGSTOP", "SIGPIPE", "pthread_sigmask", "pthread_kill", "sigwait", "setitimer",
             "alarm", "pause", "siginterrupt", "SIG_BLOCK", "SIG_UNBLOCK", "SIG_SETMASK"],
    os: ["fork", "forkpty", "getuid", "geteuid", "getgid", "getegid", "getgroups", "killpg",
         "getpgid", "setsid", "setpgid", "uname", "nice", "mkfifo", "sched_getaffinity",
         "sched_setaffinity", "getloadavg", "getpriority", "sync", "fchmod",
         "chown", "statvfs", "wait", "wait3", "O_DIRECTORY", "O_NONBLOCK", "O_SYNC"],
    multiprocessing.context: ["ForkServerContext", "ForkContext"],
}
real = {}
for module, names in hidden.items():
    # A module without them for this package alone: the libraries are those of this system.
    without = type(sys)(module.__name__)
    vars(without).update({k: v for k, v in vars(module).items() if k not in names})
    real[module.__name__], sys.modules[module.__name__] = module, without
for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "readline"):
    real[name], sys.modules[name] = sys.modules.get(name), None
"""

IMPORT_ALL = """
from pathlib import Path
import ift_tune
root = Path(ift_tune.__file__).parent
for file in sorted(root.rglob("*.py")):
    parts = file.relative_to(root.parent).with_suffix("").parts
    if parts[-1] != "__main__" and ("ray" not in parts or "ray.tune" in sys.argv):
        importlib.import_module(".".join(parts).removesuffix(".__init__"))
from ift_tune import __main__ as program
assert not hasattr(program.signal, "SIGKILL")
sys.modules.update({name: module for name, module in real.items() if module is not None})
"""

START = """
for arguments in (
    ["--version"],
    ["tasks"],
    ["run", "small_problems:make_tiny", "--outer-steps", "2", "--out", "one", "--quiet"],
    ["search", "small_problems:make_tiny", "--outer-steps", "1", "--n-trials", "2", "--vary",
     "meta_lr=.01:.1", "--out", "two", "--no-baseline", "--quiet"],
    ["search", "small_problems:make_tiny", "--outer-steps", "1", "--n-trials", "3", "--vary",
     "meta_lr=.01:.1", "--out", "two", "--no-baseline", "--quiet", "--resume"],
    ["report", "two", "--quiet"],
):
    sys.argv = ["ift-tune", *arguments]
    try:
        program.main()
    except SystemExit as ended:
        assert not ended.code, arguments
"""

WITH_RAY = """
from ift_tune.base.spawning import check_importable, process_context
from ift_tune.search.ray.cluster import stopping_ray
sys.platform = "win32"
assert process_context(["ift_tune"]).get_start_method() == "spawn"
with stopping_ray() as interrupt:
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        assert interrupt.requested
    else:
        raise AssertionError("Ray was not left")
"""


def run(script: str, tmp_path: Path, *more: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", HIDE + script, *more]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{root}:{root / 'tests'}")


@pytest.mark.nightly
@pytest.mark.usefixtures("importable")
def test_everything_is_imported_and_runs_without_what_windows_lacks(tmp_path: Path) -> None:
    assert "ift-tune 0" in run(IMPORT_ALL + START, tmp_path)
    assert (tmp_path / "two" / "curves.png").exists()


@pytest.mark.nightly
@pytest.mark.usefixtures("importable")
def test_ray_is_left_at_ctrl_c_without_its_signal(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    run(IMPORT_ALL + WITH_RAY, tmp_path, "ray.tune")
