"""The page in a real browser: nothing fetched, nothing broken, readable in any light."""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

from ift_tune.report.figures import FIGURES
from ift_tune.report.page import EMBEDDED_BYTES, link
from report.comparisons import MATHS, SCRIPT

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

PageOf: TypeAlias = Callable[[str], Path]
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
CONTRAST = """
const channels = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
const light = text => {
  const [r, g, b] = channels(text).map(c => c / 255)
    .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = element => {
  for (let at = element; at; at = at.parentElement) {
    const color = getComputedStyle(at).backgroundColor;
    if (color !== 'rgba(0, 0, 0, 0)') return color;
  }
};
const texts = 'p, li, td, th, small, h1, h2, h3, a, figcaption, code';
const found = [];
for (const element of document.querySelectorAll(texts)) {
  const pair = [light(getComputedStyle(element).color), light(behind(element))];
  pair.sort((a, b) => b - a);
  found.push([(pair[0] + 0.05) / (pair[1] + 0.05), element.outerHTML.slice(0, 80)]);
}
return found.sort((a, b) => a[0] - b[0])[0];
"""


class Page:
    """A page in the browser."""

    def __init__(self, chrome: Chrome, path: Path) -> None:
        self.chrome: Any = chrome  # selenium leaves some of its methods without types
        self.path = path

    def open(self, *, scheme: str = "light", phone: bool = False) -> None:
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        self.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        if phone:
            self.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
        else:
            self.chrome.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        self.chrome.get_log("browser")
        self.chrome.get_log("performance")
        self.chrome.get(self.path.as_uri())

    def ask(self, script: str, *arguments: Any) -> Any:
        return self.chrome.execute_script(script, *arguments)


@pytest.fixture(
    scope="module",
    params=[
        "whole",
        pytest.param("one arm", marks=pytest.mark.nightly),
        pytest.param("unfinished", marks=pytest.mark.nightly),
        "hostile",
    ],
)
def any_page(request: pytest.FixtureRequest, chrome: Chrome, page_of: PageOf) -> Page:
    """Return the pages of what may become of a comparison."""
    return Page(chrome, page_of(request.param))


@pytest.fixture(scope="module")
def page(chrome: Chrome, page_of: PageOf) -> Page:
    """Return the page of the whole comparison."""
    return Page(chrome, page_of("whole"))


@pytest.fixture(autouse=True)
def _at_rest(chrome: Chrome) -> Iterator[None]:
    """Leave no emulation behind."""
    yield
    chrome.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def _requests(chrome: Any) -> set[str]:
    messages = [json.loads(entry["message"])["message"] for entry in chrome.get_log("performance")]
    return {
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    }


def test_nothing_is_fetched_and_nothing_is_complained_of(any_page: Page) -> None:
    any_page.open()
    assert any_page.chrome.get_log("browser") == []
    assert any_page.ask("return performance.getEntriesByType('resource').map(e => e.name)") == []
    asked_for = {url for url in _requests(any_page.chrome) if not url.startswith("data:")}
    assert asked_for == {any_page.path.as_uri()}
    assert any_page.ask("return document.scripts.length") == 0


def test_every_figure_is_seen_and_said(any_page: Page) -> None:
    any_page.open()
    figures = any_page.ask(
        "return [...document.querySelectorAll('figure')].map(f => {"
        " const svg = f.querySelector('svg[role=img]'), box = svg.getBoundingClientRect();"
        " return [f.id, box.width, box.height, svg.checkVisibility(),"
        "  svg.getAttribute('aria-label').length, f.querySelector('figcaption').innerText.length,"
        "  svg.querySelectorAll('text').length]; })"
    )
    assert len(figures) >= 4
    if any_page.path.parent.name == "report-run":  # the whole, which has them all
        assert {name for name, *_ in figures} == {f"figure-{drawing.name}" for drawing in FIGURES}
    for name, width, height, visible, alt, caption, texts in figures:
        assert visible, name
        assert min(width, height) > 100, name
        assert min(alt, caption) > 20, name
        assert texts > 2, name


