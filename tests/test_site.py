"""The documentation site: built once, complete, whole in its links, readable in a browser."""

from __future__ import annotations

import functools
import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import pytest
from browser import open_browser

import ift_tune

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

pytest.importorskip("mkdocs", reason="pip install 'ift_tune[docs]'")
pytest.importorskip("material", reason="pip install 'ift_tune[docs]'")

ROOT = Path(__file__).parent.parent
WITH_NAMES = (
    *("ift_tune.sklearn", "ift_tune.tasks"),
    *("ift_tune.testing", "ift_tune.testing.contracts"),
)
STUDIES = {
    "certificate": "certify",
    "cost": "study_costs",
    "inverse": "study_inverses",
    "validation_size": "study_validation_sizes",
    "worth": "study_worth",
}
SEEN = ("index.html", "jobs/wrong-labels.html", "reference/kinds.html", "gallery.html")
WIDE = ("tables.html", "comparing.html", "results/index.html", "examples/clean_and_train.py.html")
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
CONTRAST = """
const number = text => [...text.match(/[\\d.]+/g).map(Number), 1].slice(0, 4);
const over = (top, below) => top.slice(0, 3).map((c, i) => c * top[3] + below[i] * (1 - top[3]));
const behind = element => {
  const layers = [];
  for (let at = element; at; at = at.parentElement) {
    const color = number(getComputedStyle(at).backgroundColor);
    layers.push(color);
    if (color[3] === 1) break;
  }
  return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
};
const light = rgb => {
  const [r, g, b] = rgb.map(c => c / 255)
    .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const texts = 'p, li, td, th, h1, h2, h3, h4, a, em, code, code span, .md-ellipsis, footer div';
const found = [];
for (const element of document.querySelectorAll(texts)) {
  const own = [...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  if (!own || !element.checkVisibility({visibilityProperty: true, opacityProperty: true})) continue;
  if (element.matches('.headerlink')) continue;
  const ground = behind(element);
  const pair = [light(over(number(getComputedStyle(element).color), ground)), light(ground)];
  pair.sort((a, b) => b - a);
  found.push([(pair[0] + 0.05) / (pair[1] + 0.05), element.outerHTML.slice(0, 120)]);
}
return found.sort((a, b) => a[0] - b[0])[0];
"""


class Page(HTMLParser):
    """What a page can be linked to at, and where it leads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids |= {values[key] or "" for key in ("id", "name") if key in values}
        href, src = values.get("href"), values.get("src")
        if href is not None:
            (self.links if tag == "a" else self.loaded).append(href)
        if src is not None:
            self.loaded.append(src)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the site, built as CI builds it, by a process that cannot reach a network."""
    out = tmp_path_factory.mktemp("built") / "site"
    nowhere = "http://127.0.0.1:9"
    quiet = {"NO_MKDOCS_2_WARNING": "1"}  # about what the next major version of mkdocs will change
    environment = {**os.environ, "http_proxy": nowhere, "https_proxy": nowhere, **quiet}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return out


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    """Return every page as it was read."""
    return {path: Page(path.read_text()) for path in site.rglob("*.html")}


def test_every_link_leads_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    """mkdocs looks at what is written in Markdown; this at what has become of it."""
    broken = []
    for path, page in pages.items():
        for link in {*page.links, *page.loaded}:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                broken.append((path.name, link))
                continue
            ids = pages[target].ids if target in pages else set()
            if parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in ids:
                broken.append((path.name, link))
    assert broken == []


def test_nothing_is_loaded_from_another_server(site: Path, pages: dict[Path, Page]) -> None:
    assert [each for page in pages.values() for each in page.loaded if "//" in each] == []
    for sheet in site.rglob("*.css"):
        text = sheet.read_text()
        assert "url(http" not in text
        assert "@import" not in text


def test_every_document_has_its_entry() -> None:
    """In the navigation, not only in a link."""
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    entries = [line.rpartition(": ")[2] for line in navigation.splitlines()]
    documents = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")]
    assert [each for each in documents if each.as_posix() not in entries] == []


def public() -> list[str]:
    """Return the public names, with their modules."""
    names = [f"ift_tune.{name}" for name in ift_tune.__all__ if name != "Status"]  # an alias
    for module in WITH_NAMES:
        names += [f"{module}.{name}" for name in import_module(module).__all__]
    names += ["ift_tune.sklearn.IFTClassifier", "ift_tune.sklearn.IFTRegressor"]
    return [*names, *(f"ift_tune.studies.{module}.{name}" for module, name in STUDIES.items())]


