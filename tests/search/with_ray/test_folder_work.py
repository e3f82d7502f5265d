"""Work on Ray: what is kept of an item whose process dies, raises or is interrupted."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from callback_probes import Display, Probe, check_hooks
from small_problems import CONFIG, assert_same_tables, make_tiny

from ift_tune import Budget, UsageError
from ift_tune.base.errors import Interrupted, WorkerError
from ift_tune.base.interrupt import Interrupt
from ift_tune.compare.comparison import Comparison
from ift_tune.compare.run import run_comparison
from ift_tune.joint.callbacks import Callback
from ift_tune.search.backends import RayTune
from ift_tune.search.ray.cluster import pack, run_on_ray, unpack
from with_ray.folder_works import STEPS, Notes


def finish(work: Notes, interrupt: Interrupt | None = None) -> list[int]:
    """Run the work, and return the items in the order in which they were finished."""
    on_done: list[int] = []
    run_on_ray(work, RayTune(), [Callback()], interrupt or Interrupt(), on_done.append)
    return on_done


def files(work: Notes, number: int) -> dict[str, str]:
    """Return what has been sent back of an item."""
    there = (work.folder(number) / step for step in STEPS)
    return {path.name: path.read_text() for path in there if path.exists()}


@pytest.mark.nightly
def test_every_item_is_sent_back_whole_and_finished_ones_are_left_alone(tmp_path: Path) -> None:
    work = Notes(tmp_path, 4)
    work.finish(2)
    assert sorted(finish(work)) == [0, 1, 3]
    for number in (0, 1, 3):
        assert files(work, number) == dict.fromkeys(STEPS, "cpu after: ")
    assert files(work, 2) == {}
    assert finish(work) == []


@pytest.mark.nightly
def test_an_item_whose_process_dies_goes_on_after_what_has_been_sent_back(tmp_path: Path) -> None:
    work = Notes(tmp_path, 2, "death")
    assert sorted(finish(work)) == [0, 1]
    assert files(work, 1) == {"1": "cpu after: ", "2": "cpu after: 1", "3": "cpu after: 1"}


@pytest.mark.nightly
def test_a_mistake_of_the_users_is_said_in_its_own_words(tmp_path: Path) -> None:
    work = Notes(tmp_path, 2, "usage error")
    with pytest.raises(UsageError, match="give it something better"):
        finish(work)
    assert list(files(work, 1)) == ["1"]


@pytest.mark.nightly
def test_another_exception_names_the_item_and_what_was_raised(tmp_path: Path) -> None:
    work = Notes(tmp_path, 2, "exception")
    with pytest.raises(WorkerError, match=r"item 1 failed: ZeroDivisionError: one by nothing"):
        finish(work)
    assert list(files(work, 1)) == ["1"]


@pytest.mark.nightly
def test_an_interrupt_keeps_what_has_been_sent_back(tmp_path: Path) -> None:
    work, interrupt = Notes(tmp_path, 2, "sleep"), Interrupt()

    def ask_when_it_sleeps() -> None:
        while list(files(work, 1)) != ["1"]:
            time.sleep(0.05)
        interrupt.requested = True

    threading.Thread(target=ask_when_it_sleeps, daemon=True).start()
    with pytest.raises(Interrupted):
        finish(work, interrupt)
    assert list(files(work, 1)) == ["1"]
    assert 1 in work.unfinished()


def test_a_folder_survives_the_journey_without_its_locks(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for name in ("study.journal", "trial-00000/steps.csv", "study.journal.flock", "study.asking"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(f"the text of {name}")
    (here / "trial-00000" / "checkpoint.pt").write_bytes(bytes(range(256)))
    unpack(pack(here), there)
    found = {str(p.relative_to(there)): p.read_bytes() for p in there.rglob("*") if p.is_file()}
    kept = ("study.journal", "trial-00000/checkpoint.pt", "trial-00000/steps.csv")
    assert found == {name: (here / name).read_bytes() for name in kept}


@pytest.mark.nightly
def test_a_comparison_on_ray_has_the_same_tables_and_calls_each_hook_once(tmp_path: Path) -> None:
    comparison = Comparison(
        make_tiny,
        Budget(gradient_equivalents=60.0),
        config=CONFIG,
        trial_budget=Budget(outer_steps=2),
        training_steps=10,
        device="cpu",
    )
    tables, displays = {}, {}
    for backend in ("optuna", "ray"):
        displays[backend] = Display()
        tables[backend] = run_comparison(
            comparison,
            out=tmp_path / backend,
            arms=["ift", "random"],
            seeds=2,
            backend=backend,
            callbacks=[Probe(tmp_path / f"notes of {backend}"), displays[backend]],
        )
    assert len(tables["optuna"].trials) > 4
    assert_same_tables(tmp_path / "ray", tmp_path / "optuna")
    steps = tables["ray"].steps
    outer_steps = int((steps["arm"] == "ift").sum())
    check_hooks(tmp_path / "notes of ray", steps, apart=True, resources=1, joint_steps=outer_steps)
    assert displays["ray"].rows == displays["optuna"].rows == len(steps)
