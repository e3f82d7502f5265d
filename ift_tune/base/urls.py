"""URLs as they may be shown, written and compared: without the secrets in them.

They are parsed as SQLAlchemy parses them, which opens them. What it cannot read, or reads in a way
that its writer did not mean (an ``@`` that is not written ``%40``), is hidden as a whole: a pattern
that looks for passwords misses the next one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, quote, quote_plus, unquote, unquote_plus

from ift_tune.base.errors import UsageError

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

HIDDEN = "***"

# Values of a query that say which database is meant, and how it is spoken to. Any other may be a
# secret, under whichever name its driver has for it.
_PLAIN_KEYS = frozenset(
    [
        *("host", "port", "database", "dbname", "service", "unix_socket", "driver"),
        *("mode", "uri", "cache", "timeout", "connect_timeout", "charset", "sslmode"),
    ]
)
_OF_FILES = ("sqlite", "journal")  # whose paths may have an @
_PLAIN = re.compile(r"[\w.,+/ @-]*")  # of the other parts: a mark may be that of a miswritten login
_IPV6 = re.compile(r"[0-9a-fA-F:.]*")
_PUNCTUATION = str.maketrans(dict.fromkeys("@:/?&=;#,\n", " "))
_SHORTEST = 4  # letters of a secret that are blotted out of a text wherever they stand


def without_secrets(text: str) -> str:
    """Return a text that ends in a URL, with the secrets of that hidden; any other as it is.

    Args:
        text: Such as an argument of a command line.

    Example:
        >>> from ift_tune.base.urls import without_secrets
        >>> without_secrets("--storage=postgresql://me:pass/word@host/db?sslpassword=another")
        '--storage=postgresql://me:***@host/db?sslpassword=***'
        >>> without_secrets("sqlite:///study.db")
        'sqlite:///study.db'
    """
    found = _split(text)
    if found is None:
        return text
    before, scheme, rest = found
    url = _parsed(f"{scheme}://{rest}")
    if url is None:
        return f"{before}{scheme}://{HIDDEN}"
    if _is_ambiguous(url, rest):
        place, query, _ = rest.rpartition("@")[2].partition("?")
        return f"{before}{scheme}://{HIDDEN}@{place}{query and '?' + HIDDEN}"
    if not (url.password or any(_hidden_values(url))):
        return text
    return f"{before}{_shown(url)}"


_WHOLE: dict[str, str] = {}  # URLs that this process was given, by what is shown of them


def remembered(url: str) -> str:
    """Return a URL without its secrets, and keep it for `with_secrets` and `blotted`."""
    shown = without_secrets(url)
    _WHOLE[shown] = url
    return shown


def with_secrets(shown: str) -> str:
    """Return the whole URL of which something is shown.

    Raises:
        UsageError: If it has secrets, and this process was not given them.
    """
    if shown not in _WHOLE and HIDDEN in shown:
        raise UsageError(
            f"no file has the password of {shown}: go on with the call or command that began it, "
            "which names the whole URL, got none"
        )
    return _WHOLE.get(shown, shown)


def blotted(text: str, arguments: Iterable[str] = ()) -> str:
    """Return a text without the secrets of the URLs that this process was given.

    Args:
        text: A message, which may repeat a URL or a part of it.
        arguments: Of the command line, with further ones.
    """
    for argument in (*arguments, *_WHOLE.values()):
        if (hidden := without_secrets(argument)) == argument:
            continue
        text = text.replace(argument, hidden)
        for secret in sorted(_secrets(argument), key=len, reverse=True):
            if len(secret) >= _SHORTEST:
                text = text.replace(secret, HIDDEN)
    return text


def reason(error: BaseException, url: str) -> str:
    """Return in a line why a URL could not be opened.

    What a driver says may repeat any part of what it was given: the words are left out where a
    secret is among them, and the error's class alone is named.
    """
    lines = str(error).splitlines()
    said = lines[0] if lines else type(error).__name__
    secrets = () if without_secrets(url) == url else _secrets(url)
    return type(error).__name__ if any(secret in said for secret in secrets) else said


def _split(text: str) -> tuple[str, str, str] | None:
    """Return what stands before a URL, its scheme, and its rest; None if there is none."""
    head, separator, rest = text.partition("://")
    if not separator:
        return None
    start = len(head)
    while start and (head[start - 1].isalnum() or head[start - 1] in "+.-_"):
        start -= 1
    return head[:start], head[start:], rest


def _parsed(url: str) -> URL | None:
    """Return a URL in its parts; None if it cannot be parsed, and so not be opened."""
    try:
        from sqlalchemy.engine import make_url  # with Optuna, which need not be installed

        return make_url(url)
    except Exception:  # noqa: BLE001  (of a text that is no URL, or a port that is no number)
        return None


def _is_ambiguous(url: URL, rest: str) -> bool:
    """Return whether what was meant to stand before an ``@`` may have been read as another part."""
    if url.password is not None:
        after_login = rest.partition(":")[2].partition("@")[2]
    elif url.username is not None:
        name = rest.replace(":", "/").partition("/")[0]
        after_login = name.rpartition("@")[2] + rest[len(name) :]
    elif url.host is None and url.drivername.startswith(_OF_FILES):
        return False
    else:
        after_login = rest
    return "@" in after_login or "?" in (url.username or "")


def _values(url: URL) -> Iterator[tuple[str, str]]:
    """Yield the pairs of the query; a key may stand there several times."""
    for key, value in url.query.items():
        yield from ((key, each) for each in ((value,) if isinstance(value, str) else value))


def _hidden_values(url: URL) -> Iterator[str]:
    """Yield what may hold a secret beside the password."""
    for part in (url.username, url.host, url.database):
        if part is not None and _part(part, url) == HIDDEN:
            yield part
    yield from (value for key, value in _values(url) if _value(key, value) == HIDDEN)


def _part(part: str, url: URL) -> str:
    """Return a part of a URL as it is shown: with the marks of a login or of settings, not at all.

    The paths of files have any.
    """
    if url.drivername.startswith(_OF_FILES) or _PLAIN.fullmatch(part) or _IPV6.fullmatch(part):
        return part
    return HIDDEN


def _value(key: str, value: str) -> str:
    return value if key.lower() in _PLAIN_KEYS and _PLAIN.fullmatch(value) else HIDDEN


def _shown(url: URL) -> str:
    user = "" if url.username is None else _part(url.username, url)
    user = user if user == HIDDEN else _quoted(user)
    login = f"{user}:{HIDDEN}@" if url.password is not None else f"{user}@" if user else ""
    host = "" if url.host is None else _part(url.host, url)
    host = f"[{host}]" if ":" in host else host
    port = "" if url.port is None else f":{url.port}"
    database = "" if url.database is None else f"/{_part(url.database, url)}"
    pairs = [f"{key}={_value(key, value)}" for key, value in _values(url)]
    query = f"?{'&'.join(pairs)}" if pairs else ""
    return f"{url.drivername}://{login}{host}{port}{database}{query}"


def _secrets(text: str) -> set[str]:
    """Return all that is hidden of a URL, as it is written and as a driver may repeat it."""
    found = _split(text)
    if found is None:
        return set()
    _, scheme, rest = found
    url = _parsed(f"{scheme}://{rest}")
    if url is None:
        raw = rest.translate(_PUNCTUATION).split()
    elif _is_ambiguous(url, rest):
        raw = rest.rpartition("@")[0].translate(_PUNCTUATION).split()
        raw += [value for _, value in parse_qsl(rest.rpartition("@")[2].partition("?")[2])]
    else:
        written = rest.partition(":")[2].partition("@")[0] if url.password else ""
        raw = [url.password or "", written, *_hidden_values(url)]
        raw += [pair.partition("=")[2] for pair in rest.partition("?")[2].split("&")]
        raw = [secret for secret in raw if secret not in _plain_values(url)]
    known = {form(secret) for secret in raw for form in (str, unquote, unquote_plus)}
    repeated = {form(secret) for secret in known for form in (quote, quote_plus, _quoted)}
    repeated |= {form(secret)[1:-1] for secret in known for form in (repr, ascii)}
    # However a driver writes what stands between them, letters and digits stay as they are.
    words = {word for secret in known for word in _words(secret) if len(word) >= _SHORTEST}
    return (known | repeated | words) - {""}


def _quoted(secret: str) -> str:
    return quote(secret, safe=" +")  # as SQLAlchemy does


def _words(secret: str) -> list[str]:
    return "".join(c if c.isascii() and c.isalnum() else " " for c in secret).split()


def _plain_values(url: URL) -> set[str]:
    return {value for key, value in _values(url) if _value(key, value) != HIDDEN}
