"""What the pages link to outside of docs/ becomes part of the site; loaded by mkdocs.yml.

Documents are read in the repository as well, so their links lead to files: results, examples,
benchmarks. Here each such file gets its place in the site, source code as a page, and the links
are turned to it. Nothing is listed by hand: what a page links to is there, and nothing else.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<=\]\()([^)\s#]+)((?:#[^)\s]*)?)(?=\))")
NAMED = re.compile(r"\[(?:[\w-]+/)*[\w-]+\.md\](?=\(([^)\s#]+))")
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", flags=re.DOTALL | re.MULTILINE)
ALWAYS = ("CHANGELOG.md", "results/README.md")  # entries of the navigation


def on_files(files: Files, config: Any) -> Files:
    """Add every file outside of docs/ that a page links to, and what those link to."""
    found = [("docs/" + page.src_uri, page.content_string) for page in files.documentation_pages()]
    waiting = [*ALWAYS, *(target for path, text in found for target in targets(path, text))]
    while waiting:
        path = waiting.pop()
        place = place_of(path)
        if path.startswith("docs/") or place in files.src_uris or path == "README.md":
            continue
        if not (ROOT / path).is_file():
            raise PluginError(f"a page links to {path}, which is not there")
        if path.endswith(".py"):
            code = (ROOT / path).read_text(encoding="utf-8")
            shown = f"# {path}\n\n```` python\n{code}````\n"
            files.append(File.generated(config, place, content=shown))
        elif path.endswith(".md"):
            text = (ROOT / path).read_text(encoding="utf-8")
            files.append(File.generated(config, place, content=text))
            waiting += targets(path, text)
        else:
            files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn the links to files into links to their places in the site, by their titles."""
    path = home_of(page.file.src_uri)
    if path.endswith(".py"):
        return markdown
    markdown = NAMED.sub(lambda match: title_of(path_of(path, match[1])) or match[0], markdown)

    def turn(match: re.Match[str]) -> str:
        target = path_of(path, match[1])
        if target is None or any(a <= match.start() < b for a, b in code):
            return match[0]
        start = posixpath.dirname(page.file.src_uri) or "."
        return posixpath.relpath(place_of(target), start) + match[2]

    code = [each.span() for each in CODE.finditer(markdown)]
    return LINK.sub(turn, markdown)


def targets(path: str, text: str) -> list[str]:
    """Return the files that a document links to, from the repository's root."""
    found = (path_of(path, match[1]) for match in LINK.finditer(CODE.sub("", text)))
    return [each for each in found if each is not None]


def path_of(path: str, link: str) -> str | None:
    """Return the file that a document's link leads to; None of an address."""
    if ":" in link or link.startswith("/"):
        return None
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
    return posixpath.join(target, "README.md") if os.path.isdir(ROOT / target) else target


def title_of(path: str | None) -> str | None:
    """Return the first heading of a document as the text of a link."""
    if path is None or not (ROOT / path).is_file():
        return None
    first = (ROOT / path).read_text(encoding="utf-8").partition("\n")[0]
    return f"[{first.removeprefix('# ')}]" if first.startswith("# ") else None


def place_of(path: str) -> str:
    """Return where a file of the repository lies among the site's sources."""
    if path == "README.md":
        return "index.md"  # the site has a start of its own
    return path.removeprefix("docs/") + (".md" if path.endswith(".py") else "")


def home_of(place: str) -> str:
    """Return the file of the repository that a page shows; the inverse of `place_of`."""
    if (ROOT / "docs" / place).is_file():
        return "docs/" + place
    return place.removesuffix(".md") if place.endswith(".py.md") else place
