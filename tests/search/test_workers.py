"""Several real processes on one study: its total, its tables, and who dies."""

from __future__ import annotations

import functools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState
from processes import Running, server_pid, wait_for
from small_problems import (
    BUDGET,
    CONFIG,
    SPACE,
    assert_same_tables,
    kill_and_count,
    kill_once,
    make_eventful,
    make_met,
    make_nothing,
    make_tiny,
    raise_mistake,
    raise_usage_error,
)

from ift_tune import MetaConfig, UsageError, load_results
from ift_tune.base.errors import Interrupted, RunExistsError, WorkerError
from ift_tune.joint.callbacks import Callback
from ift_tune.search import processes as workers
from ift_tune.search.backends import cores
from ift_tune.search.result import StudyResult
from ift_tune.search.samplers import sampler_factory
from ift_tune.search.study import run_study
from ift_tune.search.work import open_storage
from ift_tune.trial.tables import RunDirectory
from ift_tune.trial.trial import ProblemFactory

N_TRIALS = 8
COMPLETE, FAIL, RUNNING = TrialState.COMPLETE, TrialState.FAIL, TrialState.RUNNING
VICTIM = 3  # the trial in which something happens
SLOW = 0.01  # seconds a training loss takes, so that both workers get some trials


def study(out: Path, factory: ProblemFactory = make_tiny, **changes: Any) -> StudyResult:
    settings: dict[str, Any] = {"n_trials": N_TRIALS, "task": "tiny", "config": CONFIG}
    settings |= {"device": "cpu", "sampler": sampler_factory("random"), "workers": 2} | changes
    return run_study(factory, SPACE, BUDGET, out=out, **settings)


def states(result: StudyResult) -> list[TrialState]:
    return [trial.state for trial in result.study.trials]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyResult]:
    """The same study by one process: random suggestions depend on seed and number alone."""
    out = tmp_path_factory.mktemp("alone") / "run"
    return out, study(out, workers=1)


@pytest.fixture(scope="module")
def victim(alone: tuple[Path, StudyResult]) -> float:
    """The `meta_lr` by which a problem knows that it is of the trial `VICTIM`."""
    return float(alone[1].study.trials[VICTIM].params["meta_lr"])


class Heard(Callback):
    """Keeps what it hears, and may act at a row."""

    def __init__(self, at: int = -1, action: Callable[[], object] = lambda: None) -> None:
        self.starts: list[tuple[int, int]] = []
        self.rows: list[tuple[int, int]] = []
        self._at, self._action = at, action

    def on_trial_begin(self, number: int, config: MetaConfig, first_step: int) -> None:
        self.starts.append((number, first_step))

    def on_trial_step(self, number: int, row: dict[str, Any]) -> None:
        self.rows.append((number, row["step"]))
        if len(self.rows) == self._at:
            self._action()


class Pair(NamedTuple):
    """A study that two workers ran."""

    shared: bool  # the cores, as the environment did not say how many threads
    death: bool
    out: Path
    result: StudyResult
    heard: Heard
    called: list[tuple[int, TrialState, int]]
    notes: Path


@pytest.fixture(
    scope="module",
    params=[
        "plain",
        pytest.param("sqlite-and-cores-shared", marks=pytest.mark.nightly),
        "journal-and-one-dies",
    ],
)
def pair(
    request: pytest.FixtureRequest, victim: float, tmp_path_factory: pytest.TempPathFactory
) -> Pair:
    """One in a journal of its own, one in a database, and one in a journal that is named."""
    storage, _, more = str(request.param).partition("-and-")
    shared, death = more == "cores-shared", more == "one-dies"
    place = tmp_path_factory.mktemp("pair")
    changes: dict[str, Any] = {}
    if storage != "plain":
        slashes = {"sqlite": "///", "journal": "//"}[storage]
        changes |= {"storage": f"{storage}:{slashes}{place / 'study.file'}", "study_name": "mine"}
    trouble: dict[str, Any] = {}
    if death:
        event = functools.partial(kill_once, place / "died")
        trouble |= {"event": event, "meta_lr": victim, "checkpoints": True}
    notes, heard = place / "notes", Heard()
    called: list[tuple[int, TrialState, int]] = []
    notes.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        if shared:
            patch.delenv("OMP_NUM_THREADS")
        result = study(
            place / "run",
            functools.partial(make_eventful, pause=SLOW, notes=notes, **trouble),
            callbacks=[
                heard,
                lambda _, trial: called.append((trial.number, trial.state, os.getpid())),
            ],
            **changes,
        )
        if shared:
            assert "OMP_NUM_THREADS" not in os.environ
    return Pair(shared, death, place / "run", result, heard, called, notes)


