"""Any file of a run directory, damaged in any way: the undisturbed result, or a line about it."""

from __future__ import annotations

import contextlib
import io
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
from processes import finish
from small_problems import comparable, make_tiny

from ift_tune import IFTTuneError, load_best, load_results
from ift_tune.base.checkpoints import fingerprint
from ift_tune.joint.callbacks import CallbackList
from ift_tune.trial import runner
from ift_tune.trial.tables import Results

TASK = "small_problems:make_tiny"
COMMON = (
    *("--set", "start_check=false", "--set", "inner_steps=2", "--set", "inner_lr=0.02"),
    *("--outer-steps", "4", "--device", "cpu", "--quiet"),
)
SEARCH = (
    *("search", TASK, "--sampler", "random", "--n-trials", "2", "--vary", "meta_lr=0.01:0.1"),
    *COMMON,
)
RUN = ("run", TASK, *COMMON)
COMPARE = (
    *("compare", TASK, "--arms", "ift,random", "--seeds", "1", "--budget", "40"),
    *("--training-steps", "8", *COMMON),
)
COMMANDS = {
    "run": RUN,
    "search": SEARCH,
    "sqlite": (*SEARCH, "--storage", "sqlite:///{}/study.db"),
    "compare": COMPARE,
}


class Home(NamedTuple):
    """A run directory, what goes on with it, and one that was not disturbed."""

    out: Path
    command: tuple[str, ...]
    whole: Path

    @property
    def files(self) -> list[Path]:
        """What may be damaged, beside locks and tables that are written and never read."""
        files = sorted(p.relative_to(self.out.parent) for p in self.out.parent.rglob("*"))
        return [
            file
            for file in files
            if (self.out.parent / file).is_file()
            and file.suffix not in (".lock", ".asking", ".flock", ".html", ".md", ".svg", ".png")
        ]