def test_no_text_of_a_figure_is_cut(any_page: Page) -> None:
    any_page.open()
    cut = any_page.ask(
        "return [...document.querySelectorAll('figure svg text')].filter(text => {"
        " const own = text.getBoundingClientRect();"
        " const whole = text.closest('svg').getBoundingClientRect();"
        " return own.left < whole.left - 2 || own.right > whole.right + 2"
        "  || own.top < whole.top - 2 || own.bottom > whole.bottom + 2; })"
        ".map(text => [text.closest('figure').id, text.textContent])"
    )
    assert cut == []


def test_ids_are_unique_and_every_reference_is_met(any_page: Page) -> None:
    any_page.open()
    ids = any_page.ask("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    used = any_page.ask(
        "return [...document.querySelectorAll('use')].map(e => e.href.baseVal.slice(1)).concat("
        "[...document.querySelectorAll('[clip-path]')]"
        ".map(e => e.getAttribute('clip-path').slice(5, -1)),"
        "[...document.querySelectorAll('[aria-labelledby]')]"
        ".map(e => e.getAttribute('aria-labelledby')))"
    )
    assert set(used) <= set(ids)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(any_page: Page, scheme: str) -> None:
    any_page.open(scheme=scheme)
    contrast, where = any_page.ask(CONTRAST)
    assert contrast >= 4.5, where


def test_figures_follow_the_colour_scheme(page: Page) -> None:
    colors = {}
    for scheme in ("light", "dark"):
        page.open(scheme=scheme)
        colors[scheme] = page.ask(
            "const of = e => getComputedStyle(e);"
            "return [of(document.body).color, of(document.body).backgroundColor,"
            " of(document.querySelector('figure svg text')).fill]"
        )
    for light, dark in zip(colors["light"], colors["dark"], strict=True):
        assert light != dark
    for text, _, ink in colors.values():
        assert ink == text


@pytest.mark.parametrize("phone", [True, False])
def test_the_page_is_no_wider_than_its_window(any_page: Page, phone: bool) -> None:
    any_page.open(phone=phone)
    inner, whole = any_page.ask("return [innerWidth, document.documentElement.scrollWidth]")
    assert whole <= inner
    if phone:
        assert inner == PHONE["width"]


def test_downloads_hold_the_tables(page: Page) -> None:
    page.open()
    links = page.ask(
        "return [...document.querySelectorAll('a[download]')].map(a=>[a.download,a.href])"
    )
    assert [name for name, _ in links] == [
        f"{name}.csv" for name in ("trials", "steps", "final", "chosen", "against")
    ]
    for name, href in links:
        kind, _, content = href.partition(",")
        assert kind == "data:text/csv;charset=utf-8;base64"
        assert base64.b64decode(content) == (page.path.parent / name).read_bytes()


def test_a_large_table_is_linked_to() -> None:
    assert link("steps", b"1" * EMBEDDED_BYTES)["href"].startswith("data:")
    assert link("steps", b"1" * (EMBEDDED_BYTES + 1))["href"] == "steps.parquet"


def test_headings_language_and_title(page: Page) -> None:
    page.open()
    levels = page.ask(
        "return [...document.querySelectorAll('h1,h2,h3,h4')].map(h => Number(h.tagName[1]))"
    )
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert page.ask("return document.documentElement.lang") == "en"
    assert page.chrome.title.startswith("clouds: ")


def test_what_users_name_is_shown_as_it_is(chrome: Chrome, page_of: PageOf) -> None:
    page = Page(chrome, page_of("hostile"))
    page.open()
    text = page.ask("return document.body.innerText")
    assert SCRIPT in text
    assert MATHS in text
    labels = page.ask("return [...document.querySelectorAll('svg text')].map(t => t.textContent)")
    assert MATHS in labels
    assert SCRIPT in labels
    assert page.ask("return document.querySelectorAll('main b').length") == 0
    for secret in ("/home", "somebody", "/mnt", "private", "secret"):
        assert secret not in text
    assert "…/run" in text