def test_two_workers_finish_exactly_the_trials_asked_for(pair: Pair) -> None:
    assert states(pair.result) == [COMPLETE] * N_TRIALS
    assert list(pair.result.trials["trial"]) == list(range(N_TRIALS))
    assert set(pair.result.trials["status"]) == {"complete"}


def test_two_workers_write_the_tables_of_one_process(
    pair: Pair, alone: tuple[Path, StudyResult]
) -> None:
    assert not pair.result.steps.duplicated(["trial", "step"]).any()
    for _, rows in pair.result.steps.groupby("trial"):
        assert list(rows["step"]) == [1, 2, 3, 4]
    assert_same_tables(pair.out, alone[0])
    values = [trial.value for trial in pair.result.study.trials]
    assert values == [trial.value for trial in alone[1].study.trials]


def test_both_workers_take_part(pair: Pair) -> None:
    marks = [trial.user_attrs["worker"].split("/") for trial in pair.result.study.trials]
    assert len({session for session, _ in marks}) == 1
    numbers = {number for _, number in marks}
    assert len(numbers) >= 2 if pair.death else numbers >= {"0", "1"}
    assert numbers <= ({"0", "1", "2"} if pair.death else {"0", "1"})


def test_the_parent_hears_of_every_trial_and_step(pair: Pair) -> None:
    started = Counter(number for number, _ in pair.heard.starts)
    expected = Counter(range(N_TRIALS)) + Counter([VICTIM] if pair.death else [])
    assert started == expected
    assert sorted(pair.heard.rows) == [(n, s) for n in range(N_TRIALS) for s in (1, 2, 3, 4)]


def test_callbacks_are_called_in_the_parent_after_each_trial(pair: Pair) -> None:
    assert sorted(pair.called) == [(n, COMPLETE, os.getpid()) for n in range(N_TRIALS)]


def test_the_trial_of_a_killed_worker_goes_on_from_its_checkpoint(pair: Pair) -> None:
    first_steps = [step for number, step in pair.heard.starts if number == VICTIM]
    if pair.death:
        assert first_steps[0] == 0
        assert 0 < first_steps[1] < 4
        mark = pair.result.study.trials[VICTIM].user_attrs["worker"]
        assert mark.endswith("/2")  # the one hired in the place of the dead
    else:
        assert first_steps == [0]