def _flipped(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    if changed:
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _zeroed(content: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(max(1, len(content) - 64))
    return content[:start] + bytes(min(64, len(content) - start)) + content[start + 64 :]


def _without_a_line(content: bytes, chance: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    if len(lines) > 1:
        del lines[chance.randrange(1, len(lines))]
    return b"".join(lines)


DAMAGE: Mapping[str, Callable[[bytes, random.Random], bytes]] = {
    "emptied": lambda content, chance: b"",
    "truncated": lambda content, chance: content[: chance.randrange(max(1, len(content)))],
    "flipped": _flipped,
    "zeroed": _zeroed,
    "a line gone": _without_a_line,
    "garbage": lambda content, chance: chance.randbytes(200),
    "{}": lambda content, chance: b"{}",
    "[]": lambda content, chance: b"[]\n",
    "wrong types": lambda content, chance: b'{"trial": [], "status": 3, "budget": "x", "step": {}}',
}
KINDS = (*DAMAGE, "a folder")


def damage(file: Path, kind: str, chance: random.Random) -> bool:
    """Damage a file; return whether that changes it."""
    before = file.read_bytes()
    if kind == "a folder":
        file.unlink()
        file.mkdir()
        return True
    file.write_bytes(DAMAGE[kind](before, chance))
    return file.read_bytes() != before


def interrupted(command: Sequence[str], out: Path, trial: int) -> None:
    """Leave a run in the middle of a trial, with checkpoints of two steps."""

    def stop(callbacks: CallbackList, number: int, row: dict[str, Any]) -> None:
        if (number, row["step"]) == (trial, 3):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "CHECKPOINT_SECONDS", 0.0)
        patch.setattr(CallbackList, "on_trial_step", stop)
        assert finish(*command, "--out", str(out)) == 130


def make_homes(folder: Path, names: Sequence[str]) -> dict[str, Home]:
    """Return run directories of some commands, each finished and not."""
    found: dict[str, Home] = {}
    for name in names:
        for ending in ("", "-cut"):
            out = folder / f"{name}{ending}" / "out"
            out.parent.mkdir(parents=True)
            command = tuple(part.format(out.parent) for part in COMMANDS[name])
            if ending:
                interrupted(command, out, 1 if "search" in command else 0)
            else:
                assert finish(*command, "--out", str(out)) == 0
            found[f"{name}{ending}"] = Home(out, command, folder / name / "out")
    if "run" in names:
        refit = ("refit", str(found["run"].out), TASK, "--device", "cpu", "--quiet")
        assert finish(*refit) == 0
    return found


class Said(NamedTuple):
    """What a call returned, or the error that it ended in."""

    value: Any
    text: str


def said_by(call: Callable[[], Any]) -> Said:
    """Make a call; whatever is no error of the package passes."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            value = call()
        except IFTTuneError as error:
            return Said(None, str(error))
    return Said(value, errors.getvalue())


def same(one: Results, other: Results) -> bool:
    """Return whether tables are equal, but for what no two runs have in common."""
    try:
        for mine, theirs in zip(one, other, strict=True):
            left, right = (comparable(t).drop(columns="run_id") for t in (mine, theirs))
            pd.testing.assert_frame_equal(left, right, check_exact=True, check_dtype=False)
    except AssertionError:
        return False
    return True


def written(out: Path) -> Results:
    """Return the tables as they lie on the disk."""
    return Results(*(pd.read_parquet(out / f"{name}.parquet") for name in Results._fields))


def weights(out: Path) -> str:
    best = load_best(out, make_tiny, device="cpu")
    return fingerprint([*best.weights(), *best.hypers()])


def outcome(home: Home, file: Path, kind: str, action: str, chance: random.Random) -> str:
    """Return "same", "said", "untouched", or what is wrong."""
    before = load_results(home.out)
    if not damage(home.out.parent / file, kind, chance):
        return "untouched"
    out = str(home.out)
    calls: dict[str, Callable[[], Any]] = {
        "load": lambda: load_results(out),
        "resume": lambda: finish(*home.command, "--out", out, "--resume"),
        "report": lambda: finish("report", out, "--quiet"),
        "refit": lambda: finish("refit", out, TASK, "--device", "cpu", "--quiet"),
        "best": lambda: weights(home.out),
    }
    try:
        said = said_by(calls[action])
    except BaseException as error:  # noqa: BLE001 (the very thing that is looked for)
        return f"TRACEBACK {type(error).__name__}: {error}"
    if "Traceback" in said.text:
        return f"TRACEBACK {said.text[-300:]}"
    if said.value in (1, 2) or said.value is None:
        named = file.name in said.text
        mends = ("put a copy", "delete", "--resume", "another directory", "run it again", "give ")
        helps = any(words in said.text for words in mends)
        return "said" if named and helps else f"UNCLEAR {said.text[-400:]}"
    if action == "load":
        return "same" if same(said.value, before) else "WRONG tables"
    if action == "resume":
        if said.value != 0:
            return f"STATUS {said.value} {said.text[-300:]}"
        whole = load_results(home.whole)
        if not (same(load_results(out), whole) and same(written(home.out), whole)):
            return f"WRONG tables {said.text[-300:]}"
        return (
            "same"
            if weights_of(home) == weights_of(home._replace(out=home.whole))
            else "WRONG best"
        )
    if action == "best":
        return "same" if said.value == weights(home.whole) else "WRONG best"
    return "same" if said.value == 0 else f"STATUS {said.value} {said.text[-300:]}"


def weights_of(home: Home) -> str:
    return "" if home.command[0] == "compare" else weights(home.out)


ACTIONS = ("load", "resume", "report", "refit", "best")
CASES = 300
"""Of the nightly campaign, drawn from some thousands."""
SAMPLE = (
    ("run", "trial-00000/steps.csv", "truncated", "load"),
    ("run", "trial-00000/steps.csv", "flipped", "report"),
    ("run", "trial-00000/trial.json", "{}", "load"),
    ("run", "trial-00000/trial.json", "flipped", "resume"),
    ("run", "trial-00000/views.json", "zeroed", "report"),
    ("run", "best/model.pt", "a folder", "best"),
    ("run", "refit-train/trial.json", "wrong types", "refit"),
    ("run", "environment.json", "garbage", "load"),
    ("run-cut", "trial-00000/steps.csv", "flipped", "resume"),
    ("run-cut", "trial-00000/checkpoint.pt", "[]", "resume"),
    ("run-cut", "run.json", "a folder", "resume"),
    ("run-cut", ".lock", "a folder", "resume"),
    ("run", "best/.lock", "a folder", "resume"),
)


def actions(name: str) -> Sequence[str]:
    """Return what reads a run directory of a kind."""
    if name.endswith("-cut"):
        return ACTIONS[:2]
    return ACTIONS[:3] if name == "compare" else ACTIONS


class Gallery:
    """Run directories that are damaged in place, as storages are named by their paths."""

    def __init__(self, folder: Path, names: Sequence[str] = tuple(COMMANDS)) -> None:
        self._kept = folder / "kept"
        self.homes = make_homes(folder / "homes", names)
        shutil.copytree(folder / "homes", self._kept)

    def outcome(self, name: str, file: Path, kind: str, action: str) -> str:
        """Return what comes of a damaged file, see `outcome`."""
        home = self.homes[name]
        shutil.rmtree(home.out.parent)
        shutil.copytree(self._kept / home.out.parent.name, home.out.parent)
        whole = self._kept / home.whole.relative_to(home.out.parents[1])
        chance = random.Random(f"{name} {file} {kind} {action}")
        return outcome(home._replace(whole=whole), file, kind, action, chance)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    return Gallery(tmp_path_factory.mktemp("runs"), ["run"])


@pytest.mark.parametrize(("name", "file", "kind", "action"), SAMPLE)
def test_a_damaged_file_is_named_or_made_up_for(
    name: str, file: str, kind: str, action: str, runs: Gallery
) -> None:
    assert runs.outcome(name, Path("out", file), kind, action) in ("same", "said")


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:Creating legend")  # by Matplotlib, on a slow machine
def test_hundreds_of_damaged_files_of_every_kind(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path)
    cases = [
        (name, file, kind, action)
        for name, home in gallery.homes.items()
        for file in home.files
        for kind in KINDS
        for action in actions(name)
    ]
    found = {case: gallery.outcome(*case) for case in random.Random(0).sample(cases, CASES)}
    assert {k: v for k, v in found.items() if v not in ("same", "said", "untouched")} == {}
