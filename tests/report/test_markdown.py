"""Whatever a text holds, Markdown shows it as it is: no element, no link, no other block."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt  # Rich brings it

from ift_tune.report.markdown import bullets, code, escaped, table

PARSER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
TEXTS = st.text(alphabet="<>[]()!`*_#|~$&;\\ab1.)-+=:/w \n\r\t\u2028") | st.text()
HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[x](javascript:alert(1))",
    "![x](http://host/pixel)",
    "```\n</code><b>",
    "\r\r# a heading",
    "\n\n    <b>",
    "&lt;b&gt; &#60;",
    "a | b |\n|---|---|",
    "1. x",
    "- [ ] x",
    "===",
    "<!-- x",
    "~~x~~ *x* __x__",
    "x\\",
    "\\<b>",
    "[x]: javascript:x",
]


def shown(markdown: str) -> tuple[list[str], list[str]]:
    """Return the kinds of elements, and the texts, of what is rendered."""
    kinds, texts = [], []
    for token in PARSER.parse(markdown):
        kinds.append(token.type)
        for child in token.children or []:
            kinds.append(child.type)
            texts.append(child.content)
    return kinds, texts


def plain(text: str) -> str:
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))


@pytest.mark.parametrize("text", HOSTILE)
def test_names_that_would_do_harm(text: str) -> None:
    assert shown(f"# {escaped(text)}") == (
        ["heading_open", "inline", "text", "heading_close"],
        [plain(text)],
    )
    kinds, texts = shown(bullets([text, text]))
    assert "".join(texts) == 2 * plain(text)
    assert {"html_block", "html_inline", "link_open", "image", "hr", "em_open"}.isdisjoint(kinds)
    assert (kinds.count("bullet_list_open"), kinds.count("list_item_open")) == (1, 2)
    assert "ordered_list_open" not in kinds


@given(TEXTS.filter(str.strip))
def test_any_text_is_shown_as_it_is(text: str) -> None:
    kinds, texts = shown(bullets([text]))
    assert "".join(texts) == plain(text)
    assert set(kinds) <= {
        *("bullet_list_open", "list_item_open", "paragraph_open", "inline", "text"),
        *("paragraph_close", "list_item_close", "bullet_list_close"),
    }


@given(st.lists(TEXTS, min_size=2, max_size=2))
def test_a_table_has_its_cells_and_no_more(cells: list[str]) -> None:
    kinds, texts = shown(table(["one", "two"], [cells]))
    assert (kinds.count("th_open"), kinds.count("td_open")) == (2, 2)
    assert "".join(texts[2:]) == "".join(map(plain, cells))


@given(st.lists(TEXTS, min_size=1, max_size=3))
def test_a_block_of_code_ends_where_it_shall(lines: list[str]) -> None:
    tokens = PARSER.parse(f"- a list\n\n{code(lines)}\n\nafter")
    fences = [token for token in tokens if token.type == "fence"]
    assert [fence.content for fence in fences] == ["".join(f"{plain(line)}\n" for line in lines)]
    assert [token.type for token in tokens if token.level == 0][-3:] == [
        "paragraph_open",
        "inline",
        "paragraph_close",
    ] or tokens[-2].content == "after"


def test_no_address_is_made_a_link_by_itself() -> None:
    text = escaped("see https://host/x, HTTP://host and www.host.com")
    assert not re.search(r"(?<!\\)://|www\.", text, re.IGNORECASE)