def test_each_worker_has_its_share_of_the_cores(pair: Pair) -> None:
    taken = {int(p.stem): json.loads(p.read_text()) for p in pair.notes.iterdir()}
    children = [note for pid, note in taken.items() if pid != os.getpid()]
    assert len(children) == (3 if pair.death else 2)
    share = str(max(1, cores() // 2))
    threads = share if pair.shared else os.environ["OMP_NUM_THREADS"]
    assert {note["variables"]["OMP_NUM_THREADS"] for note in children} == {threads}
    assert {note["threads"] for note in children} == {int(threads)}


def test_a_worker_has_the_environment_of_now_and_not_of_the_forkservers_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in ("one", "two"):
        monkeypatch.setenv("IFT_TUNE_TEST_OF_WORKERS", value)
        notes = tmp_path / value
        notes.mkdir()
        study(tmp_path / f"run-{value}", functools.partial(make_eventful, notes=notes), n_trials=2)
        taken = {int(p.stem): json.loads(p.read_text()) for p in notes.iterdir()}
        children = [note["variables"] for pid, note in taken.items() if pid != os.getpid()]
        assert {v["IFT_TUNE_TEST_OF_WORKERS"] for v in children} == {value}
        assert "PYTORCH_NVML_BASED_CUDA_CHECK" not in children[0]  # that is for the forkserver


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="there is no forkserver")
@pytest.mark.parametrize(
    ("numbers", "survives"),
    [
        ((signal.SIGINT, signal.SIGTERM), True),
        pytest.param((signal.SIGKILL,), False, marks=pytest.mark.nightly),
    ],
    ids=["to-all-processes", "out-of-memory"],
)
def test_a_hit_on_the_forkserver_costs_nothing(
    numbers: tuple[signal.Signals, ...],
    survives: bool,
    alone: tuple[Path, StudyResult],
    tmp_path: Path,
) -> None:
    server = server_pid()

    def hit() -> None:
        for number in numbers:
            os.kill(server, number)

    slow = functools.partial(make_eventful, pause=SLOW)
    study(tmp_path / "run", slow, callbacks=[Heard(3, hit)])
    assert (server_pid() == server) == survives
    assert_same_tables(tmp_path / "run", alone[0])


@pytest.mark.parametrize(
    ("after", "deaths"), [(0, 3), (6, 1)], ids=["while-built", "while-trained"]
)
def test_a_trial_whose_process_always_dies_is_given_up(
    after: int,
    deaths: int,
    victim: float,
    alone: tuple[Path, StudyResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert workers.DEATHS == 3
    monkeypatch.setattr(workers, "DEATHS", deaths)
    died = tmp_path / "died"
    deadly = functools.partial(
        make_eventful,
        event=functools.partial(kill_and_count, died),
        meta_lr=victim,
        after=after,
        pause=SLOW,
    )
    out = tmp_path / "run"
    with pytest.raises(WorkerError, match=f"{deaths} processes died at trial {VICTIM}.*status -9"):
        study(out, deadly)
    assert len(died.read_text()) == deaths
    torn = load_results(out).trials
    status = dict(zip(torn["trial"], torn["status"], strict=True))
    assert status.pop(VICTIM) == "failed"
    assert set(status.values()) <= {"complete", "interrupted"}
    assert list(status) == [number for number in range(len(torn)) if number != VICTIM]

    result = study(out, make_tiny, resume=True, workers=1)
    assert states(result) == [FAIL if n == VICTIM else COMPLETE for n in range(N_TRIALS + 1)]
    others, undisturbed = result.trials["trial"] != VICTIM, alone[1].trials
    mended = result.trials[others].head(N_TRIALS - 1)["val_loss"]
    assert list(mended) == list(undisturbed[undisturbed["trial"] != VICTIM]["val_loss"])


@pytest.mark.parametrize(
    ("event", "error", "message"),
    [
        (raise_mistake, WorkerError, "RuntimeError: a mistake in the user's problem"),
        (raise_usage_error, UsageError, "^this problem cannot be used so$"),
    ],
)
def test_an_error_in_a_worker_is_raised_and_nothing_is_lost_by_it(
    event: Callable[[], None],
    error: type[Exception],
    message: str,
    victim: float,
    alone: tuple[Path, StudyResult],
    tmp_path: Path,
) -> None:
    faulty = functools.partial(make_eventful, event=event, meta_lr=victim, pause=SLOW)
    with pytest.raises(error, match=message):
        study(tmp_path, faulty)
    torn = load_results(tmp_path).trials
    status = dict(zip(torn["trial"], torn["status"], strict=True))
    assert status.pop(VICTIM) == "failed"
    assert set(status.values()) <= {"complete", "interrupted"}
    result = study(tmp_path, make_tiny, resume=True, workers=1)
    assert states(result) == [COMPLETE] * N_TRIALS
    assert_same_tables(tmp_path, alone[0])


def start_from_nothing(call: Callable[[], object]) -> subprocess.Popen[bytes]:
    """Start a process of its own, with its own forkserver, that makes this call."""
    program = "import pickle, sys; pickle.load(sys.stdin.buffer)()"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdin is not None
    process.stdin.write(pickle.dumps(call))
    process.stdin.close()
    process.stdin = None
    return process


def descendants(ancestor: int) -> dict[int, str]:
    """Return the commands of all processes below one that are no zombies."""
    listing = ["ps", "-A", "-ww", "-o", "pid=,ppid=,stat=,args="]
    listed = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
    lines = [line.split(maxsplit=3) for line in listed.splitlines()]
    parents = {int(p): (int(pp), args) for p, pp, state, args in lines if state[0] != "Z"}
    found: dict[int, str] = {}
    while new := {
        pid: args
        for pid, (parent, args) in parents.items()
        if (parent == ancestor or parent in found) and pid not in found
    }:
        found |= new
    return found


def alive(pids: Iterable[int]) -> list[int]:
    """Return those that are no zombies and have not been reaped."""
    states = {pid: Path(f"/proc/{pid}/stat") for pid in pids}
    return [p for p, f in states.items() if f.exists() and " Z " not in f.read_text()]


class KilledParent(NamedTuple):
    """A process that was killed while its two workers were at work."""

    out: Path
    refused: pytest.ExceptionInfo[RunExistsError]
    seconds: float
    statuses: list[str]
    children: list[str]  # commands


@pytest.fixture(scope="module")
def killed_parent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KilledParent]:
    out = tmp_path_factory.mktemp("killed") / "run"
    slow = functools.partial(make_eventful, pause=SLOW)
    parent = start_from_nothing(functools.partial(study, out, slow))
    try:
        wait_for((out / "trial-00002" / "steps.csv").exists, "no trial began")
        with pytest.raises(RunExistsError) as refused:
            study(out, resume=True, workers=1)
        children = descendants(parent.pid)
        parent.kill()
        killed = time.monotonic()
        wait_for(lambda: not alive(children), "processes outlive their parent")
        seconds = time.monotonic() - killed
        statuses = list(load_results(out).trials["status"])
        yield KilledParent(out, refused, seconds, statuses, list(children.values()))
    finally:
        parent.kill()
        parent.communicate()


def test_a_run_that_another_process_is_at_work_on_is_refused(killed_parent: KilledParent) -> None:
    assert killed_parent.refused.match("another process is at work on the run in .*run")


def test_workers_end_with_their_parent_and_leave_their_trials_running(
    killed_parent: KilledParent,
) -> None:
    # Both workers and the forkserver, which have its command, and Python's resource tracker.
    assert sum("forkserver" in command for command in killed_parent.children) == 3
    assert len(killed_parent.children) == 4
    assert killed_parent.seconds < 5.0
    assert set(killed_parent.statuses) <= {"complete", "running"}


def test_after_the_parent_died_and_the_next_was_stopped_the_tables_are_the_undisturbed_ones(
    killed_parent: KilledParent, alone: tuple[Path, StudyResult]
) -> None:
    slow = functools.partial(make_eventful, pause=SLOW)
    heard = Heard(6, functools.partial(signal.raise_signal, signal.SIGTERM))
    with pytest.raises(Interrupted):
        study(killed_parent.out, slow, resume=True, callbacks=[heard])
    stopped = load_results(killed_parent.out).trials["status"]
    assert set(stopped) <= {"complete", "interrupted", "running"}
    assert list(stopped).count("complete") < N_TRIALS
    result = study(killed_parent.out, make_tiny, resume=True, workers=1)
    assert states(result) == [COMPLETE] * N_TRIALS
    assert_same_tables(killed_parent.out, alone[0])


def test_ctrl_c_saves_all_trials_and_resuming_completes_them(
    alone: tuple[Path, StudyResult], tmp_path: Path
) -> None:
    heard = Heard(2, functools.partial(signal.raise_signal, signal.SIGINT))
    called: list[int] = []

    def note(_: optuna.Study, trial: FrozenTrial) -> None:
        called.append(trial.number)

    slow = functools.partial(make_eventful, pause=SLOW)
    with pytest.raises(Interrupted):
        study(tmp_path, slow, callbacks=[heard, note])
    stopped = load_results(tmp_path)
    status = stopped.trials["status"]
    assert set(status) <= {"complete", "interrupted"}
    assert list(status).count("interrupted") <= 2  # fewer where one was between two trials
    assert list(status).count("complete") < N_TRIALS
    assert sorted(called) == list(stopped.trials["trial"][status == "complete"])
    for number in stopped.trials["trial"][status == "interrupted"]:
        rows = stopped.steps["trial"] == number
        assert sum(rows) == sum(1 for trial, _ in heard.rows if trial == number)
    resumed = Heard()
    result = study(tmp_path, make_tiny, resume=True, workers=1, callbacks=[resumed])
    assert states(result) == [COMPLETE] * N_TRIALS
    assert_same_tables(tmp_path, alone[0])
    assert sorted(heard.rows + resumed.rows) == [
        (n, s) for n in range(N_TRIALS) for s in (1, 2, 3, 4)
    ]  # no step was done twice


@pytest.mark.nightly
@pytest.mark.parametrize("scheme", ["sqlite", "journal"])
def test_two_runs_begun_at_once_on_one_storage_together_finish_the_study(
    scheme: str, alone: tuple[Path, StudyResult], tmp_path: Path
) -> None:
    file, meeting = tmp_path / "study.file", tmp_path / "meeting"
    url = {"sqlite": f"sqlite:///{file}", "journal": f"journal://{file}"}[scheme]
    meeting.mkdir()
    factory = functools.partial(make_met, meeting=meeting, pause=SLOW)
    outs = [tmp_path / "a", tmp_path / "b"]
    more: dict[str, Any] = {"workers": 1, "storage": url, "study_name": "shared"}
    calls = [functools.partial(study, out, factory, **more) for out in outs]
    with Running(calls[0]) as one, Running(calls[1]) as other:
        ended = [one.wait(), other.wait()]
    assert [e.status for e in ended] == [0, 0], "\n".join(e.stderr for e in ended)
    trials = optuna.load_study(study_name="shared", storage=open_storage(url, tmp_path)).trials
    assert [trial.state for trial in trials] == [COMPLETE] * N_TRIALS
    values = [trial.value for trial in trials]
    assert values == [trial.value for trial in alone[1].study.trials]
    held: list[int] = []
    for out in outs:
        mine = list(load_results(out).trials["trial"])
        token = RunDirectory(out, resume=True).token
        assert mine == [t.number for t in trials if t.user_attrs["run_directory"] == token]
        assert mine
        held += mine
    assert sorted(held) == list(range(N_TRIALS))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factory": lambda config, device, seed: None}, "importable module"),
        (
            {"sampler": lambda seed, trial_number: optuna.samplers.RandomSampler()},
            "importable module",
        ),
        ({"storage": optuna.storages.InMemoryStorage()}, "storage in memory"),
        ({"workers": 0}, "workers must be an integer of at least 1, got 0"),
        ({"device": "cuda:1"}, "cuda:1 cannot be kept"),
        ({"gpus_per_trial": 0.5}, "--device cpu with GPUs"),
        ({"gpus_per_trial": 0.5, "workers": 1}, "--device cpu with GPUs"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_workers_cannot_do_is_refused_before_anything_is_written(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        study(tmp_path / "run", **({"factory": make_nothing} | changes))
    assert not (tmp_path / "run").exists()


def test_a_run_directory_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    first, second = RunDirectory(tmp_path), RunDirectory(tmp_path, resume=True)
    with first.held():
        with pytest.raises(RunExistsError, match="another process is at work"), second.held():
            pass
        with pytest.raises(RunExistsError), second.held():  # the refused left the lock alone
            pass
    with second.held(), pytest.raises(RunExistsError), first.held():
        pass


def test_one_worker_that_is_given_its_share_is_a_process_too(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    factory = functools.partial(make_eventful, notes=tmp_path / "notes")
    result = study(
        tmp_path / "run", factory, workers=1, gpus_per_trial=0.0, device="auto", n_trials=1
    )
    assert set(result.trials["device"]) == {"cpu"}
    processes = {note.stem for note in (tmp_path / "notes").iterdir()}
    assert len(processes - {str(os.getpid())}) == 1
