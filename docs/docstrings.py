"""Docstrings as griffe reads them; loaded by mkdocs.yml.

The package writes ``Example:`` over one example, as Google's guide does. griffe knows only
``Examples:``, and would take the lines below for prose.
"""

from __future__ import annotations

import re
from typing import Any

import griffe


class OneExample(griffe.Extension):
    """Read ``Example:`` as ``Examples:``."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring that was collected; the sources stay as they are."""
        if obj.docstring is not None:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
