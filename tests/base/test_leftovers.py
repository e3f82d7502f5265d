"""Files that killed processes have half-written go when the run is taken up again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ift_tune.base.files import drop_leftovers
from ift_tune.trial.tables import RunDirectory

WRITER = """
import os, signal, sys
from pathlib import Path
from ift_tune.base.files import write_atomically

def half(file):
    file.write(b"half")
    file.flush()
    print("half", flush=True)
    sys.stdin.read()

write_atomically(Path("trial-00000", "checkpoint.pt"), half)
"""


@pytest.mark.skipif(os.name == "nt", reason="there a process cannot be asked for")
def test_those_of_dead_processes_go_and_all_others_stay(tmp_path: Path) -> None:
    (tmp_path / "trial-00000").mkdir()
    command = [sys.executable, "-c", WRITER]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, stdin=pipe, stdout=pipe) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"half\n"
        left = tmp_path / "trial-00000" / f".checkpoint.pt.{writer.pid}.tmp"
        mine = tmp_path / f".run.json.{os.getpid()}.tmp"
        others = [mine, *(tmp_path / n for n in (".notes.tmp", "x.1.tmp", ".x.99999999999999.tmp"))]
        for other in others:
            other.write_text("x")
        with RunDirectory(tmp_path, resume=True).held():
            assert left.exists()  # its process is alive
        writer.kill()
    with RunDirectory(tmp_path, resume=True).held():
        assert not left.exists()
    assert all(other.exists() for other in others)


def test_a_folder_that_is_not_there_has_none(tmp_path: Path) -> None:
    drop_leftovers(tmp_path / "nowhere")