def test_every_public_name_is_in_the_reference_with_an_example(site: Path) -> None:
    text = "".join(path.read_text() for path in sorted((site / "reference").glob("*.html")))
    data = {"ift_tune.tasks.TASKS", "ift_tune.tasks.EXPERIMENTS"}  # shown in the module's example
    listed = (ROOT / "docs" / "reference" / "index.md").read_text()
    assert [name for name in ift_tune.__all__ if f"`{name}`" not in listed] == ["tasks", "testing"]
    lacking = []
    for name in public():
        begin = text.find(f'id="{name}"')
        own = text[begin:].partition('class="doc doc-object ')[0]
        own = own.partition('class="doc doc-children"')[0]
        if begin < 0 or (name not in data and "&gt;&gt;&gt;" not in own):
            lacking.append(name)
    assert lacking == []


def test_the_gallery_has_every_picture_that_is_kept(site: Path) -> None:
    kept = subprocess.run(
        ["git", "ls-files", "results/**.png"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    pictures = kept.stdout.split()
    if not pictures:
        pytest.skip("not in a clone: which pictures are kept is not known")
    shown = Page((site / "gallery.html").read_text()).loaded
    assert [picture for picture in pictures if picture not in shown] == []
    assert [picture for picture in pictures if not (site / picture).is_file()] == []


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Serve the site on the loopback interface."""
    handler = functools.partial(_Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """Start a browser; skip where there is none."""
    with open_browser(tmp_path_factory.mktemp("profile")) as chrome:
        yield chrome


def show(chrome: Any, url: str, *, scheme: str = "light", phone: bool = False) -> None:
    """Open a page as a reader does who has not been here before."""
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    chrome.get("about:blank")
    origin = {"origin": url[: url.index("/", len("http://"))], "storageTypes": "local_storage"}
    chrome.execute_cdp_cmd("Storage.clearDataForOrigin", origin)  # Material keeps the colours there
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    if phone:
        chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    else:
        chrome.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    chrome.get(url)


def look_at(chrome: Any, address: str, page: str) -> None:
    """Open a page on a phone; a table or a block of code that is too wide moves by itself."""
    chrome.get_log("browser")
    show(chrome, f"{address}/{page}", phone=True)
    assert chrome.get_log("browser") == [], page
    asked = chrome.execute_script(
        "return performance.getEntriesByType('resource').map(e => e.name)"
    )
    assert asked
    assert [each for each in asked if not each.startswith((address, "data:"))] == [], page
    inner, whole = chrome.execute_script(
        "return [innerWidth, document.documentElement.scrollWidth]"
    )
    assert whole <= inner == PHONE["width"], page


@pytest.mark.parametrize("page", [*SEEN, *WIDE])
def test_a_page_fits_a_phone_and_asks_nobody_else(chrome: Any, address: str, page: str) -> None:
    look_at(chrome, address, page)


@pytest.mark.nightly
def test_so_does_every_page(chrome: Any, address: str, site: Path, pages: dict[Path, Page]) -> None:
    for path in pages:
        look_at(chrome, address, path.relative_to(site).as_posix())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("page", SEEN)
def test_text_can_be_read(chrome: Any, address: str, page: str, scheme: str) -> None:
    show(chrome, f"{address}/{page}", scheme=scheme)
    dark = chrome.execute_script("return document.body.dataset.mdColorScheme") == "slate"
    assert dark == (scheme == "dark")
    contrast, where = chrome.execute_script(CONTRAST)
    assert contrast >= 4.5, where


def test_the_search_finds_a_name(chrome: Any, address: str) -> None:
    """By its own index, without a server's help."""
    show(chrome, f"{address}/index.html")
    script = """
    const done = arguments[arguments.length - 1];
    document.querySelector('label[for=__search]').click();
    const field = document.querySelector('input[name=query]');
    field.focus();
    field.value = 'DomainWeights';
    field.dispatchEvent(new Event('input', {bubbles: true}));
    field.dispatchEvent(new KeyboardEvent('keyup', {key: 's', bubbles: true}));
    const look = tries => {
      const found = [...document.querySelectorAll('.md-search-result__link')].map(a => a.href);
      found.length || tries === 0 ? done(found) : setTimeout(look, 100, tries - 1);
    };
    look(100);
    """
    found = chrome.execute_async_script(script)
    assert any("reference/kinds.html" in each for each in found)
