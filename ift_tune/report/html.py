"""Pages from templates: whatever is put into one is escaped, and names no folder of its writer."""

from __future__ import annotations

import re

from jinja2 import Environment, PackageLoader, StrictUndefined

_PATH = re.compile(r"(?<![\w.:/\\])(?:~[^/\\]*[/\\]|/|[A-Za-z]:[\\/]).*?([^/\\]+)[/\\]*$")


def environment() -> Environment:
    """Return what renders a template of the package."""
    return Environment(
        loader=PackageLoader("ift_tune.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def without_paths(text: str) -> str:
    """Return the text with an absolute path cut down to its last part: "--out=…/run"."""
    return _PATH.sub(r"…/\1", text)
