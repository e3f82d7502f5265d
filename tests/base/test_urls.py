"""URLs are shown without their secrets, whatever is in them and however they are miswritten."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.engine import make_url

from ift_tune.base.errors import UsageError
from ift_tune.base.urls import (
    HIDDEN,
    blotted,
    reason,
    remembered,
    with_secrets,
    without_secrets,
)

SECRET = "Sesam0effne"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"postgresql://me:{SECRET}@host/db", "postgresql://me:***@host/db"),
        (
            f"postgresql+psycopg2://me:a/{SECRET}@host:5/db",
            "postgresql+psycopg2://me:***@host:5/db",
        ),
        (f"mysql://me:%40{SECRET}@[::1]/db?charset=utf8", "mysql://me:***@[::1]/db?charset=utf8"),
        (f"redis://:{SECRET}é@host", "redis://:***@host"),
        (f"journal+redis://:{SECRET}@host/0", "journal+redis://:***@host/0"),
        (f"postgresql://host/db?sslkeypin={SECRET}", "postgresql://host/db?sslkeypin=***"),
        (f"mssql+pyodbc:///?odbc_connect=PWD%3D{SECRET}", "mssql+pyodbc:///?odbc_connect=***"),
        (f"sqlite:///file:a.db?uri=true&key={SECRET}", "sqlite:///file:a.db?uri=true&key=***"),
        (f"a://me@corp.com:{SECRET}@host", "a://me%40corp.com:***@host"),
        # What SQLAlchemy reads in another way than it was meant, or not at all:
        (f"postgresql://me:a@{SECRET}@host/db", "postgresql://***@host/db"),
        (f"postgresql://me:a@{SECRET}/b@host/db?x=1", "postgresql://***@host/db?***"),
        (f"postgresql://me/you:{SECRET}@host/db", "postgresql://***@host/db"),
        (f"postgresql:///me:{SECRET}@host/db", "postgresql://***@host/db"),
        (f"postgresql://host?password={SECRET}@x", "postgresql://***@x"),
        (f"postgresql://me@host?password={SECRET}@x", "postgresql://***@x"),
        (f"postgresql://me:{SECRET}", "postgresql://***"),
        (f"post-gres://me:{SECRET}@host", "post-gres://***"),
        (f"postgresql://me%3A{SECRET}@host/db", "postgresql://***@host/db"),
        (f"postgresql://host/db;password={SECRET}", "postgresql://host/***"),
        (f"postgresql://host/me:{SECRET}", "postgresql://host/***"),
        (f"mssql://host/db?timeout=3;pwd={SECRET}", "mssql://host/db?timeout=***"),
        (f"mysql://me:{SECRET}@host/db?host=a&host=b", "mysql://me:***@host/db?host=a&host=b"),
        # Without any:
        ("sqlite:////home/me@work/study.db", "sqlite:////home/me@work/study.db"),
        ("sqlite:///study.db?timeout=10", "sqlite:///study.db?timeout=10"),
        ("journal:///home/me@work/study", "journal:///home/me@work/study"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("no URL at all", "no URL at all"),
    ],
)
def test_what_is_shown_of_a_url(url: str, shown: str) -> None:
    assert without_secrets(url) == shown
    assert without_secrets(f"--storage={url}") == f"--storage={shown}"
    assert SECRET not in blotted(
        f"no such thing: {url!r}, or {url.partition('://')[2]}", ["--storage", url]
    )
    assert SECRET not in reason(ValueError(f"cannot reach {url.partition('://')[2]}"), url)


@given(st.text(min_size=4).filter(lambda text: text not in "postgresql://user:@localhost/study"))
def test_no_password_is_shown_once_it_is_written_as_it_should(password: str) -> None:
    url = make_url("postgresql://user@localhost/study").set(password=password)
    written = url.render_as_string(hide_password=False)
    assert without_secrets(written) == "postgresql://user:***@localhost/study"
    assert password not in reason(ConnectionError(f"{password!r} was refused: {password}"), written)


@given(st.text(alphabet="ab@:/?&=%#+é[]", max_size=12))
def test_no_password_is_shown_however_it_is_written(around: str) -> None:
    for url in (f"pg://u:{around}{SECRET}@host/db", f"pg://u:{SECRET}{around}@host/db"):
        assert SECRET not in without_secrets(url)


def test_a_driver_is_quoted_unless_it_repeats_a_secret() -> None:
    url = f"postgresql://me:{SECRET}%21@host/db"
    assert reason(OSError("host is down\nmore"), url) == "host is down"
    for said in (f"({SECRET}!)", repr(f"{SECRET}!"), f"{SECRET}%21"):
        assert reason(OSError(said), url) == "OSError"
    assert reason(OSError(), "sqlite:///a.db") == "OSError"


def test_a_url_that_cannot_be_parsed_here_is_hidden_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sqlalchemy.engine", None)  # as if it were not installed
    assert without_secrets(f"postgresql://me:{SECRET}@host/db") == f"postgresql://{HIDDEN}"


def test_a_url_is_whole_again_in_the_process_that_was_given_it() -> None:
    url = f"postgresql://me:{SECRET}@host/{__name__}"
    with pytest.raises(UsageError, match=r"no file has the password of postgresql://me:\*\*\*@"):
        with_secrets(without_secrets(url))
    assert with_secrets(remembered(url)) == url
    assert with_secrets("sqlite:///study.db") == "sqlite:///study.db"
    assert blotted(f"lost {url} ({SECRET})") == f"lost {without_secrets(url)} ({HIDDEN})"
