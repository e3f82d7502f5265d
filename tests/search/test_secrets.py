"""The password of a storage's URL is in nothing that a search prints, writes or raises."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import Call
from small_problems import BUDGET, CONFIG, SPACE, make_tiny
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.engine import URL

from ift_tune import UsageError, load_results, run_study
from ift_tune.base.files import plain_json, read_json, write_atomically
from ift_tune.search.work import former_identity

SECRET = "Hase7Igel"
SHAPES = {
    "a password": f"{{}}://me:{SECRET}@host/db",
    "with a slash": f"{{}}://me:{SECRET}/b@host:5432/db",
    "with an @": f"{{}}://me:b@{SECRET}@host/db",
    "with an @ as it should be": f"{{}}://me:b%40{SECRET}%2F@host/db",
    "with a percent sign": f"{{}}://me:%{SECRET}%@host/db",
    "with other letters": f"{{}}://me:ß日{SECRET}é@host/db",
    "with a query's marks": f"{{}}://me:a?b={SECRET}&c#d@host/db",
    "without a user": f"{{}}://:{SECRET}@host",
    "in the query": f"{{}}://me@host/db?password={SECRET}",
    "in the query, among others": f"{{}}://host/db?sslmode=require&sslpassword={SECRET}&charset=utf8",
    "in a driver's own string": f"{{}}:///?odbc_connect=DRIVER%3Dx%3BPWD%3D{SECRET}",
    "in both places": f"{{}}://me:{SECRET}@[::1]:5432/db?passphrase={SECRET}",
}


class Hushed(SQLiteDialect_pysqlite):
    """A database of any URL: the file that the test names."""

    file = ""
    supports_statement_cache = True

    def create_connect_args(self, url: URL) -> tuple[list[Any], dict[str, Any]]:
        del url
        return [self.file], {}


class Talkative(SQLiteDialect_pysqlite):
    """A driver that cannot connect, and repeats what it was given."""

    supports_statement_cache = True

    def create_connect_args(self, url: URL) -> tuple[list[Any], dict[str, Any]]:
        raise RuntimeError(f"cannot connect to {url.render_as_string(hide_password=False)}")


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    registry.register("hushed", __name__, "Hushed")
    registry.register("talkative", __name__, "Talkative")
    return tmp_path_factory.mktemp("database") / "file"  # whose tables take a while to make


@pytest.fixture(autouse=True)
def leaks(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Look into all files after each test."""
    monkeypatch.setattr(Hushed, "file", str(database))
    yield
    for path in tmp_path.rglob("*"):
        assert SECRET not in path.name
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path


def searched(url: str, out: Path, **changes: Any) -> Any:
    settings: dict[str, Any] = {"task": "tiny", "device": "cpu", "config": CONFIG, "n_trials": 1}
    settings |= {"storage": url, "study_name": out.parent.name, "out": out}
    return run_study(make_tiny, SPACE, BUDGET, **settings | changes)


DAILY = ("with other letters", "in both places")


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(shape, id=name, marks=() if name in DAILY else pytest.mark.nightly)
        for name, shape in SHAPES.items()
    ],
)
def test_a_search_its_failure_and_its_page_keep_it(
    shape: str, call: Call, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = shape.format("hushed")
    common: tuple[str, ...] = (
        "search",
        "small_problems:make_tiny",
        "--outer-steps",
        "1",
        "--no-baseline",
    )
    common += ("--vary", "meta_lr=.01:.1", "--n-trials", "1", "--device", "cpu")
    common += ("--study-name", tmp_path.name)
    done = call(*common, "--storage", url, "--out", "done")
    assert done.status == 0, done.err
    lost = ("--out", "refused", "--storage")
    failed = [
        call(*common, *lost, shape.format("talkative")),
        call(*common, *lost, shape.format("oracle+nodriver")),
        call(*common, f"--n-trials={url}"),
        call("search", url),
    ]
    assert [ended.status for ended in failed] == [2, 2, 2, 2]
    assert [len(ended.err.splitlines()) for ended in failed] == [1, 1, 1, 1]
    drawn = call("report", "done")
    assert drawn.status == 0
    assert all(SECRET not in ended.out + ended.err for ended in (done, *failed, drawn))
    assert SECRET not in caplog.text
    assert read_json(Path("done", "environment.json"))["command"][-3].startswith("hushed://")
    assert not Path("refused").exists()


def test_no_traceback_repeats_what_a_driver_said(tmp_path: Path) -> None:
    url = SHAPES["a password"].format("talkative")
    with pytest.raises(
        UsageError, match=r"talkative://me:\*\*\*@host/db cannot be opened"
    ) as caught:
        searched(url, tmp_path / "run")
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_a_missing_driver_is_named(tmp_path: Path) -> None:
    registry.register("missing", "no_such_driver", "Dialect")
    with pytest.raises(UsageError, match="No module named 'no_such_driver'"):
        searched(SHAPES["a password"].format("missing"), tmp_path / "run")


@pytest.mark.parametrize(
    "text",
    [f"host=h password={SECRET}", f"postgresql:/me:{SECRET}@h", f"journal:///no/such?p={SECRET}"],
)
def test_what_is_no_url_is_not_repeated(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"storage|journal") as caught:
        searched(text, tmp_path / "run")
    assert SECRET not in str(caught.value)


def test_a_file_of_sqlite_is_found_behind_a_query(tmp_path: Path) -> None:
    (tmp_path / "dir@home").mkdir()
    url = f"sqlite:///file:{tmp_path}/dir@home/s.db?uri=true&mode=rwc&password={SECRET}"
    searched(url, tmp_path / "run")
    assert {"s.db", "s.db.asking"} >= {p.name for p in (tmp_path / "dir@home").iterdir()}
    assert searched(url, tmp_path / "run", n_trials=2, resume=True).trials["trial"].tolist() == [
        0,
        1,
    ]


def test_a_run_goes_on_with_another_password_and_not_on_another_database(tmp_path: Path) -> None:
    shape = SHAPES["a password"].format("hushed")
    searched(shape, tmp_path / "run")
    changed = shape.replace(SECRET, f"new{SECRET}")
    assert len(searched(changed, tmp_path / "run", n_trials=2, resume=True).trials) == 2
    with pytest.raises(UsageError, match="another storage"):
        searched(shape.replace("/db", "/other"), tmp_path / "run", n_trials=3, resume=True)


def test_a_directory_of_an_earlier_version_goes_on_and_forgets_the_hash(tmp_path: Path) -> None:
    url = SHAPES["a password"].format("hushed")
    searched(url, tmp_path / "run")
    file = tmp_path / "run" / "run.json"
    written = read_json(file)
    write_atomically(file, plain_json(written | {"storage": former_identity(url)}))
    assert former_identity(url) != written["storage"]
    searched(url, tmp_path / "run", n_trials=2, resume=True)
    assert read_json(file) == written
    assert len(load_results(tmp_path / "run").trials) == 2
