"""The reference pages of the documentation, generated from the code they are about, so that they cannot be wrong.

`python -m fire_data.reference docs/reference` writes them, as `make docs` does before it builds the site; none is kept
in the repository. Each module here makes the Markdown of one page.
"""

from __future__ import annotations

import html
from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a bar inside a cell would end it."""
    lines = [head, ["---"] * len(head), *([cell.replace("|", "&#124;") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def code(text: str) -> str:
    """Inline code as HTML: texts of the code base may hold backticks and bars."""
    return f"<code>{html.escape(text, quote=False).replace('|', '&#124;')}</code>" if text else ""


def prose(text: str) -> str:
    """Text of the code base as Markdown: what is between backticks stays code, all else is shown as it is written."""
    parts = html.escape(text, quote=False).split("`")
    if len(parts) % 2 == 0:  # a backtick without its partner
        return "&#96;".join(map(_plain, parts))
    return "".join(f"<code>{p}</code>" if i % 2 else _plain(p) for i, p in enumerate(parts))


def _plain(text: str) -> str:
    for sign in "\\*_[]":
        text = text.replace(sign, f"\\{sign}")
    return text
